"""Checkpoints that are complete or absent, and that say what is wrong with them.

A checkpoint is a directory `step-00000100` with `model.safetensors` (weights and buffers), `state.pt` (optimizer,
random states, history) and `manifest.json` (step, sizes and SHA-256 of both files, aliases of tied tensors, the run's
fingerprint). It is written under a temporary name, flushed to disk and renamed; whatever carries the final name was
written to its end.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import MoefxError, first_line
from ..files import flush as _flush
from ..module import OptimizedModule
from ..packages import optional
from .rng import get_rng_state, set_rng_state
from .state import collect, kind_of

FORMAT = 1
MODEL, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
IDENTITY = ("model", "recipe", "losses", "router", "passes", "identity")  # see `compare`
_SHOWN = 8  # differences; another kind of model has dozens
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes))  # exactly: numpy's float64 is a float, too
_KINDS = {"step": int, "fingerprint": dict, "files": dict, "tensors": dict, "aliases": dict}  # of a manifest
_NAME = re.compile(r"step-(\d{8,})(\.old)?")


class CheckpointError(MoefxError):
    """A checkpoint is missing, damaged, or belongs to another run."""


@dataclass(frozen=True)
class Restored:
    """What `load` read besides the weights: the number of completed steps, and the history given to `save`.

    `compared` is False where the checkpoint does not say of which model, recipe and losses it is (see `compare`).
    """

    step: int
    history: dict[str, Any]
    compared: bool = True


def save(
    directory: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    fingerprint: Mapping[str, Any],
    history: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint below `directory` and delete all but the newest `keep`.

    Args:
        step: completed optimizer steps.
        fingerprint: JSON values that a run must share to continue from here.
        history: tensors, numbers, strings, lists and dicts of them.

    Returns:
        The directory of the checkpoint. Tensors that share all their memory (tied weights) are stored once.

    Raises:
        CheckpointError: the disk refused, or the state holds objects that could not be read back; older checkpoints are
            untouched.
        MissingPackageError: safetensors is not installed.
    """
    writer = safetensors()
    refused = safetensors_error()
    final = directory / f"step-{step:08d}"
    temporary = directory / f".tmp-{final.name}-{os.getpid()}"
    tensors, aliases, extra = collect(model)
    precision = model.precision_state() if isinstance(model, OptimizedModule) else None  # of delayed scaling
    state = {
        "optimizer": optimizer.state_dict(), "rng": get_rng_state(), "history": dict(history), "extra": extra,
        "precision": precision,
    }  # fmt: skip
    for part in ("optimizer", "history", "extra", "precision"):
        _require_plain(state[part], part)
    try:
        for left in directory.glob(".tmp-step-*"):  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        writer.save_file(tensors, temporary / MODEL)
        torch.save(state, temporary / STATE)
        manifest = {
            "format": FORMAT,
            "step": step,
            "fingerprint": dict(fingerprint),
            "files": {name: _digest(temporary / name) for name in (MODEL, STATE)},
            "tensors": {name: kind_of(t) for name, t in tensors.items()},
            "aliases": aliases,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if (
            final.exists()
        ):  # a rename does not replace a directory; the old one stays loadable until the new one is in place
            old = final.with_name(final.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        temporary.rename(final)
        _flush(directory)
    except (OSError, RuntimeError, refused) as error:  # torch and safetensors have kinds of their own
        why = getattr(error, "strerror", None) or first_line(error, type(error).__name__)
        todo = "free disk space or choose another output directory; earlier checkpoints are intact"
        raise CheckpointError("a checkpoint could not be written", where=str(final), why=why, todo=todo) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(final.with_name(final.name + ".old"), ignore_errors=True)
    for stale in checkpoints(directory)[: -max(keep, 1)]:
        if stale != final:
            shutil.rmtree(stale, ignore_errors=True)
    return final


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints below `directory`, the newest (highest step) last; empty when there are none."""
    found = []
    for path in directory.glob("step-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found)]


def latest(directory: Path) -> Path:
    """The newest checkpoint below `directory`. Raises CheckpointError when there is none."""
    found = checkpoints(directory)
    if not found:
        why = "it holds no checkpoint" if directory.is_dir() else "the directory does not exist"
        todo = "start without resuming, or name the directory of the run to continue"
        raise CheckpointError("there is no checkpoint to resume from", where=str(directory), why=why, todo=todo)
    return found[-1]


def check(path: Path) -> None:
    """Raise CheckpointError where the checkpoint is missing or damaged, as `load` does; reads all of it, for hashes."""
    _verify_files(path, _read_manifest(path))


def load(path: Path, *, model: nn.Module, optimizer: Optimizer, fingerprint: Mapping[str, Any]) -> Restored:
    """Restore weights, optimizer and the random states of the process from one checkpoint directory.

    Everything is read and compared before the first tensor is written: after an error, model and optimizer are as they
    were.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint belongs to another model or configuration.
        MissingPackageError: safetensors is not installed.
    """
    manifest = _read_manifest(path)
    _verify_files(path, manifest)
    compared = compare(path, manifest["fingerprint"], fingerprint)
    present, present_aliases, present_extra = collect(model)
    _compare_tensors(path, manifest, present, present_aliases)
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        tensors = safetensors().load_file(path / MODEL)
    except MoefxError:
        raise
    except (
        Exception
    ) as error:  # both readers raise many kinds; the hashes matched, so the file was written in another way
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if set(state["extra"]) != set(present_extra):
        why = f"extra state of {sorted(state['extra'])} was stored, the model has {sorted(present_extra)}"
        raise CheckpointError("the checkpoint belongs to another model", where=str(path), why=why, todo=_OTHER_MODEL)
    compiled = model if isinstance(model, OptimizedModule) else None
    precision = state.get("precision")  # None where a model that is not compiled was stored
    if compiled and precision and precision["length"] != (kept := compiled.precision_state()["length"]):
        why = f"delayed scaling of the last {precision['length']} steps was stored, the model's recipe keeps {kept}"
        raise CheckpointError("the checkpoint is of another recipe", where=str(path), why=why, todo=_OTHER_RUN)
    full = {**tensors, **{alias: tensors[name] for alias, name in manifest["aliases"].items()}, **state["extra"]}
    try:
        # The optimizer goes first: it checks its groups before it changes anything.
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise CheckpointError(
            "the checkpoint's optimizer does not fit", where=str(path), why=str(error), todo=_OTHER_RUN
        ) from error
    model.load_state_dict(full)
    if compiled and precision:
        compiled.load_precision_state(precision)
    set_rng_state(state["rng"])
    return Restored(step=int(manifest["step"]), history=dict(state["history"]), compared=compared)


_OTHER_MODEL = "build the model that wrote it, or start a new run in another directory"
_OTHER_RUN = "resume with the settings of the run that wrote it, or start a new run in another directory"


def _require_plain(value: Any, place: str) -> None:
    """Refuse at once what `torch.load(weights_only=True)` would refuse when the checkpoint is needed."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _require_plain(entry, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            _require_plain(entry, f"{place}[{index}]")
    elif not (value is None or isinstance(value, Tensor) or type(value) in _PLAIN):
        raise CheckpointError(
            "the state of the run cannot be saved",
            where=place,
            why=f"it holds a {type(value).__name__}; only tensors, numbers, strings and containers of them are stored",
            todo="keep other objects out of state_dict and out of the optimizer's param_groups",
        )


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError("a checkpoint is missing", where=str(path), todo="name an existing checkpoint directory")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{MANIFEST}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        todo = "load it with the version of moefx that wrote it"
        raise CheckpointError(
            "a checkpoint has another format", where=str(path), why=f"format {found!r}, expected {FORMAT}", todo=todo
        )
    absent = set(_KINDS) - set(manifest)
    if absent:
        raise _damaged(path, f"{MANIFEST} lacks {', '.join(sorted(absent))}")
    for name, kind in _KINDS.items():
        if type(manifest[name]) is not kind:
            why = f"{name} is a {type(manifest[name]).__name__}, not a {kind.__name__}"
            raise _damaged(path, f"{MANIFEST}: {why}")
    unknown = [a for a, n in manifest["aliases"].items() if not isinstance(n, str) or n not in manifest["tensors"]]
    if unknown:
        raise _damaged(path, f"{MANIFEST}: {unknown[0]} is tied to no tensor")
    return manifest


def _verify_files(path: Path, manifest: Mapping[str, Any]) -> None:
    for name in (MODEL, STATE):
        expected = manifest["files"].get(name)
        if not (path / name).is_file():
            raise _damaged(path, f"{name} is missing")
        size = (path / name).stat().st_size
        if not isinstance(expected, dict) or size != expected.get("bytes"):
            written = expected.get("bytes") if isinstance(expected, dict) else "an unknown number of"
            raise _damaged(path, f"{name} has {size} bytes, {written} were written")
        if _digest(path / name) != expected:
            raise _damaged(path, f"the SHA-256 of {name} differs from the manifest's")


def _damaged(path: Path, why: str) -> CheckpointError:
    others = [p for p in checkpoints(path.parent) if p != path]
    todo = (
        f"delete it to resume from {others[-1].name}"
        if others
        else "it cannot be used; start the run again without resuming"
    )
    return CheckpointError("a checkpoint is damaged", where=str(path), why=why, todo=todo)


def compare(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Compare two fingerprints of runs. Values are JSON; of dicts in them, what differs is named by its path.

    Entries of `IDENTITY` are compared where both have any: earlier versions stored none of them, and who trains with
    `train` alone may leave them out.

    Returns:
        Whether all that is wanted could be compared.

    Raises:
        CheckpointError: something differs.
    """
    stored, wanted = dict(stored), json.loads(json.dumps(wanted))  # tuples become lists, as they did in the file
    said, asked = ({k for k in IDENTITY if k in side} for side in (stored, wanted))
    if not (said and asked):
        stored, wanted = ({k: v for k, v in side.items() if k not in IDENTITY} for side in (stored, wanted))
    old, new = dict(_flat(stored)), dict(_flat(wanted))
    differing = [k for k in (*new, *(k for k in old if k not in new)) if old.get(k) != new.get(k)]
    if differing:
        why = ", ".join(f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in differing[:_SHOWN])
        why += f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise CheckpointError(
            "the checkpoint belongs to a run with other settings", where=str(path), why=why, todo=_OTHER_RUN
        )
    return bool(said) or not asked


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _compare_tensors(
    path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> None:
    stored = {**manifest["tensors"], **{a: manifest["tensors"].get(n) for a, n in manifest["aliases"].items()}}
    present = {n: kind_of(t) for n, t in tensors.items()}
    present.update({a: present[n] for a, n in aliases.items()})
    differing = [n for n in (*present, *(n for n in stored if n not in present)) if stored.get(n) != present.get(n)]
    if differing:
        shown = [f"{n}: stored {stored.get(n, 'nothing')}, model {present.get(n, 'nothing')}" for n in differing[:3]]
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        why = "; ".join(shown) + more
        raise CheckpointError("the checkpoint belongs to another model", where=str(path), why=why, todo=_OTHER_MODEL)
    if manifest["aliases"] != dict(aliases):
        # Loading untied weights into tied ones would keep whichever came last.
        why = f"tied when stored: {manifest['aliases'] or 'nothing'}; tied now: {dict(aliases) or 'nothing'}"
        raise CheckpointError(
            "the checkpoint ties other weights than the model",
            where=str(path),
            why=why,
            todo=_OTHER_MODEL,
        )


def _digest(file: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def safetensors() -> Any:
    """The `safetensors.torch` module. Raises MissingPackageError when it is not installed."""
    return optional("safetensors.torch", "for checkpoints", "train")


def safetensors_error() -> type[Exception]:
    """What safetensors raises for a file that it cannot read or write; it is no OSError."""
    found: type[Exception] = optional("safetensors", "for checkpoints", "train").SafetensorError
    return found
