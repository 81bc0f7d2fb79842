"""Stage 1: let the MoE blocks of a model emit `moefx.experts` while it is captured, and put everything back afterwards.

Two kinds of blocks are raised. Hand-written ones are recognised by what they compute and proven by running both
forms (`moefx.raising`); for the length of a capture the proven forward stands in for their own. Experts classes of
transformers have an interface: transformers looks the implementation of an experts class up by name at call time.
moefx registers its own for the length of a capture: it reads the layout from the flags that the class carries, and the
activation by running the module's own gate on random numbers and comparing with the dialect's kinds. Nothing is raised
on looks: a gate that matches no kind stays the module's own code between dialect ops, and a module whose layout cannot
be read is left alone and reported.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moefx.dialect.experts import ExpertsSpec
from moefx.dialect.glu import GluKind, glu_reference
from moefx.errors import InputError
from moefx.raising.block import Raising
from moefx.raising.find import Outcome, chains, raise_all, within
from moefx.raising.outline import EXPERT_NAME, outline
from moefx.raising.probe import Seen, observed, undisturbed, unlike
from moefx.raising.replay import Assembly

Tensor = torch.Tensor
ops = torch.ops.moefx
NAME = "moefx"


@dataclass(frozen=True)
class Block:
    """What became of one MoE-looking module.

    `error` is the largest relative difference that was measured between its own form and ours: of the activation for
    transformers' experts, of outputs and gradients in float32 for others, whose `certificate` tells all.
    """

    path: str
    cls: str
    raised: bool
    idiom: str | None = None
    error: float | None = None
    reason: str | None = None
    certificate: dict[str, Any] | None = None
    raising: Raising | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Row of the report."""
        return {k: v for k, v in vars(self).items() if k != "raising"}

    @property
    def assemblies(self) -> dict[str, Assembly]:
        """Parameters that the raised block has during a capture -> how each is made of its own."""
        return self.raising.assemblies if self.raising else {}


def find_blocks(model: nn.Module) -> list[Block]:
    """What can be said of a model without running it: experts with transformers' interface, and look-alikes."""
    blocks = _with_interface(model)
    inside = [b.path for b in blocks if b.raised]
    for path, module in model.named_modules():
        if is_interface(module) or any(within(path, p) for p in inside):
            continue
        if (reason := _look_alike(module)) is not None:
            blocks.append(Block(path, type(module).__qualname__, False, reason=reason))
    return blocks


def _with_interface(model: nn.Module) -> list[Block]:
    return [_inspect(path, module) for path, module in model.named_modules() if is_interface(module)]


