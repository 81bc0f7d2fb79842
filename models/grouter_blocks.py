"""The blocks that a Grouter network is made of: attention with rotary positions, and two ablations without attention.

Shape suffixes: B sequences, S tokens of a call, K keys (cached tokens and those of the call), H width, N heads, D head
size. Every block maps x_BSH to x_BSH under a `View`, which says what a token may see.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grouter_view import View

Memory = dict[str, Tensor] | None


def appended(memory: Memory, name: str, new: Tensor, dim: int, keep: int | None = None) -> Tensor:
    """`new` behind what `memory` holds under the name, where there is a memory; the last `keep` of it are kept."""
    if memory is None:
        return new
    whole = torch.cat((memory[name], new), dim) if name in memory else new
    memory[name] = (
        whole if keep is None else whole.narrow(dim, max(whole.shape[dim] - keep, 0), min(keep, whole.shape[dim]))
    )
    return whole


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions on the last axis (even size D) of x [B, S, D] or [B, N, S, D], its halves as the pairs'
    components. Angles are fp32; the result has the dtype of x.
    """
    D = x.shape[-1]
    frequency = theta ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D)
    angle = positions[..., None].float() * frequency
    if x.dim() == 4:
        angle = angle[:, None]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attend(q_BNSD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, view: View, causal: bool) -> Tensor:
    """Softmax attention, heads joined: [B, S, N * D]."""
    plain = causal and view.mask is None
    z_BNSD = F.scaled_dot_product_attention(q_BNSD, k_BNKD, v_BNKD, attn_mask=view.mask, is_causal=plain)
    return z_BNSD.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention with rotary positions (or without any, theta=None), no biases."""

    def __init__(self, hidden: int, heads: int, theta: float | None, causal: bool) -> None:
        super().__init__()
        self.heads, self.theta, self.causal = heads, theta, causal
        self.qkv_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_BSH: Tensor, view: View, memory: Memory = None) -> Tensor:
        q, k, v = self.qkv_proj(x_BSH).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.theta is not None:
            q, k = rotated(q, view.positions, self.theta), rotated(k, view.positions, self.theta)
        k, v = appended(memory, "k", k, 2), appended(memory, "v", v, 2)
        out: Tensor = self.o_proj(attend(q, k, v, view, self.causal))
        return out


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): queries, and keys with values, through
    low ranks; one rotary key of its own is shared by all heads.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        theta: float | None,
        causal: bool,
        *,
        q_rank: int,
        kv_rank: int,
        nope: int,
        rope: int,
        value: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.heads, self.theta, self.causal = heads, theta, causal
        self.kv_split, self.q_sizes, self.kv_sizes = [kv_rank, rope], [nope, rope], [nope, value]
        self.q_down = nn.Linear(hidden, q_rank, bias=False)
        self.q_norm = nn.RMSNorm(q_rank, eps=eps)
        self.q_up = nn.Linear(q_rank, heads * (nope + rope), bias=False)
        self.kv_down = nn.Linear(hidden, kv_rank + rope, bias=False)
        self.kv_norm = nn.RMSNorm(kv_rank, eps=eps)
        self.kv_up = nn.Linear(kv_rank, heads * (nope + value), bias=False)
        self.o_proj = nn.Linear(heads * value, hidden, bias=False)

    def forward(self, x_BSH: Tensor, view: View, memory: Memory = None) -> Tensor:
        q = self._heads(self.q_up(self.q_norm(self.q_down(x_BSH))))
        latent, shared = self.kv_down(x_BSH).split(self.kv_split, -1)
        k_nope, v = self._heads(self.kv_up(self.kv_norm(latent))).split(self.kv_sizes, -1)
        q_nope, q_rope = q.split(self.q_sizes, -1)
        k_rope = shared[:, None]
        if self.theta is not None:
            q_rope, k_rope = rotated(q_rope, view.positions, self.theta), rotated(k_rope, view.positions, self.theta)
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.heads, -1, -1)), -1)
        k, v = appended(memory, "k", k, 2), appended(memory, "v", v, 2)
        out: Tensor = self.o_proj(attend(q, k, v, view, self.causal))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class AttentionBlock(nn.Module):
    """Pre-norm: RMSNorm, attention, residual, RMSNorm, SwiGLU, residual."""

    def __init__(self, hidden: int, width: int, eps: float, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden, eps=eps)
        self.attention = attention()
        self.mlp_norm = nn.RMSNorm(hidden, eps=eps)
        self.mlp = SwiGLU(hidden, width)

    def forward(self, x_BSH: Tensor, view: View, memory: Memory = None) -> Tensor:
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), view, memory)
        out: Tensor = x_BSH + self.mlp(self.mlp_norm(x_BSH))
        return out


class LinearBlock(nn.Module):
    """Ablation without token mixing: Linear, LayerNorm, ReLU, with a residual where the widths agree."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width_out)
        self.norm = nn.LayerNorm(width_out)

    def forward(self, x: Tensor, view: View, memory: Memory = None) -> Tensor:
        y = F.relu(self.norm(self.linear(x)))
        return x + y if x.shape[-1] == y.shape[-1] else y


