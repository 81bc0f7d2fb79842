"""Parameter groups: which parameter is stepped by what, decided by what it is for and printed as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from ..errors import InputError, nearest
from .heads import KINDS, splits_of
from .roles import LITE_ROLES, ROLES, roles_of
from .split import check_split

ALGORITHMS = ("muon", "soap", "adamw")
MATRIX_ROLES = frozenset({"router", "expert", "attention", "mlp"})
_CHECKPOINTED = "_checkpoint_wrapped_module."  # what torch's activation checkpointing puts into paths
# Norms on request. A decayed bias, attention sink or state-space constant drifts from what it means.
DECAYED_ROLES = frozenset({"router", "embedding", "head", "expert", "attention", "mlp"})


def param_groups(
    module: nn.Module,
    *,
    algorithm: str = "muon",
    weight_decay: float | None = None,
    decay_norms: bool = False,
    lite: bool = True,
    verbose: bool = True,
    overrides: Mapping[str, str] | None = None,
    split: str | Mapping[str, int | Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """Group every trainable parameter of a module by its role, for any optimizer of torch's interface.

    Roles come from module types, shapes and what lies beside what (the rules: `moefx.optim.roles`), never from paths.
    An original and its optimized module give the same groups, and so does what FSDP2 (`fully_shard`, first), DDP or
    torch.compile make of it. A tied head is the embedding.

    Args:
        module: a model, or what `moefx.optimize` made of it.
        algorithm: "muon", "soap" or "adamw", for the matrices of routers, experts, attention and MLPs; all other
            parameters have "adamw".
        weight_decay: of all roles but biases, "other" and norms, which have 0. None leaves it to the optimizer that
            gets the groups; a number counts whatever that one is given.
        decay_norms: decay norms too.
        lite: whether groups may use LITE. Routers, heads, biases and "other" never do.
        verbose: print the groups as a table, to stderr.
        overrides: exact path of a module or parameter -> role. Of a module, everything under it is meant: for "norm",
            "bias" and "other" all parameters, for "embedding" and "head" those with two dimensions or more, for the
            four matrix roles those with two or three. The longest path wins.
        split: which matrices are updated in blocks, for Muon and SOAP: "qkv" finds projections that fuse queries, keys
            and values, "heads" the heads of all three, by the rules of `moefx.optim.heads`; or exact path of a
            parameter -> sizes along its output features (an int for equal blocks, or one size for each).

    Returns:
        One dict per role that occurs, in the order of `ROLES`: "params" and "names" in the order of
        `named_parameters`, each parameter once, "role", "algorithm", "lite", and "weight_decay" where it is known here.
        Parameters with a split have a dict for each split, behind the role's own, with "split" as a further key.

    Raises:
        InputError: nothing to train, parameters that have no shape yet, one that is shared by two roles, an unknown
            algorithm, role or path; a split that nothing fits, or that does not fit its parameter.
    """
    _check("algorithm", algorithm, ALGORITHMS)
    if weight_decay is not None and not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise InputError(f"weight_decay is {weight_decay!r}", todo="give a finite number that is not negative")
    module = _unwrapped(module)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not trained:
        total = len(list(module.parameters()))
        raise InputError(
            f"{type(module).__name__} has no trainable parameters",
            why=f"all {total} are frozen" if total else "it has no parameters at all",
            todo="set requires_grad on those that should be trained",
        )
    lazy = [n for n, p in module.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise InputError("parameters have no shape yet", lazy[0], todo="run the model once, then group its parameters")
    roles = _resolved(module, dict(overrides or {}))
    splits = _splits(module, split, algorithm, {n for n, p in trained.items() if roles[id(p)] in MATRIX_ROLES})
    for name, sizes in splits.items():
        _require_fit(trained[name], name, sizes)
    groups = []
    for role in ROLES:
        here = [n for n, p in trained.items() if roles[id(p)] == role]
        decayed = role in DECAYED_ROLES or (role == "norm" and decay_norms)
        decay = weight_decay if decayed else 0.0
        for one in dict.fromkeys([None, *map(splits.get, here)]):
            names = [n for n in here if splits.get(n) == one]
            if names:
                groups.append(
                    {
                        "params": [trained[n] for n in names],
                        "names": [n.replace(_CHECKPOINTED, "") for n in names],
                        "role": role,
                        "algorithm": algorithm if role in MATRIX_ROLES else "adamw",
                        **({} if decay is None else {"weight_decay": float(decay)}),
                        "lite": lite and role in LITE_ROLES,
                        **({} if one is None else {"split": one}),
                    }
                )
    if verbose:
        frozen = sum(not p.requires_grad for p in module.parameters())
        _print(groups, type(module).__name__, frozen)
    return groups


def _check(what: str, name: str, known: tuple[str, ...], where: str | None = None) -> None:
    if name not in known:
        raise InputError(f"unknown {what} {name!r}", where, todo=nearest(str(name), known))


def _splits(
    module: nn.Module, split: str | Mapping[str, int | Sequence[int]] | None, algorithm: str, matrices: set[str]
) -> dict[str, int | tuple[int, ...]]:
    """Path of a parameter -> its blocks."""
    if split is None:
        return {}
    if algorithm == "adamw":
        raise InputError(f"split={split!r} with AdamW", todo="leave it out: AdamW goes element by element")
    if isinstance(split, str):
        _check("split", split, KINDS)
        found = {n: blocks for n, blocks in splits_of(module, split).items() if n in matrices}
        if not found:
            raise InputError(
                f"split={split!r} fits no matrix of {type(module).__name__}",
                why="no attention's count of heads agrees with the shape of a projection"
                + (" of queries, keys and values in one; they may not be fused" if split == "qkv" else ""),
                todo="say it by path: split={'path.weight': sizes}, or leave it out",
            )
        return found
    for name in split:
        if name not in matrices:
            todo = _nearest_path(name, matrices)
            raise InputError(f"split names {name!r}, which is no matrix that {algorithm} updates", todo=todo)
    return {n: blocks if isinstance(blocks, int) else tuple(blocks) for n, blocks in split.items()}


def _require_fit(p: nn.Parameter, name: str, sizes: int | tuple[int, ...]) -> None:
    """Raise InputError for blocks of neither dimension: the optimizer's layout says which has the output features."""
    try:
        check_split(p, name, sizes, "out_in")
    except InputError:
        with suppress(InputError):
            return check_split(p, name, sizes, "in_out")
        raise


