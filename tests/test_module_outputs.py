"""What a model returns comes back as it is: the same structure, the same tensors in it, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import moefx
from moefx import compat

from . import reference as ref

pytest.importorskip("transformers")
Tensor = torch.Tensor


class Running(ref.Norm):
    """Returns the buffer that it reads and then updates, as the backward needs it before the update."""

    def forward(self, x: Tensor) -> Any:
        y = self.moe(x) * (self.mean.clone() + 1)
        self.mean.lerp_(x.detach().mean((0, 1)), 0.25)
        return y, self.mean


class Named(ref.Block):
    """One tensor under two names, behind and in front of others, and again in a container."""

    def forward(self, x: Tensor) -> Any:
        y = self.moe(x)
        return {"last_hidden_state": y, "loss": y.square().mean(), "none": None, "hidden_states": (x, y, y[0])}


class Pair(ref.Block):
    """The same loss twice and nothing else."""

    def forward(self, x: Tensor) -> Any:
        y = self.moe(x).square().mean()
        return y, y


class Argmax(ref.Block):
    """Integers have no gradient."""

    def forward(self, x: Tensor) -> Any:
        return self.moe(x).argmax(-1)


class NoGrad(ref.Block):
    """Frozen by its own forward."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return self.moe(x)


class Detached(ref.Block):
    """A detached result beside the input itself."""

    def forward(self, x: Tensor) -> Any:
        return self.moe(x).detach(), x


def same(got: Any, want: Any) -> None:
    """The same structure with the same values, each of which has a gradient or not as in eager mode."""
    (mine, spec), (theirs, expected) = pytree.tree_flatten(got), pytree.tree_flatten(want)
    assert spec == expected
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b)
            assert a.requires_grad == b.requires_grad
        else:
            assert a == b
    # One object where eager mode returns one object.
    assert [[a is b for b in mine] for a in mine] == [[a is b for b in theirs] for a in theirs]


def test_a_buffer_that_is_updated_and_returned_is_the_buffer_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor's partition, which keeps the buffer and computes what is made of it again; run without its compiler.
    monkeypatch.setattr(compat, "inductor_compile", lambda gm, **_: compat.boxed(gm))
    model, other, x = Running(), Running(), ref.hidden()
    opt = ref.optimize(model, (x,), codegen="inductor")
    assert ref.programs(opt)[0].clone_inputs  # this is the case that is meant
    for _ in range(2):
        ref.assert_same(ref.step(opt, (x,), lambda r: r[0].sum()), ref.step(other, (x,), lambda r: r[0].sum()))
        mean, expected = opt(x)[1], other(x)[1]
        torch.testing.assert_close(mean, expected)
        assert mean is model.mean


@pytest.mark.parametrize("cls", [Named, Pair])
def test_one_tensor_under_two_names(cls: type[ref.Block]) -> None:
    model, x = cls(), ref.hidden()
    opt = ref.optimize(model, (x,))
    same(opt(x), model(x))

    def of(out: Any) -> Tensor:
        """Every tensor with a gradient, each under all of its names."""
        leaves = [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor) and v.requires_grad]
        return sum((v.square().sum() * (i + 1) for i, v in enumerate(leaves)), torch.zeros(()))

    ref.assert_same(ref.step(opt, (x,), of), ref.step(model, (x,), of))


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("cls", [Argmax, NoGrad, Detached])
def test_outputs_without_a_gradient_have_a_graph_without_a_backward(cls: type[ref.Block], leaf: bool) -> None:
    model, x = cls(), ref.hidden().requires_grad_(leaf)
    opt = ref.optimize(model, (x,))
    assert not opt.report.to_dict()["signatures"][0]["grad"]
    got = opt(x)
    same(got, model(x))
    if cls is Detached:
        assert got[1] is x


def test_losses_need_an_output_that_has_a_gradient() -> None:
    with pytest.raises(moefx.PassError, match="no output of the model is differentiable"):
        ref.optimize(Argmax(), (ref.hidden(),), losses="sp")


def test_a_returned_view_of_the_input_has_its_gradient() -> None:
    class Views(ref.Block):
        def forward(self, x: Tensor) -> Any:
            return x.flatten(), self.moe(x).argmax(-1)

    model: nn.Module = Views()
    grads = []
    for run in (ref.optimize(model, (ref.hidden().requires_grad_(),)), model):
        x = ref.hidden().requires_grad_()
        (run(x)[0] * torch.arange(x.numel())).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_losses_reach_an_output_that_the_experts_write_themselves() -> None:
    """Nodes that passes made have no mark of their gradient; the model's outputs are known from its capture."""

    class Bare(ref.Block):
        def forward(self, x: Tensor) -> Any:
            return self.moe.experts(x, *self.moe.gate(x)[2:0:-1])

    model, x = Bare(), ref.hidden().flatten(0, 1)
    plain, heavy = (ref.step(ref.optimize(model, (x,), losses=loss), (x,), torch.sum) for loss in ((), "sp=100"))
    assert ref.error(heavy.value, plain.value) == 0
    name = "moe.experts.gate_up_proj"
    assert ref.error(heavy.grads[name], plain.grads[name]) > 1e-2
