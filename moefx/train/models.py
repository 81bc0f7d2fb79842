"""The models that `moefx train` can build: a small default, a transformers configuration, or the user's own."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError, MissingPackageError, nearest
from ..packages import optional
from . import checkpoint
from .data import BYTES

OWN_BALANCE = "output_router_logits"  # of a transformers configuration: the model adds a balance loss to its loss
RUN = ("", "checkpoints", "optimized/checkpoints")  # where a folder may have its checkpoints


def default_config(vocab_size: int = BYTES) -> Any:
    """A transformers Qwen3MoeConfig of 1.8 M parameters (vocabulary 256): 4 layers, 8 experts, 2 of them active.

    `norm_topk_prob` stays at the class's default False. With True, a token whose router probabilities nearly tie swaps
    half of its expert output on a rounding error, and two correct implementations drift apart 100 times faster.
    """
    return _transformers().Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        output_router_logits=True,  # adds the load-balancing loss
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def default_model(seed: int = 0, vocab_size: int = BYTES) -> nn.Module:
    """`default_config` with random fp32 weights, in train mode. The same seed gives the same weights."""
    return _from_config(default_config(vocab_size), seed, "default")


def load_model(spec: str, seed: int = 0, vocab_size: int = BYTES) -> nn.Module:
    """Build the model that `--model` names, with random weights, in train mode. Leaves the global random state alone.

    Args:
        spec: "default"; a transformers configuration (a JSON file, or a directory with a config.json); or
            "module:factory", a callable without arguments that returns an nn.Module.
        seed: of the weights.
        vocab_size: of the data; the default model takes it over, other models have their own.

    Raises:
        InputError: the spec names nothing that can be built.
        MissingPackageError: transformers is needed and not installed.
    """
    if spec == "default":
        return default_model(seed, vocab_size)
    path = Path(spec)
    if path.is_dir() or path.is_file() or path.suffix == ".json":
        return _from_config(_read_config(path / "config.json" if path.is_dir() else path), seed, spec)
    if ":" in spec:
        return _from_factory(spec, seed)
    raise InputError(
        f"no such model: {spec!r}",
        why="it is neither 'default', nor an existing configuration file or directory, nor of the form module:factory",
        todo="check the spelling; models are never downloaded",
    )


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy weights into a model: from a .safetensors file, a checkpoint, or the newest one of a folder of checkpoints,
    of a training's folder, or of the `--out` of `moefx train` (the optimized model's).

    Raises:
        CheckpointError: there are no weights in the folder.
        InputError: the file cannot be read, or is of another model.
        MissingPackageError: safetensors is not installed.
    """
    if path.is_dir():
        found = [path] if (path / checkpoint.MODEL).is_file() else []
        found += [kept[-1] for place in RUN if (kept := checkpoint.checkpoints(path / place))]
        if not found:
            raise checkpoint.CheckpointError(
                "there are no weights in this folder", where=str(path), why="it holds no checkpoint of a training",
                todo="give a .safetensors file, a checkpoint, or the --out folder of a run",
            )  # fmt: skip
        path = found[0] / checkpoint.MODEL
    try:
        checkpoint.safetensors().load_model(model, path)
    except MissingPackageError:
        raise
    except Exception as error:  # of the system, of safetensors' own, or a RuntimeError naming keys and shapes
        todo = "give the model that wrote them as the model, and its .safetensors file or checkpoint as the weights"
        raise InputError("the weights cannot be loaded", where=str(path), why=str(error), todo=todo) from error


def leave_balance_out(model: nn.Module) -> bool:
    """Switch off, in place, the balance loss that a transformers model adds to its loss. Returns whether it was on."""
    config: Any = getattr(model, "config", None)
    on = bool(getattr(config, OWN_BALANCE, False))
    if on:
        setattr(config, OWN_BALANCE, False)
    return on


def _transformers() -> Any:
    return optional("transformers", "to build this model", "hf", "give a module:factory")