def to_observe(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of hand-written blocks whose calls must be seen (`raising.probe.observed`) before they can be raised."""
    tries = chains(model, {path for path, m in model.named_modules() if is_interface(m)})
    return {path: model.get_submodule(path) for chain in tries for path in chain}


@contextlib.contextmanager
def raised(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    calls: dict[str, Seen] | None = None,
    live: bool = True,
    experts: Callable[[str], Callable[..., Tensor]] | None = None,
    symbolic: bool = False,
) -> Iterator[list[Block]]:
    """While active, every raisable MoE block of `model` runs dialect ops. Undone at the end, also on error.

    Args:
        args, kwargs: a call of the model, which is run once without gradients to see how its blocks are called.
        calls: what `observed` saw of them, instead.
        live: expert tensors made of several parameters are put together at every call. Otherwise, for a capture, they
            are parameters of the block for the time being (`Block.assemblies`).
        experts: from the path of a hand-written block to what it calls in the place of `moefx.experts`.
        symbolic: whether what is raised will run on inputs of other sizes without being raised again.
    """
    looks = find_blocks(model)
    blocks = [b for b in looks if is_interface(model.get_submodule(b.path))]
    tries = chains(model, {b.path for b in blocks})
    if calls is None:
        with observed({p: model.get_submodule(p) for chain in tries for p in chain}) as calls:
            if tries and (args or kwargs):
                with undisturbed(model), torch.no_grad():
                    model(*args, **(kwargs or {}))
    for seen in calls.values():
        seen.symbolic = symbolic
    with _versioned():
        outcomes = raise_all(model, tries, calls)
    blocks += [_row(o) for o in outcomes]
    near = [b.path for b in blocks]
    blocks += [b for b in looks if not any(within(b.path, p) or within(p, b.path) for p in near)]
    homes = {b.path.rpartition(".")[0] for b in blocks}  # where experts are, and their routers
    for path, module in model.named_modules():
        if not any(within(path, home) or within(home, path) for home in homes) and (reason := _selects(module)):
            blocks.append(Block(path, type(module).__qualname__, False, reason=reason))
    with _interface(model, blocks), _replaced(outcomes, live=live, experts=experts):
        yield blocks


@contextlib.contextmanager
def _versioned() -> Iterator[None]:
    """Inside `torch.inference_mode`, new tensors have version counters and may be trained all the same."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _row(o: Outcome) -> Block:
    cls = type(o.module).__qualname__
    if o.raising is None:
        return Block(o.path, cls, False, reason=outline(o.module, []) or o.reason)
    proof = o.raising.certificate
    return Block(o.path, cls, True, o.raising.idiom, proof.error, None, proof.to_dict(), o.raising)


@contextlib.contextmanager
def _replaced(
    outcomes: list[Outcome], *, live: bool, experts: Callable[[str], Callable[..., Tensor]] | None
) -> Iterator[None]:
    """The proven forwards in the place of the blocks' own."""
    done: list[tuple[nn.Module, Any, list[str]]] = []
    try:
        for o in outcomes:
            if o.raising is None:
                continue
            m, own = o.module, o.module.forward
            done.append((m, m.__dict__.get("forward"), []))
            if not live:
                for name, assembly in o.raising.assemblies.items():
                    params = [m.get_parameter(n) for n in assembly.names]
                    with _versioned():
                        whole = assembly.build(m.get_parameter).detach()
                        m._parameters[name] = nn.Parameter(whole, requires_grad=any(p.requires_grad for p in params))
                    done[-1][2].append(name)
            new = o.raising.replay.forward(m, live=live, experts=None if experts is None else experts(o.path))
            m.__dict__["forward"] = (_as_proven if live else _as_seen)(m, o.raising.inputs.seen, new, own)
        yield
    finally:
        for m, forward, names in done:
            for name in names:
                m._parameters.pop(name, None)
            m.__dict__.pop("forward", None)
            if forward is not None:
                m.__dict__["forward"] = forward


def _as_proven(module: nn.Module, seen: Seen, new: Any, own: Any) -> Any:
    """The new forward in the mode and with the constants that it was proven with, and the block's own with others."""
    modes = [m.training for m in module.modules()]

    def forward(*args: Any, **kwargs: Any) -> Any:
        same = [m.training for m in module.modules()] == modes and unlike(seen.call, (args, kwargs)) is None
        return new(*args, **kwargs) if same else own(*args, **kwargs)

    return forward


def _as_seen(module: nn.Module, seen: Seen, new: Any, own: Any) -> Any:
    """For a capture: the block's own code where an argument is there that was not there when the model ran.

    Models leave masks out that have nothing to hide, but cannot know that while they are traced. Where the model is
    given no mask, None is what the block always gets, whatever a tracer makes of it.
    """
    given, named = [v is None for v in seen.args], {k: v is None for k, v in seen.kwargs.items()}
    if not seen.hidden or True not in (*given, *named.values()):
        return new
    mine, its = new.__func__, getattr(own, "__func__", None)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if [v is None for v in args] == given and {k: v is None for k, v in kwargs.items()} == named:
            return mine(self, *args, **kwargs)
        return own(*args, **kwargs) if its is None else its(self, *args, **kwargs)

    return types.MethodType(forward, module)


@contextlib.contextmanager
def _interface(model: nn.Module, blocks: list[Block]) -> Iterator[None]:
    """Our implementation under the name by which transformers' experts are called."""
    raised_ones = [b for b in blocks if b.raised and b.raising is None]
    modules: dict[str, Any] = {b.path: model.get_submodule(b.path) for b in raised_ones}
    if not modules:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # A config may be shared with modules that are not raised, with another model, and with sub-configs that its setter
    # writes to: the raised modules get a copy to read the name from, and nobody else sees it.
    idioms = {b.path: b.idiom for b in raised_ones}
    ours = {id(m.config): _hooked(m.config) for m in modules.values()}
    before = [(m, {k: m.__dict__[k] for k in ("config", "_moefx_spec") if k in m.__dict__}) for m in modules.values()]
    registry = ALL_EXPERTS_FUNCTIONS._global_mapping
    outer = registry.get(NAME)  # set when one `raised` is inside another
    ALL_EXPERTS_FUNCTIONS.register(NAME, _emit)
    try:
        for path, module in modules.items():
            module.__dict__.update(_moefx_spec=idioms[path], config=ours[id(module.config)])
        yield
    finally:
        for module, kept in before:
            module.__dict__.pop("_moefx_spec", None)
            module.__dict__.update(kept)
        if outer is None:
            registry.pop(NAME, None)


def _hooked(config: Any) -> Any:
    """A shallow copy of a config that names our experts implementation."""
    new = copy.copy(config)
    internal = "_experts_implementation_internal"  # the public name is a setter that writes to sub-configs too
    setattr(new, internal if hasattr(new, internal) else "_experts_implementation", NAME)
    return new


def is_interface(module: nn.Module) -> bool:
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_is_expert_parallel")
    return all(hasattr(module, f) for f in flags) and hasattr(
        getattr(module, "config", None), "_experts_implementation"
    )


def _inspect(path: str, module: nn.Module) -> Block:
    cls = type(module).__qualname__
    try:
        weights = _weights(module)
        kind, error = _activation(module)
    except (AttributeError, InputError) as e:
        return Block(path, cls, False, None, None, f"its weights could not be read: {e}")
    layout = "kn" if module.is_transposed else "nk"
    post = getattr(module, "has_post_expert_norm", False)
    if kind is None or post or len({w.dtype for w in weights}) > 1:
        why = "a norm after the experts" if post else "an activation of its own" if kind is None else "mixed dtypes"
        return Block(
            path, cls, True, f"opaque | {layout}{' bias' if module.has_bias else ''}", None, f"experts with {why}"
        )
    return Block(path, cls, True, str(ExpertsSpec(kind, layout, bool(module.has_bias))), error)


def _weights(module: Any) -> list[Tensor]:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, f"{up}_bias", "down_proj", "down_proj_bias"] if module.has_bias else [up, "down_proj"]
    found = [getattr(module, n) for n in names]
    for name, w in zip(names, found, strict=True):
        if not isinstance(w, Tensor) or w.dim() != (2 if name.endswith("bias") else 3):
            raise InputError(f"{name} is no stacked tensor")
        if w.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise InputError(f"{name} is {w.dtype}, a quantized format")
    return found


