"""What the tokens of a Grouter see: positions, documents, padding, and what `Grouter.step` has cached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class View(NamedTuple):
    """What the tokens of one call see, the same for all blocks.

    Attributes:
        positions: int [B or 1, S], within the document.
        owner: int [B or 1, S], the document that a token belongs to; None if there is one only and no padding.
        tag: int [B or 1, K], the document that a key is visible in, -1 for padding; None with `owner`.
        mask: bool [B or 1, 1, S, K] for attention; None for plain causal (or plain full) attention within the call.
    """

    positions: Tensor
    owner: Tensor | None
    tag: Tensor | None
    mask: Tensor | None


@dataclass
class GrouterCache:
    """What `Grouter.step` has seen so far. Start with an empty one; each step extends it in place.

    Attributes:
        layers: one dict of tensors per block: keys and values, or the last inputs of convolutions.
        tag: int [B, tokens so far], 0 for a token and -1 for padding.
        positions: int [B], the position of the next token.
    """

    layers: list[dict[str, Tensor]] = field(default_factory=list)
    tag: Tensor | None = None
    positions: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.tag is None else self.tag.shape[1]

    def select(self, rows: Tensor) -> None:
        """Keep sequences `rows` int [B'], in this order and as often as they are named."""
        self.layers = [{name: t.index_select(0, rows) for name, t in layer.items()} for layer in self.layers]
        if self.tag is not None and self.positions is not None:
            self.tag, self.positions = self.tag.index_select(0, rows), self.positions.index_select(0, rows)


def see(
    input_ids: Tensor,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
    attention_mask: Tensor | None,
    *,
    attends: bool,
    causal: bool,
) -> View:
    """What the tokens of a call without a cache see, from whichever of positions, documents and padding are given."""
    if position_ids is None and document_ids is None and attention_mask is None:
        return View(torch.arange(input_ids.shape[1], device=input_ids.device)[None], None, None, None)
    if document_ids is not None:
        changes = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=False)
    elif position_ids is not None:
        changes = position_ids == 0
    else:
        changes = torch.zeros_like(input_ids, dtype=torch.bool)
    owner = changes.cumsum(1)
    tag = owner if attention_mask is None else torch.where(attention_mask.bool(), owner, -1)
    if position_ids is None:
        count = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)
        seen = count.cumsum(1)
        # Tokens in front of the document, so that it counts from 0 also where padding comes first in it.
        before = torch.where(changes, seen - count, 0).cummax(1).values
        position_ids = (seen - before - 1).clamp_min(0)
    return View(position_ids, owner, tag, visible(owner, tag, 0, causal) if attends else None)


def visible(owner: Tensor, tag: Tensor, old: int, causal: bool) -> Tensor:
    """bool [B or 1, 1, S, K]: keys of the token's document, and not after it when causal. A token always sees itself,
    so that no row of the softmax is empty; `old` keys come before the first token.
    """
    S, K = owner.shape[1], tag.shape[1]
    query = torch.arange(S, device=owner.device)[:, None] + old
    key = torch.arange(K, device=owner.device)
    same = owner[:, :, None] == tag[:, None, :]
    if causal:
        same = same & (key <= query)
    return (same | (key == query))[:, None]