class Taps(nn.Module):
    """A 1-D convolution of kernel size 3 as one product of three shifted copies: of the two tokens before when causal,
    else of both neighbours. Tokens of other documents, and padding, are read as zeros.
    """

    def __init__(self, width_in: int, width_out: int, causal: bool) -> None:
        super().__init__()
        self.before, self.after = (2, 0) if causal else (1, 1)
        self.linear = nn.Linear(3 * width_in, width_out)

    def forward(self, x_BSH: Tensor, view: View, memory: Memory, name: str) -> Tensor:
        S = x_BSH.shape[1]
        whole = appended(memory, name, x_BSH, 1, keep=self.before)
        missing = self.before - (whole.shape[1] - S)  # of the tokens before, those that no memory holds
        whole = F.pad(whole, (0, 0, missing, self.after))
        copies = []
        for i in range(3):
            copy = whole[:, i : i + S]
            if view.owner is not None and view.tag is not None and i != self.before:
                # -2 owns nothing: outside of the window.
                tag = F.pad(view.tag, (self.before, self.after), value=-2)
                tag = tag[:, tag.shape[1] - S - 2 :][:, i : i + S]
                copy = copy * (tag == view.owner)[..., None].to(copy.dtype)
            copies.append(copy)
        out: Tensor = self.linear(torch.cat(copies, -1))
        return out


class ConvBlock(nn.Module):
    """Ablation with a short window: two convolutions with LayerNorm and ReLU around a residual, which is projected
    where the widths differ. LayerNorm and not BatchNorm: statistics over a batch would carry later tokens into earlier
    ones while training.
    """

    def __init__(self, width_in: int, width_out: int, causal: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = Taps(width_in, width_out, causal), nn.LayerNorm(width_out)
        self.conv2, self.norm2 = Taps(width_out, width_out, causal), nn.LayerNorm(width_out)
        self.shortcut: nn.Module = nn.Identity() if width_in == width_out else nn.Linear(width_in, width_out)

    def forward(self, x_BSH: Tensor, view: View, memory: Memory = None) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x_BSH, view, memory, "conv1")))
        y = self.norm2(self.conv2(y, view, memory, "conv2"))
        return F.relu(y + self.shortcut(x_BSH))


def make_blocks(c: Any) -> nn.ModuleList:
    """The blocks of a `GrouterConfig`."""
    theta = c.theta if c.rope else None
    if c.kind in ("linear", "conv"):
        widths = [c.hidden_size, *[c.width] * (c.num_layers - 1), c.hidden_size]
        pairs = pairwise(widths)
        return nn.ModuleList(LinearBlock(a, b) if c.kind == "linear" else ConvBlock(a, b, c.causal) for a, b in pairs)

    def attention() -> nn.Module:
        if c.kind == "mha":
            return Attention(c.hidden_size, c.num_heads, theta, c.causal)
        return LatentAttention(
            c.hidden_size, c.num_heads, theta, c.causal, q_rank=c.q_rank, kv_rank=c.kv_rank, nope=c.nope_head_dim,
            rope=c.rope_head_dim, value=c.value_head_dim, eps=c.norm_eps,
        )  # fmt: skip

    return nn.ModuleList(AttentionBlock(c.hidden_size, c.width, c.norm_eps, attention) for _ in range(c.num_layers))
