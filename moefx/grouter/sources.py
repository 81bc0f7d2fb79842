"""Teachers and data as the command line names them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from ..errors import InputError, first_line
from ..packages import optional
from ..train.aside import CHECKPOINTS, OPTIMIZED
from ..train.checkpoint import MANIFEST, MODEL, latest, safetensors, safetensors_error
from ..train.data import BYTES, TAIL, TokenDataset, open_dataset
from ..train.models import load_model


def load_teacher(folder: str | Path, model: str = "default") -> nn.Module:
    """A finished model: the folder of a transformers model, or the `--out` folder of a `moefx train` run.

    Args:
        model: for a run: what was given to it as --model; a run keeps weights, not how the model was built.

    Raises:
        InputError: neither is there, or the weights are of another model.
        CheckpointError: the run has no checkpoint.
        MissingPackageError: transformers or safetensors is not installed.
    """
    path = Path(folder)
    if (path / OPTIMIZED / CHECKPOINTS).is_dir():
        return _from_run(latest(path / OPTIMIZED / CHECKPOINTS), model)
    if not (path / "config.json").is_file():
        raise InputError(
            "no teacher in this folder",
            where=str(path),
            why="it has neither a config.json nor the checkpoints of a run",
            todo="name a local transformers model, or the --out folder of `moefx train`; nothing is downloaded",
        )
    auto = optional("transformers", "to load this teacher", "hf").AutoModelForCausalLM
    try:
        teacher: nn.Module = auto.from_pretrained(path, local_files_only=True)
    except Exception as e:  # every architecture has its own ways to fail
        raise InputError(
            "transformers cannot load this teacher", where=str(path), why=f"{type(e).__name__}: {first_line(e)}"
        ) from e
    return teacher.eval()


def load_data(paths: Sequence[Path], vocab_size: int, seq: int | None) -> TokenDataset:
    """Token data for a vocabulary: text files and folders of them (read as bytes), one .bin file with its sidecar
    (moefx/train/data.py), or one .npy file of ids; no path is the embedded text. The last 1/20 is held out.

    Args:
        seq: tokens that either split must have at least; None for any number.

    Raises:
        InputError: unreadable data, no file in a folder, ids outside of the vocabulary, or text for a vocabulary that
            is not of bytes.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        if not found:  # no files at all would mean the embedded text, which was not asked for
            raise InputError(
                "there is no file in a data folder",
                where=str(path),
                todo="name text files, or leave the option out for the built-in text",
            )
        files += found
    ids = [f for f in files if f.suffix == ".npy"]
    if ids and len(files) > 1:
        raise InputError(
            f"{len(files)} data files, one of them a .npy file of ids",
            where=str(ids[0]),
            todo="give one .npy file, or only text files",
        )
    if ids:
        data = _from_npy(files[0], vocab_size)
    else:
        data = open_dataset(files)
        if not any(f.suffix == ".bin" for f in files) and vocab_size != BYTES:
            raise InputError(
                f"text is read as bytes, {BYTES} ids, and the vocabulary has {vocab_size}",
                where=data.name,
                todo="tokenise the text with the model's tokenizer and give a .bin or .npy file of ids",
            )
    data.check(seq=seq, model_vocab=vocab_size)
    return data


def _from_run(checkpoint: Path, model: str) -> nn.Module:
    teacher = load_model(model)
    try:
        tensors = safetensors().load_file(checkpoint / MODEL)
        aliases = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["aliases"]
        teacher.load_state_dict({**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}, strict=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, safetensors_error()) as e:
        raise InputError(
            "the run's checkpoint does not fit the teacher",
            where=str(checkpoint),
            why=first_line(e),
            todo="give --teacher-model as the run's --model",
        ) from e
    return teacher.eval()


def _from_npy(file: Path, vocab_size: int) -> TokenDataset:
    try:
        ids = np.load(file, mmap_mode="r")
    except Exception as e:  # numpy reads the head of a file as Python text, which fails in many ways
        raise InputError(
            "a data file cannot be read", where=str(file), why=first_line(e), todo="write it with numpy.save"
        ) from e
    if not isinstance(ids, np.ndarray):  # an archive under this name
        raise InputError("a data file is no single array", where=str(file), todo="write it with numpy.save")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
        raise InputError(
            "not a file of token ids", where=str(file), why=f"it holds {ids.dtype} of shape {ids.shape}",
            todo="save a one-dimensional array of integers",
        )  # fmt: skip
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InputError(f"token id {bad} is outside of a vocabulary of {vocab_size}", where=str(file))
    cut = len(ids) - len(ids) // TAIL
    return TokenDataset(ids[:cut], ids[cut:], vocab_size, str(file))
