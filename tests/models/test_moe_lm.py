"""The language model of every idiom: it learns, is restored, is causal, and follows from its seed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moefx.models.moe_lm import IDIOMS, MoELM, rotated

SAME = [name for name in IDIOMS if name != "G"]


def small(idiom: str, **options: Any) -> MoELM:
    return MoELM(23, 16, 8, 2, 2, 4, 2, idiom, **options)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("idiom", IDIOMS)
def test_a_model_learns_and_is_restored(idiom: str, ids: Tensor) -> None:
    model = small(idiom)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids)["loss"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(losses[0] - math.log(23)) < 0.1
    assert losses[-1] < losses[0] - 0.2
    other = small(idiom, seed=1)
    assert not torch.equal(other(ids)["logits"], model(ids)["logits"])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids)["logits"], model(ids)["logits"])


@pytest.mark.parametrize("idiom", IDIOMS)
def test_what_a_tracer_makes_of_it(idiom: str) -> None:
    layer, x_TH = IDIOMS[idiom](16, 8, 3, 2), torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    if idiom in ("A3", "A4", "A5", "A6", "D2"):  # Python reads the routing: a loop over, a test of, or .numpy() on it
        with pytest.raises(RuntimeError, match=r"data-dependent|numpy"):
            torch.export.export(layer, (x_TH,), strict=False)
        return
    traced = torch.export.export(layer, (x_TH,), strict=False).module()
    for x in (x_TH, x_TH.flip(1)):
        torch.testing.assert_close(traced(x), layer(x))


def test_the_seed_alone_makes_the_weights(ids: Tensor) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    want = small("A2", bias=True)(ids)["logits"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for idiom in SAME:
        torch.testing.assert_close(small(idiom, bias=True)(ids)["logits"], want, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(small("A2", bias=True, seed=1)(ids)["logits"], want, atol=1e-3)


def test_the_model_is_causal_and_its_labels_are_shifted(ids: Tensor) -> None:
    model = small("C")
    out = model(ids, labels=ids)
    assert set(out) == {"loss", "logits"}
    assert set(model(ids)) == {"logits"}
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 23
    logits = model(changed)["logits"]
    torch.testing.assert_close(logits[:, :5], out["logits"][:, :5])
    assert not torch.allclose(logits[:, 5:], out["logits"][:, 5:])
    logp = out["logits"].log_softmax(-1)
    picked = [logp[b, t, ids[b, t + 1]] for b in range(2) for t in range(8)]
    torch.testing.assert_close(out["loss"], -torch.stack(picked).mean())
    labels = ids.clone()
    labels[:, 1:8] = -100
    torch.testing.assert_close(model(ids, labels)["loss"], -(picked[7] + picked[15]) / 2)


def test_rotary_positions_are_relative() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 6, 8)
    scores_TT = (rotated(q) @ rotated(k).transpose(-2, -1))[0, 0]
    for t in range(1, 6):
        torch.testing.assert_close(scores_TT[t, t], scores_TT[0, 0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(scores_TT[t, t - 1], scores_TT[1, 0], rtol=1e-6, atol=1e-6)
    assert abs(float(scores_TT[1, 0] - scores_TT[0, 1])) > 1e-3


def test_model_arguments() -> None:
    with pytest.raises(ValueError, match="unknown idiom 'Z'; use one of A1, A2"):
        small("Z")
    with pytest.raises(ValueError, match="multiple of 2"):
        MoELM(23, 18, 8, 1, 4, 4, 2, "A1")
    assert small("F", capacity=2).layers[0].moe.capacity == 2
