"""Muon-LITE in an ordinary PyTorch loop: a small MoE of plain modules, no other part of moefx."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefx


class MoE(nn.Module):
    """Every expert runs, the gate weighs the best two."""

    def __init__(self, width: int = 32, inner: int = 48, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, inner, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, inner) * inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        chances = self.gate(x).softmax(-1)
        weights = chances * (chances >= chances.topk(2).values[..., -1:])
        hidden = F.silu(torch.einsum("bth,eih->beti", x, self.up))
        return torch.einsum("beti,ehi,bte->bth", hidden, self.down, weights)


class Model(nn.Module):
    def __init__(self, vocab: int = 64, width: int = 32) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(vocab, width), nn.RMSNorm(width), nn.RMSNorm(width)
        self.attend, self.moe = nn.MultiheadAttention(width, 4, batch_first=True), MoE(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, mask = self.embed(ids), nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        h = self.first(x)
        x = x + self.attend(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return self.head(x + self.moe(self.second(x)))


def main(steps: int = 60) -> None:
    torch.manual_seed(0)
    model, follows = Model(), torch.randperm(64)
    groups = moefx.optim.param_groups(model, split="qkv")  # Muon for matrices, AdamW for the rest; prints a table
    lite = moefx.optim.LiteConfig.wsd(warmup=6, total=steps)
    optimizer = moefx.optim.MuonLITE(groups, lr=3e-3, lite=lite)
    for step in range(steps):
        ids = torch.randint(64, (16, 1))
        for _ in range(12):
            ids = torch.cat([ids, follows[ids[:, -1:]]], 1)  # every token has one successor
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:>2}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