def _activation(module: Any) -> tuple[GluKind | None, float | None]:
    """The dialect kind that equals the module's own gate on a probe, and the largest relative difference; (None, None)
    if none does.

    The probe covers both signs, large values (clamps act) and the neighbourhood of zero, in float64 where the module
    allows.
    """
    limit, alpha = (float(getattr(module, n, 0) or getattr(module, f"swiglu_{n}", 0) or 0) for n in ("limit", "alpha"))
    kinds = [GluKind(act, gated=module.has_gate) for act in ("silu", "gelu", "gelu_tanh", "relu", "relu2")]
    if module.has_gate:
        kinds += [GluKind(k.act, interleaved=True) for k in kinds]
        if limit and alpha:
            kinds += [GluKind("clamp", True, i, limit, alpha) for i in (True, False)]
    h = torch.linspace(-30, 30, 32 * 64, dtype=torch.float64)
    h = h[torch.randperm(h.numel(), generator=torch.Generator().manual_seed(0))].view(32, 64)
    h = torch.cat([h, h / 16, h * 1e4])
    with torch.no_grad(), torch.device("cpu"):
        try:
            want = module._apply_gate(h.clone()) if module.has_gate else module.act_fn(h.clone())
        except Exception:  # the gate needs something that a probe on the CPU does not offer: keep it as its own code
            return None, None
    for kind in kinds:
        got = glu_reference(h, None, str(kind))
        if got.shape == want.shape and torch.allclose(got, want.double(), rtol=1e-6, atol=1e-9):
            return kind, float(((got - want).abs() / (1 + want.abs())).max())
    return None, None


