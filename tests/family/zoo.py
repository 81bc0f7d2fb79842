"""Tiny random-weight MoE causal language models, one per transformers family.

Every entry builds in well under a second on a CPU and exercises one routing scheme, experts layout and
block layout. The dimensions are chosen so that mistakes show:

* the experts' intermediate size is 48 with a hidden size of 64, so that no two of H, I and 2I agree and a
  transposed or unsplit weight cannot pass a shape check by accident;
* weights have a standard deviation of 0.1 rather than the usual 0.02, because with a hidden size of 64
  the usual value makes an expert's output around a thousand times smaller than the residual stream, and a
  wrong expert would then not be visible in the loss;
* router weights are larger still, so that the routing is far from uniform and the k-th and (k+1)-th
  scores are far apart compared with rounding differences between two implementations;
* parameters that are constant after the library's own initialisation (biases of zero, norm weights of
  one) and the score correction biases of bias-balanced routers get random values, because a pass which
  drops them would otherwise go unnoticed.

transformers is imported only when a model is built.
"""

from __future__ import annotations

from typing import Any

import torch

from .entries import ENTRIES
from .entry import BATCH, BIAS_STD, IGNORED_PREFIX, NORM_SPREAD, SEQ, WEIGHT_STD, Entry

NAMES: tuple[str, ...] = tuple(e.name for e in ENTRIES)
_BY_NAME = {e.name: e for e in ENTRIES}


def get(name: str) -> Entry:
    """Returns the entry with this name; raises KeyError if there is none."""
    return _BY_NAME[name]


def make_config(entry: Entry, **overrides: Any):
    """Returns a new transformers config of the entry, with keyword arguments replaced by `overrides`."""
    import transformers

    kwargs = dict(entry.kwargs)
    if entry.router_logits:
        kwargs["output_router_logits"] = True
    kwargs.update(overrides)
    return getattr(transformers, entry.config_class)(**kwargs)


def build(
    entry: Entry,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    experts_implementation: str | None = None,
    **overrides: Any,
) -> torch.nn.Module:
    """Builds a randomly initialised model of the family, in training mode, on the CPU.

    The values depend on the entry, the overrides and the seed alone; a lower precision model holds the
    rounded values of the fp32 one. The global random state is left as it was.

    Args:
        entry: row of the table.
        seed: seed of all weights.
        dtype: dtype of parameters and saved buffers, except for those that the class keeps in fp32 (most
            correction biases, the router weight in Ernie and Hunyuan), as when a checkpoint is loaded
            with this dtype. Unsaved buffers (rotary frequencies) stay in fp32.
        experts_implementation: name in transformers' experts interface ("eager", "grouped_mm", ...), or
            None for its default.
        overrides: config arguments that replace those of the entry.

    Returns:
        The causal language model; `model(**batch(entry))` has a scalar fp32 `loss`.
    """
    import transformers

    config = make_config(entry, **overrides)
    cls = getattr(transformers, entry.model_class)
    kwargs: dict[str, Any] = dict(dtype=torch.float32, attn_implementation=entry.attn_implementation)
    if experts_implementation is not None:
        kwargs["experts_implementation"] = experts_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, **kwargs)
    _fill(model, entry, seed)
    if dtype != torch.float32:
        with torch.device("meta"):
            like = cls._from_config(make_config(entry, **overrides), **{**kwargs, "dtype": dtype})
        _cast(model, dtype, like)
    return model.train()


