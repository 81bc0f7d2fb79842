"""A hand-written MoE layer, as it is, through `moefx.optimize`: raised, proven, and trained with the same gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefx


class Expert(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """Runs the experts that were hit, one after the other: Python loops on values, which no tracer can follow."""

    def __init__(self, hidden: int = 32, width: int = 16, experts: int = 8, k: int = 2) -> None:
        super().__init__()
        self.k = k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, chosen = F.softmax(self.router(flat), dim=-1).topk(self.k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e in chosen.unique().tolist():
            token, nth = torch.where(chosen == e)
            out.index_add_(0, token, self.experts[e](flat[token]) * weights[token, nth, None])
        return out.view_as(x)


def main() -> None:
    torch.manual_seed(0)
    model, x = MoE(), torch.randn(4, 16, 32)
    want = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))

    opt = moefx.optimize(model, (x,), codegen="eager")
    got = torch.autograd.grad(opt(x).square().mean(), list(opt.parameters()))

    print("\n".join(line for line in str(opt.report).splitlines() if "MoE" in line))
    print(
        "parameters:", len(list(opt.parameters())), "as before; gradients equal:", all(map(torch.allclose, got, want))
    )
    print(opt.graphs["captured"].code.count("torch.ops.moefx.experts"), "product for all experts")


if __name__ == "__main__":
    main()