def _emit(module: Any, x_TH: Tensor, idx_Tk: Tensor, w_Tk: Tensor) -> Tensor:
    """What runs in place of the experts' forward during capture."""
    spec: str = module._moefx_spec
    up = module.gate_up_proj if module.has_gate else module.up_proj
    down = module.down_proj
    x = x_TH.to(up.dtype)
    if not spec.startswith("opaque"):
        weights = [up, down]
        if module.has_bias:
            bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
            weights = [up, bias, down, module.down_proj_bias]
        routed: Tensor = ops.experts(x, idx_Tk, w_Tk, weights, spec)
        return routed.to(x_TH.dtype)
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    token, order, slot, offsets = ops.plan(idx_Tk, up.shape[0], 1)
    h = ops.grouped_mm(ops.permute(ops.dispatch(x), token, slot), up, offsets)
    if module.has_bias:
        h = ops.grouped_bias(h, module.gate_up_proj_bias if module.has_gate else module.up_proj_bias, offsets)
    a = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    y = ops.grouped_mm(a.to(down.dtype), down, offsets)
    if module.has_bias:
        y = ops.grouped_bias(y, module.down_proj_bias, offsets)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    out: Tensor = ops.combine(ops.unpermute(y, token, order, slot, w_Tk))
    return out.to(x_TH.dtype)


# --- look-alikes
# ------------------------------------------------------------------------------------------------------------------


def _look_alike(module: nn.Module) -> str | None:
    """Why a module that looks like an expert bank is not raised, or None when it does not look like one."""
    name = type(module).__name__
    experts = next((n for a in ("num_experts", "moe_num_experts") if type(n := getattr(module, a, None)) is int), 0)
    stacked = [n for n, p in module._parameters.items() if p is not None and (p.dim() == 3 or _flat(name, p, experts))]
    if any(is_interface(m) for m in module.modules()):
        return None  # around experts of transformers: a list of MoE layers, say
    reason = outline(module, stacked if EXPERT_NAME.search(name) else [])
    if reason is not None:
        return reason
    if stacked and EXPERT_NAME.search(name):
        return f"stacked parameters {', '.join(stacked)}, but not called through transformers' experts interface"
    for child_name, child in module._modules.items():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and EXPERT_NAME.search(child_name) and len(child) > 1:
            kind = type(child).__name__
            return f"{len(child)} experts in {kind} {child_name!r}: a hand-written loop that was not seen running"
    return None


def _selects(module: nn.Module) -> str | None:
    """What a module chooses with top-k, where it holds no experts."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or "topk" not in code.co_names:
        return None
    if any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in module.modules()):
        return "nearest to gathered weights, but what it looks up are rows of an embedding, not experts' matrices"
    return "nearest to expert choice, but top-k picks tokens for one network: there are no experts to choose among"


def _flat(name: str, p: Tensor, experts: int) -> bool:
    """Whether a matrix of an `...Expert...` module holds the experts below each other, [E * I, H] as in DBRX."""
    return "expert" in name.lower() and p.dim() == 2 and 1 < experts < p.shape[0] and p.shape[0] % experts == 0
