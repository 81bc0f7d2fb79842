"""The original model as oracle: tiny models, one step of either, and the comparison of two steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import moefx

Tensor = torch.Tensor
VOCAB, HIDDEN, TOKENS = 64, 32, 16
DYNAMIC = {"input_ids": (0, 1), "labels": (0, 1)}


def tiny(**config: Any) -> Any:
    """A one-layer Qwen3-MoE in training mode, the same weights at every call. Its routing is far from uniform."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    defaults: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, initializer_range=0.2, pad_token_id=None, output_router_logits=True,
        use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**defaults, **config}))
    return model.train()


def batch(B: int = 2, S: int = 8, seed: int = 1) -> dict[str, Tensor]:
    """Token ids [B, S] and labels that differ from them (the first two positions are ignored)."""
    ids = torch.randint(0, VOCAB, (B, S), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels}


def optimize(model: nn.Module, inputs: Any = None, **options: Any) -> moefx.OptimizedModule:
    """`moefx.optimize` with eager codegen, on `batch()` unless told otherwise."""
    return moefx.optimize(model, batch() if inputs is None else inputs, **{"codegen": "eager", **options})


def as_on_gpu(recipe: str, without: str = "", codegen: str = "eager") -> Any:
    """The passes of a recipe, of which those that look at the device take a CPU for a GPU, but for one."""
    chain = moefx.pipeline(recipe, codegen=codegen)
    passes = [replace(p, devices=("cpu",)) if hasattr(p, "devices") else p for p in chain.passes if p.name != without]
    return type(chain)(tuple(passes), chain.given)


class Block(nn.Module):
    """A sparse block of transformers inside a module of our own; subclasses give it a forward. x is [B, S, HIDDEN]."""

    def __init__(self, **config: Any) -> None:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        super().__init__()
        self.config = tiny(**config).config
        self.config._experts_implementation = "grouped_mm"
        self.moe = Qwen3MoeSparseMoeBlock(self.config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)

    def forward(self, x: Tensor) -> Any:
        """The mean square of the block's output."""
        return self.moe(x).square().mean()


class Dropped(Block):
    """Dropout before the block and after it."""

    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.moe(F.dropout(x, 0.3, self.training)), 0.2, self.training).square().mean()


class Two(Block):
    """Two scalars; the second goes through a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, 8, bias=False)
        torch.nn.init.constant_(self.head.weight, 0.1)

    def forward(self, x: Tensor) -> Any:
        y = self.moe(x)
        return y.square().mean(), self.head(y).square().mean()


class SequenceMajor(Block):
    """Mean square loss and, as a transposed view, what it was computed from: their gradients meet in two layouts."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.head = nn.Linear(HIDDEN, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.head(self.moe(x.transpose(0, 1).contiguous())).transpose(0, 1)
        return y.reshape(-1, 12).square().mean(), y


class Halves(Block):
    """The block's output cut in two: the gradients of the halves meet in one concatenation."""

    def forward(self, x: Tensor) -> Any:
        a, b = self.moe(x * self.moe.gate.weight.mean()).chunk(2, dim=-1)
        return a * 1.5, b * 2.5


class Norm(Block):
    """A running mean that the forward updates in place, then reads; and a counter."""

    mean: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(HIDDEN))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Any:
        self.mean.lerp_(x.detach().mean((0, 1)), 0.25)
        self.steps += 1
        return self.moe(x - self.mean).square().mean()


class ReadFirst(Norm):
    """The backward needs the buffer as it was before the update."""

    def forward(self, x: Tensor) -> Any:
        y = self.moe(x) * (self.mean.clone() + 1)
        self.mean.lerp_(x.detach().mean((0, 1)), 0.25)
        self.steps.add_(1)
        return y.square().mean()


def hidden(seed: int = 1) -> Tensor:
    """Hidden states [2, 8, HIDDEN] for `Block`."""
    return torch.randn(2, TOKENS // 2, HIDDEN, generator=torch.Generator().manual_seed(seed))


@dataclass
class Step:
    """What one forward and backward gave: every tensor among the outputs, and the gradient (or None) per parameter."""

    value: Tensor
    grads: dict[str, Any]


def loss(out: Any) -> Tensor:
    """The loss of an output, or the output itself."""
    found: Tensor = out if isinstance(out, Tensor) else out.loss
    return found


def step(module: nn.Module, inputs: Any, of: Callable[[Any], Tensor] = loss, seed: int = 0) -> Step:
    """One training step without an optimizer: `of(outputs)` is differentiated. Leaves no gradients behind."""
    module.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value = of(module(**inputs) if isinstance(inputs, dict) else module(*inputs))
        value.backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return Step(value.detach().clone(), grads)


def error(got: Any, want: Any) -> float:
    """Relative L2 difference."""
    a, b = got.detach().double(), want.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def assert_same(got: Step, want: Step, value: float = 1e-5, grad: float = 1e-4) -> None:
    """Values agree, the same parameters have gradients, and these agree. At least one gradient is not zero."""
    assert error(got.value, want.value) <= value
    assert {n for n, g in got.grads.items() if g is not None} == {n for n, g in want.grads.items() if g is not None}
    pairs = {n: (got.grads[n], w) for n, w in want.grads.items() if w is not None}
    assert any(bool(w.any()) for _, w in pairs.values())
    for name, (g, w) in pairs.items():
        assert g is not None
        assert g.dtype == w.dtype, name
        assert error(g, w) <= grad, f"gradient of {name}"


def check(opt: moefx.OptimizedModule, inputs: Any, of: Callable[[Any], Tensor] = loss) -> Step:
    """A step that equals the original's; the step."""
    got = step(opt, inputs, of)
    assert_same(got, step(opt.original, inputs, of))
    return got


def differ(a: Step, b: Step) -> bool:
    """Whether two steps differ clearly, in value and in some gradient: the control of `assert_same`."""
    pairs = [(a.grads.get(n), w) for n, w in b.grads.items()]
    far = [1 for g, w in pairs if g is not None and w is not None and error(g, w) > 1e-2]
    return error(a.value, b.value) > 1e-4 and bool(far)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that `optimize` must leave as it was."""
    return {
        "state": {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())},
        "modes": [m.training for m in model.modules()],
        "config": copy.deepcopy(vars(model.config)) if hasattr(model, "config") else None,
        "classes": [type(m) for m in model.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Compare with an earlier `snapshot`."""
    now = snapshot(model)
    assert list(now["state"]) == list(before["state"])
    assert all(torch.equal(now["state"][n], t) for n, t in before["state"].items())
    assert torch.equal(now["rng"], before["rng"])
    assert {k: now[k] for k in ("modes", "config", "classes")} == {k: before[k] for k in ("modes", "config", "classes")}


def programs(opt: moefx.OptimizedModule) -> list[Any]:
    """The compiled programs of a module, each once, in the order of compilation."""
    return list({id(v.program): v.program for v in opt._variants.values()}.values())


def count(opt: moefx.OptimizedModule) -> int:
    return len(programs(opt))
