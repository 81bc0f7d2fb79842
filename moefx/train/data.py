"""Token data for training: the embedded corpus, the user's text files, or a memory-mapped token file.

A batch is a pure function of (data, split, batch, seq, seed, step): a resumed run needs to know the step and nothing
else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import InputError, nearest
from .corpus import embedded_corpus, is_held_out

Tokens = npt.NDArray[Any]

BYTES = 256  # vocabulary of byte tokens
SPLITS = ("train", "val")
TAIL = 20  # user data: the last 1/TAIL of each file is the validation split
_DTYPES = {"uint16": "<u2", "uint32": "<u4"}
_CHUNK = 1 << 22  # tokens per read when a whole file is looked through
_SCAN_LIMIT = 1 << 27  # tokens; beyond it, looking through the file takes minutes and each batch is checked instead


class TokenDataset:
    """Two splits of token ids, drawn as random windows.

    Args:
        train, val: one-dimensional arrays of non-negative integers (in memory or np.memmap).
        vocab_size: ids are below this.
        name: what the data is called in error messages and reports.
    """

    def __init__(self, train: Tokens, val: Tokens, vocab_size: int, name: str) -> None:
        self.train, self.val, self.vocab_size, self.name = train, val, vocab_size, name

    def tokens(self, split: str) -> Tokens:
        """The ids of "train" or "val", one-dimensional."""
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}", where=self.name, todo=nearest(split, SPLITS))
        return self.train if split == "train" else self.val

    def batches(self, split: str, batch: int, seq: int, seed: int, start_step: int = 0) -> Iterator[torch.Tensor]:
        """Endless batches int64 [batch, seq], from `start_step` on; batch n is the same wherever the iteration started.

        Every row is a window at a random place of the split, drawn independently (with replacement).

        Raises:
            InputError: sizes are not positive, the split is shorter than one sequence, or a drawn id is not below
                `vocab_size`.
        """
        if batch < 1 or seq < 1:
            raise InputError(f"batches of {batch} sequences of {seq} tokens", todo="choose 1 or more of both")
        tokens = self.tokens(split)
        self._require_length(split, seq)
        offsets = np.arange(seq)
        step = start_step
        while True:
            starts = _draw(seed, SPLITS.index(split), step, batch, len(tokens) - seq + 1)
            window = np.asarray(tokens[starts[:, None] + offsets], dtype=np.int64)
            if window.max() >= self.vocab_size:
                raise self._bad_id(int(window.max()), self.vocab_size)
            yield torch.from_numpy(window)
            step += 1

    def check(self, *, seq: int | None, model_vocab: int | None) -> None:
        """Raise InputError unless both splits hold a sequence (None: of any length) and every id is below `model_vocab`
        (None: unknown).
        """
        if seq is not None:
            for split in SPLITS:
                self._require_length(split, seq)
        if model_vocab is not None and self.vocab_size > model_vocab:
            largest = max(_largest(self.train), _largest(self.val))
            if largest >= model_vocab:
                raise self._bad_id(largest, model_vocab)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all tokens; where there are very many, of length, head and tail."""
        digest = hashlib.sha256()
        for tokens in (self.train, self.val):
            digest.update(f"{tokens.dtype.str} {len(tokens)} ".encode())
            whole = len(tokens) <= _SCAN_LIMIT
            for part in _chunks(tokens) if whole else (tokens[:_CHUNK], tokens[-_CHUNK:]):
                digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Name, sizes in tokens and vocabulary, for reports."""
        sizes = {f"{split}_tokens": len(self.tokens(split)) for split in SPLITS}
        return {"name": self.name, **sizes, "vocab_size": self.vocab_size}

    def _require_length(self, split: str, seq: int) -> None:
        if len(self.tokens(split)) < seq:
            raise InputError(
                f"the {split} split has {len(self.tokens(split))} tokens, less than one sequence of {seq}",
                where=self.name,
                why=f"the last 1/{TAIL} of each file is held out for validation" if split == "val" else None,
                todo="give more text, or choose shorter sequences",
            )

    def _bad_id(self, found: int, vocab: int) -> InputError:
        return InputError(
            f"token id {found} is outside of a vocabulary of {vocab}",
            where=self.name,
            todo="use a model with a larger vocabulary, or tokens of this model's tokenizer",
        )


def open_dataset(paths: str | Path | Sequence[str | Path] = ()) -> TokenDataset:
    """The data that `--data` names.

    Args:
        paths: empty for the embedded corpus; one `.bin` token file; or one or several text files, read as bytes. A
            single file can be given without a sequence around it.

    Raises:
        InputError: a file is missing, empty or malformed, kinds are mixed, or one is a `.npy` file.
    """
    files = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not files:
        return embedded_dataset()
    if arrays := [f for f in files if f.suffix == ".npy"]:
        raise InputError(
            "a .npy file is no text and says of no vocabulary",
            where=str(arrays[0]),
            todo="write the ids as a .bin file with its .json sidecar (docs/training.md)",
        )
    if any(f.suffix == ".bin" for f in files):
        if len(files) > 1:
            raise InputError(
                f"{len(files)} data files, one of them a .bin token file", todo="give one .bin file, or only text files"
            )
        return token_file_dataset(files[0])
    return text_dataset(files)


def embedded_dataset() -> TokenDataset:
    """Byte tokens of `embedded_corpus`; about 1/20 of the documents are held out, by a hash of their names."""
    documents = embedded_corpus()
    train = [text for name, text in documents if not is_held_out(name)]
    val = [text for name, text in documents if is_held_out(name)]
    return TokenDataset(_join(train), _join(val), BYTES, f"embedded corpus ({len(documents)} documents)")


def text_dataset(files: Sequence[Path]) -> TokenDataset:
    """Byte tokens of text files in any encoding, held in memory; the last 1/20 of each file is the validation split."""
    train, val = [], []
    for file in files:
        text = _read(file)
        if not text:
            raise InputError("a data file is empty", where=str(file), todo="give a file with text")
        cut = len(text) - len(text) // TAIL
        train.append(text[:cut])
        val.append(text[cut:])
    return TokenDataset(_join(train), _join(val), BYTES, ", ".join(map(str, files)))


def token_file_dataset(file: Path) -> TokenDataset:
    """A memory-mapped file of little-endian token ids, with a sidecar of the same name ending in `.json`.

    The sidecar is `{"dtype": "uint16" | "uint32", "vocab_size": int}`. The last 1/20 of the file is the validation
    split. Ids are compared with `vocab_size` when the file is opened (up to 2^27 tokens; in a longer one, as they are
    drawn).
    """
    dtype, vocab = _sidecar(file)
    size = _size(file)
    if size == 0 or size % dtype.itemsize:
        why = "it is empty" if size == 0 else f"its {size} bytes are no multiple of {dtype.itemsize} ({dtype.name})"
        raise InputError("not a usable token file", where=str(file), why=why, todo="write it again with numpy's tofile")
    tokens = np.memmap(file, dtype=dtype, mode="r")
    cut = len(tokens) - len(tokens) // TAIL
    data = TokenDataset(tokens[:cut], tokens[cut:], vocab, str(file))
    if len(tokens) <= _SCAN_LIMIT and (largest := _largest(tokens)) >= vocab:
        raise InputError(
            f"token id {largest} contradicts the sidecar's vocab_size {vocab}",
            where=str(file),
            todo="correct dtype or vocab_size in the sidecar, or write the tokens again",
        )
    return data


def unigram_nats(train: Tokens, val: Tokens, vocab_size: int = BYTES) -> float:
    """Cross entropy in nats per token of `val` under the token frequencies of `train`, with add-one smoothing.

    Args:
        train, val: integer ids below `vocab_size`, of any shape; `val` is not empty.
    """
    seen = _counts(train, vocab_size) + 1.0
    weights = _counts(val, vocab_size)
    return float(-(weights * np.log(seen / seen.sum())).sum() / weights.sum())


def _draw(seed: int, stream: int, step: int, count: int, below: int) -> npt.NDArray[np.int64]:
    # Philox's raw words are fixed by its definition; numpy may change how Generator.integers maps them from one release
    # to the next. The step goes into the highest counter word: in a lower one, neighbouring steps would share words.
    # The bias of the remainder is below/2^64.
    words = np.random.Philox(key=[seed, stream], counter=[0, 0, 0, step]).random_raw(count)
    return (np.asarray(words, dtype=np.uint64) % np.uint64(below)).astype(np.int64)


def _join(documents: Sequence[bytes]) -> Tokens:
    return np.frombuffer(b"\0".join(documents), dtype=np.uint8)


def _chunks(tokens: Tokens) -> Iterator[Tokens]:
    for start in range(0, len(tokens), _CHUNK):
        yield tokens[start : start + _CHUNK]


def _largest(tokens: Tokens) -> int:
    return max((int(part.max()) for part in _chunks(tokens)), default=0)


def _counts(tokens: Tokens, vocab_size: int) -> npt.NDArray[np.float64]:
    total = np.zeros(vocab_size)
    for part in _chunks(np.asarray(tokens).reshape(-1)):
        total += np.bincount(part.astype(np.int64), minlength=vocab_size)
    return total


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise _unreadable(file, error) from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> InputError:
    why = error.strerror or str(error)
    return InputError("a data file cannot be read", where=str(file), why=why, todo="check the path given as data")


def _sidecar(file: Path) -> tuple[np.dtype[Any], int]:
    _size(file)  # a missing token file is the first thing to say, before its sidecar
    path = file.with_suffix(".json")
    todo = 'write {"dtype": "uint16" or "uint32", "vocab_size": N} into it'
    if not path.is_file():
        raise InputError("a token file has no sidecar", where=str(path), todo=todo)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("a token file's sidecar is not JSON", where=str(path), why=str(error), todo=todo) from error
    entries: Mapping[str, Any] = found if isinstance(found, dict) else {}
    dtype, vocab = entries.get("dtype"), entries.get("vocab_size")
    if not isinstance(dtype, str) or dtype not in _DTYPES or type(vocab) is not int or vocab < 1:
        raise InputError(
            "a token file's sidecar is incomplete",
            where=str(path),
            why=f"dtype={dtype!r}, vocab_size={vocab!r}",
            todo=todo,
        )
    return np.dtype(_DTYPES[dtype]), vocab
