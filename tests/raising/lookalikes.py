"""Modules that look like MoE layers and are none, or not quite. None of them may be raised.

`nearest` is the idiom that a reader would take it for (see `moefx.models.moe_lm.IDIOMS`), `differs` the first thing
that differs, as a pattern that a good report matches. `in_form` says why one has the form y = sum_j w_tj f(x_t; idx_tj)
after all, in a degenerate way: such a one is refused by convention. Those in
`almost.py` equal the ordinary layer of the same weights on everything but their `trigger`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ordinary import FFN, E, H, I, K, Ordinary, case

# --- no choice of experts per token


@case("B", r"mix|slot|all tokens|other tokens")
class SoftMoE(nn.Module):
    """Puigcerver et al.: slots are mixtures of all tokens (softmax over tokens), tokens mixtures of all slots."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(H, E, 2) * H**-0.5)
        self.experts = nn.ModuleList(FFN() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bth,hes->btes", x, self.phi)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
        slots = torch.einsum("btes,bth->besh", dispatch, x)
        z = torch.stack([f(slots[:, e]) for e, f in enumerate(self.experts)], dim=1)
        return torch.einsum("btes,besh->bth", combine, z)


@case("C", r"rout|choice|attention|other tokens|mix")
class HeadsAsExperts(nn.Module):
    """Attention whose heads are a bank of parameters [E, H, D] called experts."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("w1", "w3", "w2"):
            self.register_parameter(name, nn.Parameter(torch.randn(E, H, 8) * H**-0.5))
        self.experts_out = nn.Parameter(torch.randn(E, 8, H) * 8**-0.5)
        self.num_experts = E

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bth,ehd->betd", x, w) for w in (self.w1, self.w3, self.w2))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.einsum("betd,edh->bth", z, self.experts_out)


@case("E1", r"every expert|all experts|rout|top-k|choice|output")
class MixtureDensity(nn.Module):
    """Mixture density heads: mixture weights, means and deviations of all components are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(H, E), nn.ModuleList(nn.Linear(H, 2 * H) for _ in range(E))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, deviation = torch.stack([f(x) for f in self.experts], dim=-2).chunk(2, dim=-1)
        return self.gate(x).softmax(dim=-1), mean, F.softplus(deviation)


@case("E1", r"every expert|all experts|rout|top-k|choice", in_form="k = E with equal weights")
class Ensemble(nn.Module):
    """The mean of all members."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(FFN() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([f(x) for f in self.experts]).mean(dim=0)


@case("E1", r"every expert|all experts|top-k|choice", in_form="k = E: no expert is ever left out")
class DenseMixture(Ordinary):
    """Softmax over all experts, every one with a weight above zero."""

    def forward(self, x: Tensor) -> Tensor:
        w = F.softmax(self.gate(x), dim=-1)
        return (torch.stack([f(x) for f in self.experts], dim=-2) * w.unsqueeze(-1)).sum(dim=-2)


@case("E1", r"list|output|returns|rout")
class Heads(nn.Module):
    """A classifier with several heads in a ModuleList `experts`; returns a list."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(H, 5 + e) for e in range(E))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [f(x) for f in self.experts]


@case("G", r"expert choice|over tokens|tokens? (axis|per expert)|choices")
class ExpertChoice(Ordinary):
    """Top-k along the other axis: experts choose tokens, and a token has any number of experts."""

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, H)
        w_CE, token_CE = F.softmax(self.gate(x_TH), dim=-1).topk(min(len(x_TH), max(1, len(x_TH) * K // E)), dim=0)
        y_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            y_TH = y_TH.index_add(0, token_CE[:, e], expert(x_TH[token_CE[:, e]]) * w_CE[:, e, None])
        return y_TH.view(x.shape)


@case("A5", r"token|one (expert|network|FFN)|expert")
class MixtureOfDepths(nn.Module):
    """Top-k over tokens in front of a single FFN; the other tokens pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(H, 1), FFN()

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, H)
        w, token = self.router(x_TH)[:, 0].topk(max(1, len(x_TH) // 2))
        return (x_TH + torch.zeros_like(x_TH).index_add(0, token, self.expert(x_TH[token]) * w[:, None])).view(x.shape)


@case("A1", r"threshold|number of (experts|choices)|choices|router|rout")
class Thresholds(nn.Module):
    """Conditional computing by the signs of the token's first components: none to all of the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(FFN() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, H)
        y_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            token = torch.where(x_TH[:, e] > 0)[0]
            y_TH = y_TH.index_add(0, token, expert(x_TH[token]))
        return y_TH.view(x.shape)


@case("A1", r"sequence|per token|rout", in_form="all tokens of a sequence have the same choice")
class PerSequence(Ordinary):
    """One expert per sequence, chosen by its mean."""

    def forward(self, x: Tensor) -> Tensor:
        w_B, idx_B = F.softmax(self.gate(x.mean(dim=1)), dim=-1).max(dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            own = torch.where(idx_B == e)[0]
            y = y.index_add(0, own, expert(x[own]) * w_B[own, None, None])
        return y


# --- experts that are not the experts


@case("C", r"embedding|lookup|depend|value")
class ProductKeys(nn.Module):
    """Product-key memory (Lample et al.): the experts are rows of an embedding, constants of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.query = 16, nn.Linear(H, H)
        self.keys = nn.Parameter(torch.randn(2, 4, H // 2))
        self.experts = nn.Embedding(16, H)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (2, H // 2))
        one, two = torch.einsum("...pd,pkd->...pk", q, self.keys).unbind(dim=-2)
        w, idx = (one.unsqueeze(-1) + two.unsqueeze(-2)).flatten(-2).topk(K, dim=-1)
        return (self.experts(idx) * w.softmax(dim=-1).unsqueeze(-1)).sum(dim=-2)


@case("C", r"embedding|lookup|width", in_form="experts of width 1 in embedding tables")
class DogeExperts(ProductKeys):
    """Doge: an expert is a row that is multiplied with the token and a row that is scaled by the result."""

    def __init__(self) -> None:
        super().__init__()
        self.down_embed = nn.Embedding(16, H)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (2, H // 2))
        one, two = torch.einsum("...pd,pkd->...pk", q, self.keys).unbind(dim=-2)
        w, idx = (one.unsqueeze(-1) + two.unsqueeze(-2)).flatten(-2).topk(K, dim=-1)
        a = F.silu(torch.einsum("...h,...kh->...k", x, self.down_embed(idx))) * w.softmax(dim=-1)
        return torch.einsum("...k,...kh->...h", a, self.experts(idx))


@case("A1", r"activation")
class MixedActivations(Ordinary):
    """Every expert has an activation of its own."""

    def make(self, e: int) -> nn.Module:
        return FFN(act=(F.silu, F.gelu, F.relu, torch.tanh)[e])


@case("A1", r"width|size|shape")
class MixedWidths(Ordinary):
    """The experts differ in width."""

    def make(self, e: int) -> nn.Module:
        return FFN(width=8 * (e + 1))


@case("A1", r"shared?|tied|same (weight|parameter|tensor)", in_form="its bank would hold one matrix E times")
class TiedExperts(Ordinary):
    """All experts have the same down matrix."""

    def __init__(self) -> None:
        super().__init__()
        for expert in self.experts:
            expert.down_proj.weight = self.experts[0].down_proj.weight


@case("A1", r"norm|linear|first|input")
class NormInside(Ordinary):
    """Every expert has a LayerNorm of its own in front."""

    def make(self, e: int) -> nn.Module:
        norm = nn.LayerNorm(H)
        nn.init.normal_(norm.weight)
        return nn.Sequential(norm, FFN())


@case("A1", r"dropout|random")
class DropoutInside(Ordinary):
    """Dropout between activation and down projection, in training."""

    def make(self, e: int) -> nn.Module:
        ffn = FFN()
        return nn.Sequential(ffn.up_proj, nn.SiLU(), nn.Dropout(0.2), ffn.down_proj)


@case("A1", r"residual|sum|x itself|input")
class ResidualInside(Ordinary):
    """f(x) = x + FFN(x), with weights that do not add up to one."""

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        return F.softmax(self.gate(x_TH), dim=-1).topk(K, dim=-1)

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return x + self.experts[e](x)


@case("A1", r"three|3|layers|matrices|deep|matmul")
class DeepExperts(Ordinary):
    """Three linear layers with an activation after the first two."""

    def make(self, e: int) -> nn.Module:
        return nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, I), nn.SiLU(), nn.Linear(I, H))


@case("A1", r"convolution|neighbour|other tokens|mix|conv")
class Convolutions(Ordinary):
    """Experts over time: a causal convolution of width 3."""

    def make(self, e: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(H, I, 3), nn.SiLU(), nn.Conv1d(I, H, 1))

    def forward(self, x: Tensor) -> Tensor:
        w, idx = self.route(x)
        padded = F.pad(x.transpose(1, 2), (2, 0))
        z = torch.stack([f(padded).transpose(1, 2) for f in self.experts], dim=2)
        return (z.gather(2, idx.unsqueeze(-1).expand(-1, -1, -1, H)) * w.unsqueeze(-1)).sum(dim=2)


@case("A1", r"shared|dense|low.rank|LoRA|first")
class LoRAExperts(nn.Module):
    """Mixture of LoRA: low-rank differences, chosen per token, to the two dense weights of one FFN."""

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        self.gate, self.ffn = nn.Linear(H, E, bias=False), FFN()
        for name, (out, into) in {"up": (I, H), "down": (H, I)}.items():
            self.register_parameter(f"experts_{name}_A", nn.Parameter(torch.randn(E, rank, into) * into**-0.5))
            self.register_parameter(f"experts_{name}_B", nn.Parameter(torch.randn(E, out, rank) * rank**-0.5))

    def delta(self, name: str, v: Tensor, w: Tensor, idx: Tensor) -> Tensor:
        A, B = self.get_parameter(f"experts_{name}_A"), self.get_parameter(f"experts_{name}_B")
        return torch.einsum("tkor,tkri,ti,tk->to", B[idx], A[idx], v, w)

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, H)
        w, idx = F.softmax(self.gate(x_TH), dim=-1).topk(K, dim=-1)
        a = F.silu(self.ffn.up_proj(x_TH) + self.delta("up", x_TH, w, idx))
        return (self.ffn.down_proj(a) + self.delta("down", a, w, idx)).view(x.shape)


# --- another sum


@case("A1", r"two levels|hierarch|nested|group|after")
class Hierarchical(nn.Module):
    """Groups of experts: a router over groups, one within the group, and a squashing of every group's output."""

    def __init__(self) -> None:
        super().__init__()
        self.group_gate, self.gates = nn.Linear(H, 2), nn.ModuleList(nn.Linear(H, E) for _ in range(2))
        self.experts = nn.ModuleList(nn.ModuleList(FFN() for _ in range(E)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, H)
        w_T, group_T = F.softmax(self.group_gate(x_TH), dim=-1).max(dim=-1)
        y_TH = torch.zeros_like(x_TH)
        for g, bank in enumerate(self.experts):
            own = torch.where(group_T == g)[0]
            v_TK, idx_TK = F.softmax(self.gates[g](x_TH[own]), dim=-1).topk(K, dim=-1)
            z = torch.zeros_like(x_TH[own])
            for e, expert in enumerate(bank):
                token, nth = torch.where(idx_TK == e)
                z = z.index_add(0, token, expert(x_TH[own][token]) * v_TK[token, nth, None])
            y_TH = y_TH.index_add(0, own, torch.tanh(z) * w_T[own, None])
        return y_TH.view(x.shape)


@case("A1", r"input|another tensor|choice")
class InputPerChoice(Ordinary):
    """The second choice does not see the token but its tanh."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](torch.where(nth[:, None] == 0, x, torch.tanh(x)))


@case("E3", r"concat|sum|added|output")
class Concatenated(Ordinary):
    """The outputs of the two choices stand side by side."""

    def make(self, e: int) -> nn.Module:
        return FFN(out=H // K)

    def forward(self, x: Tensor) -> Tensor:
        w, idx = self.route(x)
        z = torch.stack([f(x) for f in self.experts], dim=-2)
        z = z.gather(-2, idx.unsqueeze(-1).expand(*idx.shape, H // K))
        return (z * w.unsqueeze(-1)).flatten(-2)


@case("A1", r"weight|expert 2", in_form="the weights of expert 2 are squared after the choice")
class SquaredWeight(Ordinary):
    def weight(self, e: int, w: Tensor) -> Tensor:
        return w.square() if e == 2 else w


@case("A1", r"weight|sign|expert 2", in_form="the weights of expert 2 are negative")
class FlippedSign(Ordinary):
    def weight(self, e: int, w: Tensor) -> Tensor:
        return -w if e == 2 else w


@case("A1", r"after|outside|nonlinear|sum", in_form="the sum is ordinary, what becomes of it is not")
class SquashedSum(Ordinary):
    """The sum goes through a nonlinear function before anyone sees it, times the token."""

    def after(self, y_TH: Tensor, x_TH: Tensor) -> Tensor:
        return torch.tanh(y_TH) * x_TH


@case("A1", r"position|first token|token 0|input")
class FirstToken(Ordinary):
    """The experts see token 0 squashed."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](torch.where(token[:, None] == 0, torch.tanh(x), x))