def _unwrapped(module: nn.Module) -> nn.Module:
    """What DistributedDataParallel or torch.compile wrap, and the original of an optimized module.

    An optimized module is one that keeps its parameters and children in the original's registries.
    """
    inner = module._modules.get("_orig_mod")
    if isinstance(module, DistributedDataParallel):
        inner = module.module
    if isinstance(inner, nn.Module):
        return _unwrapped(inner)
    original = getattr(module, "original", None)
    shares = isinstance(original, nn.Module) and original._modules is module._modules
    return original if shares and isinstance(original, nn.Module) else module


def _resolved(module: nn.Module, overrides: dict[str, str]) -> dict[int, str]:
    """id of a parameter -> its one role, whatever the number of paths that lead to it."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    inferred, forced = roles_of(module), _forced(module, parameters, overrides)
    seen: dict[int, dict[str, str]] = {}
    chosen: dict[int, dict[str, str]] = {}
    for name, p in parameters.items():
        seen.setdefault(id(p), {}).setdefault(inferred[name], name)
        if name in forced:
            chosen.setdefault(id(p), {}).setdefault(forced[name], name)
    roles = {}
    for key, found in seen.items():
        of = chosen.get(key, found)
        if len(of) > 1 and key not in chosen:
            of.pop("other", None)  # a place that says nothing contradicts nothing
            if set(of) == {"embedding", "head"}:
                of.pop("head")
        if len(of) > 1:
            (_, first), *_ = of.items()
            raise InputError(
                "a parameter is shared by two roles",
                first,
                why=", ".join(f"{name} is {role!r}" for role, name in of.items()),
                todo=f"choose one with overrides={{{first!r}: role}}" if key not in chosen else "give one override",
            )
        (roles[key],) = of
    return roles


def _forced(module: nn.Module, parameters: Mapping[str, nn.Parameter], overrides: dict[str, str]) -> dict[str, str]:
    """Path of a parameter -> role, for all that an override reaches."""
    modules = {path for path, _ in module.named_modules(remove_duplicate=False)}
    forced: dict[str, str] = {}
    for path in sorted(overrides, key=lambda p: (len(p.split(".")) if p else 0, p)):
        role = overrides[path]
        _check("role", role, ROLES, f"overrides[{path!r}]")
        if path not in modules and path not in parameters:
            raise InputError(
                f"overrides names {path!r}, which is neither a module nor a parameter",
                todo=_nearest_path(path, modules | set(parameters)),
            )
        low, high = (2, 3) if role in MATRIX_ROLES else (2, 99) if role in ("embedding", "head") else (0, 99)
        reached = [n for n in parameters if not path or n == path or n.startswith(path + ".")]
        fitting = [n for n in reached if low <= parameters[n].dim() <= high]
        if not fitting:
            shapes = ", ".join(f"{n} {list(parameters[n].shape)}" for n in reached[:3]) or "no parameters"
            raise InputError(
                f"nothing under {path!r} can be {role!r}",
                why=f"it needs {low}{' or 3' if high == 3 else ' or more'} dimensions; there are: {shapes}",
            )
        forced.update(dict.fromkeys(fitting, role))
    return forced


def _nearest_path(path: str, known: set[str]) -> str:
    """The paths most like the one given; a model has too many to list them all."""
    import difflib

    close = difflib.get_close_matches(path, sorted(known), n=3, cutoff=0.3)
    return f"did you mean {close[0]!r}? near: {', '.join(close)}" if close else "see named_modules() for the paths"


def _print(groups: list[dict[str, Any]], title: str, frozen: int) -> None:
    from rich.console import Console  # here: training needs nothing that draws tables
    from rich.table import Table

    table = Table(title=f"parameter groups of {title}", caption=f"{frozen} frozen tensors left out" if frozen else None)
    table.add_column("role")
    table.add_column("algorithm")
    for column in ("tensors", "parameters", "weight decay"):
        table.add_column(column, justify="right")
    table.add_column("LITE")
    if any("split" in g for g in groups):
        table.add_column("blocks", no_wrap=True)
    for g in groups:
        size = sum(p.numel() for p in g["params"])
        decay = f"{g['weight_decay']:g}" if "weight_decay" in g else "the optimizer's"
        lite = "yes" if g["lite"] else "no"
        row = [g["role"], g["algorithm"], str(len(g["params"])), f"{size:,}", decay, lite]
        if len(table.columns) > len(row):
            split = g.get("split", ())
            row.append(f"of {split}" if isinstance(split, int) else "+".join(map(str, split)))
        table.add_row(*row)
    Console(stderr=True).print(table)