def _read_config(path: Path) -> Any:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            "a model configuration cannot be read", where=str(path), why=error.strerror, todo="check the path"
        ) from error
    except ValueError as error:
        raise InputError(
            "a model configuration is not JSON", where=str(path), why=str(error), todo="give a config.json"
        ) from error
    kind = entries.get("model_type") if isinstance(entries, dict) else None
    if not isinstance(kind, str):
        raise InputError(
            "a model configuration has no model_type", where=str(path), todo='add one, such as "qwen3_moe"'
        )
    auto = _transformers().models.auto
    known = auto.configuration_auto.CONFIG_MAPPING_NAMES
    if kind not in known:
        close = ", ".join(difflib.get_close_matches(kind, known)) or "none"  # all of them would be hundreds
        raise InputError(f"transformers knows no model_type {kind!r}", where=str(path), todo=f"similar ones: {close}")
    given = {k: v for k, v in entries.items() if k != "model_type"}
    try:
        config = auto.AutoConfig.for_model(kind, **given)
    except Exception as error:  # configuration classes validate with whatever exception they like
        raise InputError(
            "a model configuration is refused", where=str(path), why=str(error), todo="correct the named field"
        ) from error
    config.use_cache = False
    if hasattr(config, OWN_BALANCE) and OWN_BALANCE not in entries:
        setattr(config, OWN_BALANCE, True)  # so that the load-balancing loss is part of the training
    return config


def _from_config(config: Any, seed: int, spec: str) -> nn.Module:
    auto = _transformers().AutoModelForCausalLM
    with _seeded(seed):
        try:
            # Master weights are fp32 whatever the configuration says; bf16 training computes under autocast.
            model: nn.Module = auto.from_config(config, dtype=torch.float32)
        except Exception as error:  # every architecture checks its own fields, in its own way
            raise InputError(
                "transformers cannot build a language model from this configuration",
                where=spec,
                why=f"{type(error).__name__}: {error}",
                todo="give the configuration of a causal language model",
            ) from error
    return model.train()


def _from_factory(spec: str, seed: int) -> nn.Module:
    module_name, _, attribute = spec.partition(":")
    with _importable(Path.cwd()):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            own = f"{module_name}.".startswith(f"{error.name}.")  # it, or a package that it lies in
            what = "the module of the model's factory" if own else f"a module that {module_name} imports"
            todo = "check the name; the current directory is searched"
            raise InputError(f"{what} was not found", where=spec, why=str(error), todo=todo) from error
        except Exception as error:  # running a module can raise anything
            where, why = _origin(spec, error)
            raise InputError(f"importing {module_name} failed", where=where, why=why, todo="correct it") from error
        factory = getattr(module, attribute, None)
        if not callable(factory):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            what = "has no" if factory is None else "has something that cannot be called as its"
            raise InputError(f"{module_name} {what} {attribute!r}", where=spec, todo=nearest(attribute, names))
        with _seeded(seed):
            try:
                model = factory()
            except Exception as error:
                where, why = _origin(spec, error)
                todo = "it is called without arguments; correct it, or name another one"
                raise InputError("the model's factory failed", where=where, why=why, todo=todo) from error
    if not isinstance(model, nn.Module):
        raise InputError(
            "the model's factory returned no nn.Module",
            where=spec,
            why=f"it returned a {type(model).__name__}",
            todo="name a callable without arguments that builds the model and returns it",
        )
    return model.train()


def _origin(spec: str, error: Exception) -> tuple[str, str]:
    """The spec with the file:line that raised, and the error as text."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = error.lineno if isinstance(error, SyntaxError) else last.lineno
    file = error.filename if isinstance(error, SyntaxError) else last.filename
    return f"{spec} ({file}:{line})", f"{type(error).__name__}: {error}"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    # A console script, unlike `python -m`, does not search the current directory.
    sys.path.insert(0, os.fspath(directory))
    try:
        yield
    finally:
        with suppress(ValueError):  # the imported module may have changed the path itself
            sys.path.remove(os.fspath(directory))
