"""`moefx.token_route`: what a router of token ids gives, a marker that capture leaves and `route_by_token` reads.

    token_route([logits [B,S,E]]) -> logits                 a network's scores
    token_route([logits [B,S,E], bias [E]]) -> logits       the bias takes part in the choice alone
    token_route([idx [.., B,S,k] integer, gates [.., B,S,k]]) -> idx      routing that was computed beforehand

It returns its first operand unchanged and has no gradient: nothing about this routing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._op import define

Tensor = torch.Tensor


def _reference(given: Sequence[Tensor]) -> Tensor:
    return given[0].clone(memory_format=torch.contiguous_format)


def _fake(given: Sequence[Tensor]) -> Tensor:
    return given[0].new_empty(given[0].shape)


token_route = define("token_route", "(Tensor[] given) -> Tensor", reference=_reference, fake=_fake)
