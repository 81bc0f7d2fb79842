"""The module of a captured graph, which holds the model's parameters, buffers and submodules.

Passes may register constants there. They find the model's tensors in registries of the graph's own, all the way down,
so that nothing that they add is added to the model; while AOT traces, it finds the model's registries.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def attribute(root: Any, target: object) -> Any:
    """What a dotted name means on a module, None for nothing."""
    for name in str(target).split("."):
        root = getattr(root, name, None)
    return root


class Holder:
    """Gives a captured module registries of its own, and the model's back where the model itself is needed."""

    def __init__(self, gm: fx.GraphModule, model: nn.Module) -> None:
        self.gm = gm
        self.of_model = {name: vars(gm)[name] for name in REGISTRIES}
        copies: dict[int, nn.Module] = {}
        own = {name: copy.copy(vars(gm)[name]) for name in REGISTRIES}
        own["_modules"].update({name: _copied(m, copies) for name, m in model._modules.items()})
        vars(gm).update(own)

    @contextlib.contextmanager
    def as_model(self) -> Iterator[None]:
        """Within, the graph's module has the registries of the model, for AOT to name and to replace its tensors.

        Constants that passes registered are plain attributes meanwhile, no buffers of the model.
        """
        gm, own = self.gm, {name: vars(self.gm)[name] for name in REGISTRIES}
        read = {n: attribute(gm, n.target) for n in gm.graph.find_nodes(op="get_attr")}
        vars(gm).update(self.of_model)
        registered = {n: found for n, found in read.items() if attribute(gm, n.target) is not found}
        for node, found in registered.items():
            node.target = f"moefx_constant_{node.name}"
            vars(gm)[node.target] = found
        if registered:
            gm.recompile()
        try:
            with _tensors_kept(gm):
                yield
        finally:
            vars(gm).update(own)


def _copied(module: nn.Module | None, copies: dict[int, nn.Module]) -> nn.Module | None:
    """A module over the same tensors, with registries and hooks of its own, and so its submodules."""
    if module is None:
        return None
    if id(module) not in copies:
        new = copies[id(module)] = object.__new__(type(module))
        held = vars(module)
        vars(new).update(held, **{name: copy.copy(held[name]) for name in (*REGISTRIES, *HOOKS)})
        vars(new)["_modules"] = {name: _copied(m, copies) for name, m in held["_modules"].items()}
    return copies[id(module)]


@contextlib.contextmanager
def _tensors_kept(module: nn.Module) -> Iterator[None]:
    """Put every module's own parameters and buffers back.

    While AOT traces, they are replaced. What torch 2.13 puts back is wrong for a module that is registered under two
    names: the second name is restored last, and what was found under it was the first one's replacement.
    """
    registries: list[dict[str, Any]] = [r for m in module.modules() for r in (m._parameters, m._buffers)]
    before = [dict(r) for r in registries]
    try:
        yield
    finally:
        for registry, tensors in zip(registries, before, strict=True):
            registry.update(tensors)