def batch(entry: Entry, seed: int = 1, *, padded: bool = False) -> dict[str, torch.Tensor]:
    """Makes a training batch.

    Args:
        entry: row of the table.
        seed: seed of the token ids.
        padded: whether the second sequence ends in padding, with an `attention_mask` that says so. The
            mask takes the auxiliary loss through its weighted branch.

    Returns:
        `input_ids` [2, 16] int64; `labels` [2, 16] int64, the ids with a few leading positions (and the
        padding) set to -100; with `padded` also `attention_mask` [2, 16] int64 of zeros and ones.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, entry.kwargs["vocab_size"], (BATCH, SEQ), generator=generator)
    labels = input_ids.clone()
    labels[:, :IGNORED_PREFIX] = -100
    out = dict(input_ids=input_ids, labels=labels)
    if padded:
        mask = torch.ones_like(input_ids)
        mask[1, SEQ - 5 :] = 0
        labels[mask == 0] = -100
        out["attention_mask"] = mask
    return out


def reference_step(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], seed: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Runs one eager training step of the model as it is, without an optimizer.

    The random state is set before the forward pass, for routers and dropout that draw from it, and
    restored afterwards. Gradients already present on the model are dropped; it is left without any.

    Args:
        model: a model with a `loss` in its output, for example from `build`. Put in training mode.
        inputs: keyword arguments of its forward, for example from `batch`.
        seed: seed of the forward and backward pass.

    Returns:
        The loss, a detached scalar, and the gradients by parameter name, each with the shape and dtype of
        its parameter. Parameters that got no gradient are left out.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        loss = model(**inputs).loss
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


def _is_correction(name: str) -> bool:
    return name.endswith(("e_score_correction_bias", "expert_bias"))


@torch.no_grad()
def _fill(model: torch.nn.Module, entry: Entry, seed: int) -> None:
    """Replaces routers, experts, correction biases and constant parameters by random values, in place."""
    generator = torch.Generator().manual_seed(seed + 1000)
    # A stream of its own, so that the router seed changes nothing else.
    router_generator = torch.Generator().manual_seed(seed + 2000 + entry.router_seed)

    def normal(t: torch.Tensor, std: float, routing: bool = False) -> torch.Tensor:
        stream = router_generator if routing else generator
        return torch.randn(t.shape, generator=stream, dtype=torch.float32) * std

    done: set[int] = set()
    counts = {entry.router: 0, entry.experts: 0, entry.block: 0}
    for module in model.modules():
        kind = type(module).__name__
        if kind in counts:
            counts[kind] += 1
        if kind not in (entry.router, entry.experts):
            continue
        # Not left to the class: router modules hold zeros and experts uninitialised memory until the
        # model's own initialisation covers them, which differs between classes and versions.
        for name, p in module.named_parameters():
            if _is_correction(name):
                continue
            if kind == entry.router:
                p.copy_(normal(p, entry.router_std if p.dim() == 2 else 0.1, routing=True))
            else:
                p.copy_(normal(p, WEIGHT_STD if p.dim() == 3 else BIAS_STD))
            done.add(id(p))
    if set(counts.values()) != {entry.moe_layers}:
        raise AssertionError(f"{entry.name}: expected {entry.moe_layers} of each of {counts}")

    corrections = 0
    for name, t in (*model.named_buffers(), *model.named_parameters()):
        if _is_correction(name):
            t.copy_(normal(t, entry.correction_std, routing=True))
            done.add(id(t))
            corrections += 1
    if (corrections > 0) != (entry.correction_std > 0):
        raise AssertionError(f"{entry.name}: found {corrections} correction biases")

    for p in model.parameters():
        if id(p) in done:
            continue
        if not torch.isfinite(p).all():
            p.copy_(normal(p, BIAS_STD))
        elif p.numel() > 1 and p.min() == p.max():
            p.copy_(normal(p, BIAS_STD) if p.flatten()[0] == 0 else p * (1 + normal(p, NORM_SPREAD)))
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all() or (p.numel() > 1 and p.min() == p.max()):
            raise AssertionError(f"{entry.name}: parameter {name} is degenerate")


@torch.no_grad()
def _cast(model: torch.nn.Module, dtype: torch.dtype, like: torch.nn.Module) -> None:
    """Casts parameters and saved buffers the way loading a checkpoint in this dtype would, in place.

    Neither `model.to(dtype)` nor building the model in `dtype` gives that layout. The first also casts the
    rotary frequencies and what the class holds in fp32; the second, which is what `like` is, knows the
    tensors that a module creates with an explicit dtype but not the class's list of names to keep in fp32.
    """
    keep = tuple(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        keep += tuple(model._keep_in_fp32_modules or ())
    target = {name: t.dtype for name, t in like.state_dict().items()}
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if name in target and not any(f".{k}." in f".{name}." for k in keep):
            t.data = t.data.to(target[name])
    model.config.dtype = dtype
