"""Optimized modules in the trainers that people have: transformers' Trainer and accelerate."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import moefx

from . import reference as ref
from .profile import nightly

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def accelerate_starts_anew() -> Any:
    """It keeps its mixed precision for the whole process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rows(n: int = 6) -> list[dict[str, Any]]:
    batch = ref.batch(n)
    return [{"input_ids": ids, "labels": ids.clone()} for ids in batch["input_ids"]]


def trained(model: Any, out: Path, **options: Any) -> tuple[list[dict[str, float]], set[str]]:
    """What Trainer logs on a model, and the files of its checkpoint."""
    args = transformers.TrainingArguments(
        output_dir=str(out), max_steps=2, per_device_train_batch_size=3, per_device_eval_batch_size=3, use_cpu=True,
        eval_strategy="steps", eval_steps=1, logging_steps=1, save_steps=2, save_only_model=True, report_to=[],
        disable_tqdm=True, seed=0, learning_rate=0.01, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(3))
    trainer.train()
    kept = [{k: r[k] for k in ("loss", "eval_loss", "grad_norm") if k in r} for r in trainer.state.log_history]
    return [r for r in kept if r], {p.name for p in (out / "checkpoint-2").iterdir()}


@pytest.mark.parametrize("options", [{}, nightly({"bf16": True})], ids=["fp32", "bf16"])
def test_the_trainer_of_transformers_does_with_it_what_it_does_with_the_original(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """By its own choice of columns, and with tied weights, which are saved once."""
    model = ref.tiny(tie_word_embeddings=True)
    opt = ref.optimize(copy.deepcopy(model))
    want, files = trained(model, tmp_path / "original", **options)
    got, mine = trained(opt, tmp_path / "optimized", **options)
    assert mine == files
    assert {"config.json", "model.safetensors"} <= files
    assert [r.keys() for r in got] == [r.keys() for r in want]
    assert {"loss", "eval_loss"} <= {k for r in got for k in r}
    for row, theirs in zip(got, want, strict=True):
        assert row == pytest.approx(theirs, rel=2e-2 if options else 1e-4)
    again = type(model).from_pretrained(tmp_path / "optimized" / "checkpoint-2")
    assert ref.error(again.lm_head.weight, opt.original.lm_head.weight) == 0
    assert not torch.equal(again.lm_head.weight, ref.tiny(tie_word_embeddings=True).lm_head.weight)


def test_it_passes_for_the_original() -> None:
    model = ref.tiny()
    opt = ref.optimize(model)
    assert isinstance(opt, transformers.PreTrainedModel)
    assert isinstance(opt, moefx.OptimizedModule)
    assert type(opt) is moefx.OptimizedModule
    assert inspect.signature(opt.forward) == inspect.signature(model.forward)
    assert repr(opt).startswith("OptimizedModule(")


def test_a_forward_that_is_assigned_runs_in_the_place_of_the_modules_own() -> None:
    """As accelerate does for mixed precision; copies have it, and it calls the copy."""
    import accelerate

    model = ref.tiny()
    opt = ref.optimize(model)
    plain = opt(**ref.batch()).loss.detach()
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(opt)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**ref.batch()).loss.detach()
    assert "forward" not in model.__dict__
    for module in (prepared, copy.deepcopy(prepared), prepared.eval()):
        got = module(**ref.batch()).loss.detach()
        assert abs(float(got - want)) < abs(float(got - plain))
    twin = copy.deepcopy(prepared)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert float(twin(**ref.batch()).logits.abs().max()) == 0
    assert float(prepared(**ref.batch()).logits.abs().max()) > 0


def through(**kwargs: Any) -> Any:
    """An assigned forward."""
    return "mine", kwargs["input_ids"]


def test_an_assigned_method_is_pickled() -> None:
    opt = ref.optimize(ref.tiny())
    opt.forward = through
    assert pickle.loads(pickle.dumps(opt))(**ref.batch())[0] == "mine"
    del opt.forward
    assert opt(**ref.batch()).loss > 0
    opt.state_dict = lambda: {"mine": opt.original.state_dict()}
    assert opt.state_dict().keys() == {"mine"}
    assert "state_dict" not in opt.original.__dict__
