"""The dispatch idioms of the random layers: from rows, weights and experts [T, k] to the routed output.

Each drops the choices beyond the capacity in its own way: a sentinel expert, a slice, a full buffer, a weight of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.models.idioms_sorted import SparseDispatcher, grouped_product

from .random_moe import Config

if TYPE_CHECKING:
    from .random_layer import Layer

EACH = (slice(None), None)


def ranks(config: Config, idx_TK: Tensor) -> Tensor:
    """How many choices an expert has been given before this one, [T, k]."""
    flat_S = (idx_TK if config.priority == "token" else idx_TK.t()).reshape(-1)
    rank_S = (F.one_hot(flat_S, config.experts).cumsum(0) - 1).gather(1, flat_S[:, None])[:, 0]
    return rank_S.view(idx_TK.shape) if config.priority == "token" else rank_S.view(idx_TK.shape[::-1]).t()


def kept(config: Config, idx_TK: Tensor) -> Tensor:
    """Which choices fit, [T, k] bool."""
    return ranks(config, idx_TK) < config.rows(idx_TK.shape[0])


def with_sentinel(config: Config, idx_TK: Tensor) -> Tensor:
    """Choices that do not fit go to expert E, which no loop visits."""
    if config.capacity is None:
        return idx_TK
    return torch.where(kept(config, idx_TK), idx_TK, config.experts)


def or_zero(config: Config, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    """Choices that do not fit get a weight of zero."""
    return w_TK if config.capacity is None else w_TK * kept(config, idx_TK)


def loop_where(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    idx_TK = with_sentinel(layer.config, idx_TK)
    y_TH = torch.zeros_like(x_TH)
    for e in range(layer.config.experts):
        token, nth = torch.where(idx_TK == e)
        y_TH[token] += layer.weighted(e, x_TH[token], w_TK[token, nth, None])
    return y_TH


def one_hot_mask(layer: Layer, idx_TK: Tensor) -> Tensor:
    return F.one_hot(with_sentinel(layer.config, idx_TK), layer.config.experts + 1).permute(2, 1, 0)


def loop_mask(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    y_TH, mask_EKT = torch.zeros_like(x_TH), one_hot_mask(layer, idx_TK)
    for e in range(layer.config.experts):
        nth, token = torch.where(mask_EKT[e])
        own = x_TH[None, token].reshape(-1, layer.config.hidden)
        y_TH.index_add_(0, token, layer.weighted(e, own, w_TK[token, nth, None]))
    return y_TH


def loop_hit(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    y_TH = torch.zeros_like(x_TH)
    with torch.no_grad():
        mask_EKT = one_hot_mask(layer, idx_TK)[:-1]
        hit = torch.greater(mask_EKT.sum(dim=(-1, -2)), 0).nonzero()
    for row in hit:
        e = int(row[0])
        nth, token = torch.where(mask_EKT[e])
        y_TH.index_add_(0, token, layer.weighted(e, x_TH[token], w_TK[token, nth, None]).to(y_TH.dtype))
    return y_TH


def loop_counts(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    idx_TK = with_sentinel(layer.config, idx_TK)
    y_TH = torch.zeros_like(x_TH)
    counts = torch.bincount(idx_TK.flatten(), minlength=layer.config.experts).tolist()
    for e in range(layer.config.experts):
        if counts[e] == 0:
            continue
        token, nth = torch.where(idx_TK == e)
        y_TH[token] += layer.weighted(e, x_TH[token], w_TK[token, nth, None])
    return y_TH


def loop_capacity(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    c = layer.config
    gates_TE = w_TK.new_zeros(x_TH.shape[0], c.experts).scatter(1, idx_TK, w_TK)
    sliced = c.priority == "token"
    idx_TK = idx_TK if sliced else with_sentinel(c, idx_TK)
    y_TH = torch.zeros_like(x_TH)
    for e in range(c.experts):
        token = torch.nonzero((idx_TK == e).any(dim=-1)).squeeze(-1)
        if sliced and c.capacity is not None:
            token = token[: c.rows(x_TH.shape[0])]
        if token.numel() > 0:
            y_TH.index_add_(0, token, layer.weighted(e, x_TH[token], gates_TE[token, e].unsqueeze(1)))
    return y_TH


def repeat_mask_if(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    return repeat_mask(layer, x_TH, w_TK, idx_TK, test=True)


def repeat_mask(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor, test: bool = False) -> Tensor:
    c = layer.config
    flat_S, w_S1 = with_sentinel(c, idx_TK).reshape(-1), w_TK.reshape(-1, 1)
    x_SH = x_TH.repeat_interleave(c.k, dim=0)
    z_SH = torch.empty_like(x_SH) if c.capacity is None else torch.zeros_like(x_SH)
    outside = c.place == "output"  # then the weights multiply all outputs at once
    for e in range(c.experts):
        mask_S = flat_S == e
        if not test or mask_S.any():
            own = x_SH[mask_S]
            z_SH[mask_S] = layer.one(e, own) if outside else layer.weighted(e, own, w_S1[mask_S])
    return ((z_SH * w_S1 if outside else z_SH).view(-1, c.k, c.hidden)).sum(dim=1)


def sorted_split(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    c = layer.config
    w_TK = or_zero(c, w_TK, idx_TK)
    chosen_TE = torch.zeros(x_TH.shape[0], c.experts, dtype=torch.long, device=x_TH.device)
    counts = chosen_TE.scatter(1, idx_TK, 1).sum(dim=0).tolist()
    _, order_S = idx_TK.flatten().sort(0)
    token_S = order_S.div(c.k, rounding_mode="trunc")
    rows, w = x_TH[token_S].split(counts), w_TK.flatten()[order_S, None].split(counts)
    z_SH = torch.cat([layer.weighted(e, rows[e], w[e]) for e in range(c.experts)])
    return torch.zeros_like(x_TH).index_add(0, token_S, z_SH)


def sorted_slice(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    c = layer.config
    w_TK = or_zero(c, w_TK, idx_TK)
    flat_S = idx_TK.view(-1)
    order_S = flat_S.argsort()
    ends = flat_S.bincount(minlength=c.experts).cpu().numpy().cumsum()
    x_SH, w_S1 = x_TH[order_S // c.k], w_TK.view(-1)[order_S, None]
    outputs, start = [], 0
    for e, end in enumerate(ends):
        if start == end:
            continue
        outputs.append(layer.weighted(e, x_SH[start:end], w_S1[start:end]))
        start = end
    z_SH = torch.cat(outputs, dim=0) if outputs else torch.empty_like(x_SH)
    back_SH = torch.empty_like(z_SH)
    back_SH[order_S] = z_SH
    return back_SH.view(-1, c.k, c.hidden).sum(dim=1)


def sorted_grouped(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    c = layer.config
    w_TK = or_zero(c, w_TK, idx_TK)
    flat_S = idx_TK.reshape(-1)
    order_S = torch.argsort(flat_S, stable=True)
    counts_E = torch.histc(flat_S.float(), bins=c.experts, min=0, max=c.experts)
    offsets_E = torch.cumsum(counts_E, dim=0).to(torch.int32)
    token_S = order_S // c.k
    z_SH = layer.all_experts(
        x_TH[token_S],
        lambda v, bank: grouped_product(v, bank.transpose(-2, -1), offsets_E),
        flat_S[order_S],
        w_TK.reshape(-1)[order_S, None],
    )
    return torch.zeros_like(x_TH).scatter_add(0, token_S[:, None].expand(-1, c.hidden), z_SH)


def dense_gates(layer: Layer, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    zeros_TE = w_TK.new_zeros(w_TK.shape[0], layer.config.experts)
    return zeros_TE.scatter(1, idx_TK, or_zero(layer.config, w_TK, idx_TK))


def dense_stack(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    gates_TE = dense_gates(layer, w_TK, idx_TK)
    experts = range(layer.config.experts)
    if layer.config.place == "output":
        return (torch.stack([layer.one(e, x_TH) for e in experts], dim=1) * gates_TE.unsqueeze(-1)).sum(dim=1)
    return torch.stack([layer.weighted(e, x_TH, gates_TE[:, e, None]) for e in experts], dim=1).sum(dim=1)


def dense_bmm(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    E = layer.config.experts
    x_ETH = x_TH.repeat(E, 1).view(E, *x_TH.shape)
    gates_ET1 = dense_gates(layer, w_TK, idx_TK).t().unsqueeze(-1)
    return layer.all_experts(x_ETH, lambda v, bank: torch.bmm(v, bank.transpose(1, 2)), EACH, gates_ET1).sum(dim=0)


def dense_gather(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    w_TK = or_zero(layer.config, w_TK, idx_TK)
    z_TEH = torch.stack([layer.one(e, x_TH) for e in range(layer.config.experts)], dim=1)
    z_TKH = z_TEH.gather(1, idx_TK.unsqueeze(-1).expand(-1, -1, layer.config.hidden))
    return (z_TKH * w_TK.unsqueeze(-1)).sum(dim=1)


def gathered_weights(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    w_TK = or_zero(layer.config, w_TK, idx_TK)
    x_TKH = x_TH.unsqueeze(1).expand(-1, layer.config.k, -1)
    product = lambda v, bank: torch.einsum("tki,tkoi->tko", v, bank[idx_TK])  # noqa: E731
    return layer.all_experts(x_TKH, product, idx_TK, w_TK.unsqueeze(-1)).sum(dim=1)


def one_hot_einsum(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    c, T = layer.config, x_TH.shape[0]
    C = min(max(c.rows(T), 1), max(T, 1))  # no expert gets more than T rows
    rank_TK = ranks(c, idx_TK)
    fits_TKE = F.one_hot(idx_TK, c.experts) * torch.lt(rank_TK, C).unsqueeze(-1)
    fits_TKE = fits_TKE.to(x_TH.dtype)
    slot_TKC = F.one_hot(rank_TK.clamp(max=C - 1), C).to(x_TH.dtype)
    dispatch_TEC = torch.einsum("tke,tkc->tec", fits_TKE, slot_TKC)
    combine_TEC = torch.einsum("tk,tke,tkc->tec", w_TK, fits_TKE, slot_TKC)
    x_ECH = torch.einsum("tec,th->ech", dispatch_TEC, x_TH)
    one = x_TH.new_ones(())
    z_ECH = layer.all_experts(x_ECH, lambda v, bank: torch.einsum("eci,eoi->eco", v, bank), EACH, one)
    return torch.einsum("tec,ech->th", combine_TEC, z_ECH)


def padded_buffer(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    c, (T, H) = layer.config, x_TH.shape
    E, C = c.experts, c.rows(T)
    rank_S, flat_S = ranks(c, idx_TK).reshape(-1), idx_TK.reshape(-1)
    slot_S = torch.where(rank_S < C, flat_S * C + rank_S, E * C)
    rows = x_TH.new_zeros(E * C + 1, H).index_copy(0, slot_S, x_TH.repeat_interleave(c.k, dim=0))
    one, bmm = x_TH.new_ones(()), lambda v, bank: torch.bmm(v, bank.transpose(1, 2))
    z_ECH = layer.all_experts(rows[:-1].view(E, C, H), bmm, EACH, one)
    z = torch.cat([z_ECH.reshape(E * C, H), z_ECH.new_zeros(1, H)])
    return (z[slot_S].view(T, c.k, H) * w_TK.unsqueeze(-1)).sum(dim=1)


def dispatcher(layer: Layer, x_TH: Tensor, w_TK: Tensor, idx_TK: Tensor) -> Tensor:
    sparse = SparseDispatcher(dense_gates(layer, w_TK, idx_TK))
    return sparse.combine([layer.one(e, own) for e, own in enumerate(sparse.dispatch(x_TH))])


IDIOMS: dict[str, Callable[[Layer, Tensor, Tensor, Tensor], Tensor]] = {
    "A1": loop_where,
    "A2": loop_mask,
    "A3": loop_hit,
    "A4": loop_counts,
    "A5": loop_capacity,
    "A6": repeat_mask_if,
    "A6p": repeat_mask,
    "B": one_hot_einsum,
    "C": gathered_weights,
    "D1": sorted_split,
    "D2": sorted_slice,
    "D3": sorted_grouped,
    "E1": dense_stack,
    "E2": dense_bmm,
    "E3": dense_gather,
    "F": padded_buffer,
    "H": dispatcher,
}
