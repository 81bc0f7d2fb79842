"""How a dialect op is registered: a schema, one implementation that asks the kernel registry, a fake, autograd.

The lower-level `torch.library.Library` is used rather than `custom_op`: its call costs a third (10 against 30
microseconds), which a layer with few tokens notices. All ops are functional: none mutates an argument or returns a view
of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moefx.kernels import registry

LIB = torch.library.Library("moefx", "DEF")
Fn = Callable[..., Any]


def dense(t: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous. An empty one counts as that whatever its strides are, and reductions leave odd ones."""
    return t.contiguous() if t.numel() else t.new_empty(t.shape)


def define(
    name: str,
    schema: str,
    *,
    reference: Fn,
    fake: Fn,
    check: Fn | None = None,
    backward: Fn | None = None,
    setup: Fn | None = None,
    codes: bool = False,
) -> Fn:
    """Register `moefx::name`. `reference` is the readable definition and the provider of last resort on any device.

    `check(*args)` looks at shapes and dtypes and raises before a provider or the fake runs. Every output is contiguous,
    as fakes say it is: compiled code would misread an output that followed its input's strides. An op of `codes` has
    outputs as its providers lay them out, which is as `kernels.layout` says, in fakes too. `setup(ctx, inputs,
    output)` and `backward(ctx, *grads)` follow `torch.library.register_autograd`; the backward must itself be made of
    dialect and ATen ops, so that a joint graph shows it.
    """
    LIB.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    registry.register(name, "reference", lambda *_: True)(reference)

    def run(*args: Any) -> Any:
        if check is not None:
            check(*args)
        out = registry.dispatch(name, *args)
        if codes:
            return out if isinstance(out, torch.Tensor) else tuple(out)
        return dense(out) if isinstance(out, torch.Tensor) else tuple(map(dense, out))

    def checked_fake(*args: Any) -> Any:
        if check is not None:
            check(*args)
        return fake(*args)

    LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moefx::{name}", checked_fake, lib=LIB)
    if backward is not None:
        torch.library.register_autograd(f"moefx::{name}", backward, setup_context=setup, lib=LIB)
    op: Fn = getattr(torch.ops.moefx, name)
    return op


def alone(t: torch.Tensor) -> torch.Tensor:
    """A view of an operand that is differentiated as if it depended on no other."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def autocast(name: str, floating: Callable[[tuple[Any, ...], torch.dtype], tuple[Any, ...]]) -> None:
    """Under autocast, cast operands with `floating(args, dtype)` and run in that dtype, as matrix products do."""
    for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):

        def run(*args: Any, _device: str = device) -> Any:
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
                torch._C.DispatchKey.AutocastCUDA
            )
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return getattr(torch.ops.moefx, name)(*floating(args, torch.get_autocast_dtype(_device)))

        LIB.impl(name, run, key)
