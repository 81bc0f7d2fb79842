"""The embedded corpus in 512 word pieces: 256 bytes, and the 256 most frequent words with the space before them."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from moefx.train.corpus import embedded_corpus, is_held_out
from moefx.train.data import TokenDataset

VOCABULARY = 512
_PIECE = re.compile(rb" ?[A-Za-z_]+|\n +|.", re.DOTALL)


def dataset() -> TokenDataset:
    """Train and validation split by documents, as `moefx train` splits them; the pieces are counted on the former."""
    documents = embedded_corpus()
    train = [text for name, text in documents if not is_held_out(name)]
    counts = Counter(p for text in train for p in _PIECE.findall(text) if len(p) > 1)
    words = [p for p, _ in sorted(counts.items(), key=lambda c: (-c[1], c[0]))[: VOCABULARY - 256]]
    ids = {p: [256 + i] for i, p in enumerate(words)}
    held = [text for name, text in documents if is_held_out(name)]
    parts = [np.array([i for text in texts for p in _PIECE.findall(text) for i in ids.get(p, p)], dtype=np.uint16)
             for texts in (train, held)]  # fmt: skip
    return TokenDataset(*parts, VOCABULARY, "embedded corpus in word pieces")
