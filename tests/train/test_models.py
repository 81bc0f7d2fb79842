"""What `--model` accepts, and what it says about the rest."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moefx.errors import InputError, MissingPackageError
from moefx.routing import vocab_size_of
from moefx.train.models import default_config, default_model, leave_balance_out, load_model

from .toy import same_bits, weights

TINY = {
    "model_type": "qwen3_moe",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_file(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**TINY, **changes}))
    return path


def test_default_model_is_a_moe_with_its_balancing_loss() -> None:
    pytest.importorskip("transformers")
    model = default_model(seed=0)
    config: Any = model.config
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (4, 8, 2)
    assert vocab_size_of(model) == 256
    assert model.training
    ids = torch.arange(32).reshape(2, 16)
    out = model(input_ids=ids, labels=ids)
    assert len(out.router_logits) == 4
    assert out.aux_loss > 0
    plain = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, plain + config.router_aux_loss_coef * out.aux_loss)
    assert vocab_size_of(default_model(vocab_size=300)) == 300


def test_the_seed_alone_decides_the_weights() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, other = load_model("default", seed=3), load_model("default", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same_bits(weights(first), weights(load_model("default", seed=3)))
    assert not same_bits(weights(first), weights(other))


def test_configuration_file_or_its_directory(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = config_file(tmp_path / "config.json")
    for spec in (str(path), str(tmp_path)):
        model = load_model(spec, vocab_size=256)
        config: Any = model.config
        assert type(model).__name__ == "Qwen3MoeForCausalLM"
        assert vocab_size_of(model) == 300  # its own, not that of the data
        assert config.output_router_logits
        assert not config.use_cache
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("stated", [True, False])
def test_a_configuration_that_states_its_balance_loss_keeps_it(tmp_path: Path, stated: bool) -> None:
    pytest.importorskip("transformers")
    model: Any = load_model(str(config_file(tmp_path / "config.json", output_router_logits=stated)))
    assert model.config.output_router_logits is stated
    assert leave_balance_out(model) is stated
    assert model.config.output_router_logits is False
    assert not leave_balance_out(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no model_type"),
        ("{}", "has no model_type"),
        ('{"model_type": "qwen3_moo"}', "knows no model_type 'qwen3_moo'.*\n.*\n.*qwen3_moe"),
        ('{"model_type": "vit"}', "cannot build a language model"),
        (json.dumps({**TINY, "num_hidden_layers": "many"}), "refused|cannot build"),
    ],
)
def test_bad_configuration(tmp_path: Path, content: str, message: str) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(path))
    assert caught.value.where == str(path)
    assert caught.value.todo


def test_missing_configuration(tmp_path: Path) -> None:
    for spec, where in (("gone.json", "gone.json"), (str(tmp_path), str(tmp_path / "config.json"))):
        with pytest.raises(InputError, match="cannot be read") as caught:
            load_model(spec)
        assert caught.value.where == where


def test_transformers_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    config = config_file(tmp_path / "config.json")
    for build in (default_config, default_model, lambda: load_model("default"), lambda: load_model(str(config))):
        with pytest.raises(MissingPackageError, match="transformers is needed") as caught:
            build()
        assert "moefx[hf]" in str(caught.value.todo)


def test_factory_from_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "factory_good.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Embedding(7, 2)).eval()\nvalue = 3\n"
    )
    path = list(sys.path)
    first, second = load_model("factory_good:make", seed=1), load_model("factory_good:make", seed=1)
    assert same_bits(weights(first), weights(second))
    assert first.training
    assert vocab_size_of(first) is None
    assert sys.path == path


@pytest.mark.parametrize(
    ("source", "attribute", "message"),
    [
        ("def make(): pass", "mkae", "has no 'mkae'.*\n.*\n.*did you mean 'make'"),
        ("make = 3", "make", "cannot be called"),
        ("def make(): return 3", "make", "no nn.Module\n.*\n.*returned a int"),
        ("def make(size): pass", "make", "factory failed.*\n.*\n.*missing 1 required"),
        ("def make():\n  raise ValueError('no luck')", "make", r"\(.*factory_bad_4.py:2\)\n.*ValueError: no luck"),
        ("import no_such_module_at_all", "make", "a module that factory_bad_5 imports was not found"),
        ("x = \n", "make", r"importing factory_bad_6 failed\n.*factory_bad_6.py:1\)\n.*SyntaxError"),
        ("\n\nraise RuntimeError('bad day')", "make", r"factory_bad_7.py:3\)\n.*RuntimeError: bad day"),
    ],
)
def test_bad_factory(tmp_path: Path, source: str, attribute: str, message: str, request: pytest.FixtureRequest) -> None:
    names = ["mkae", "= 3", "return 3", "size", "no luck", "no_such", "x =", "bad day"]
    number = next(i for i, n in enumerate(names) if n in source or n == attribute)
    (tmp_path / f"factory_bad_{number}.py").write_text(source)
    with pytest.raises(InputError, match=message):
        load_model(f"factory_bad_{number}:{attribute}")


def test_missing_factory_module() -> None:
    for spec in ("no_such_module_anywhere:make", "no_such_package.inner:make"):
        with pytest.raises(InputError, match="the module of the model's factory was not found") as caught:
            load_model(spec)
        assert caught.value.where == spec


def test_anything_else() -> None:
    with pytest.raises(InputError, match="no such model: 'qwen3'") as caught:
        load_model("qwen3")
    assert "never downloaded" in str(caught.value.todo)


def test_vocabulary_of_nested_configurations() -> None:
    class Text:
        vocab_size = 11

    class Outer:
        text_config = Text()

    model = nn.Linear(1, 1)
    model.config = Outer()  # type: ignore[assignment]
    assert vocab_size_of(model) == 11
