"""Validation of a model whose router sees later tokens, against routing each prefix by itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.train.metrics import read_metrics
from moefx.train.models import leave_balance_out, load_model
from moefx.train.parts import val_batches

from .runs import run
from .test_routing_story import CONFIG
from .toy import VOCAB, quiet, text_of, toy_config, toy_data

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::moefx.grouter.FutureTokensWarning")
K = CONFIG["num_experts_per_tok"]


def grouter(causal: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "init_std": 0.5}
    made = moefx.Grouter.from_config(vocab_size=VOCAB, num_experts=4, causal=causal, **sizes)
    made.selection_bias.copy_(torch.tensor([0.5, 0.0, -0.5, 0.0]))
    return made


def routed(tmp_path: Path, router: Any) -> Any:
    import json

    (tmp_path / "model.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 1}))
    model, ids = load_model(str(tmp_path / "model.json"), 0, VOCAB), next(toy_data().batches("train", 2, 8, 0))
    leave_balance_out(model)
    inputs = {"input_ids": ids, "labels": ids}
    return moefx.optimize(model, inputs, router=moefx.Routing(router, causal=False), codegen="eager")


@torch.no_grad()  # type: ignore[untyped-decorator]
def by_prefixes(model: nn.Module, router: Any, cfg: Any) -> float:
    """Each token routed by a call that ends with it; the model is given the choices and gates."""
    losses, opt = [], None
    model.eval()
    for ids in val_batches(toy_data(), cfg):
        found = [router.route(ids[:, : t + 1], K) for t in range(ids.shape[1])]
        given = {
            "input_ids": ids, "labels": ids, "routing_idx": torch.stack([idx[:, -1] for idx, _ in found], 1),
            "routing_gates": torch.stack([gates[:, -1] for _, gates in found], 1),
        }  # fmt: skip
        opt = opt or moefx.optimize(model, given, router=moefx.Precomputed(), codegen="eager")
        losses.append(float(opt(**given).loss))
    model.train()
    return math.fsum(losses) / len(losses)


def test_a_router_of_future_tokens_is_validated_on_prefixes_too(tmp_path: Path) -> None:
    cfg, router, console = toy_config(tmp_path / "run", steps=4, eval_every=2), grouter(causal=False), quiet()
    opt = routed(tmp_path, router)
    _, result = run(cfg, opt, console=console)
    assert [step for step, _ in result.val_prefix] == [2, 4]
    want = by_prefixes(opt.original, router, cfg)
    assert result.val_prefix[-1][1] == pytest.approx(want, abs=2e-6)
    assert abs(want - result.val[-1][1]) > 1e-4
    records = [(r["step"], r["loss_prefix"]) for r in read_metrics(cfg.out) if r["kind"] == "val"]
    assert records == result.val_prefix
    assert f"{want:.4f} with prefix-only routing" in text_of(console)
    assert len(opt.report.signatures) == 2  # train and eval: measuring compiled none of them anew
    again = run(cfg, opt, resume=True)[1]
    assert again.val_prefix == result.val_prefix


def test_a_causal_router_is_not(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path / "run", steps=2)
    _, result = run(cfg, routed(tmp_path, grouter(causal=True)))
    assert result.val_prefix == []
    assert not any("loss_prefix" in r for r in read_metrics(cfg.out))
