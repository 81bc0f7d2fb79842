"""One block from end to end: run, recognise, cut, align, replay, certify."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moefx.errors import first_line

from .align import align
from .bank import Bank, find_banks
from .certify import FULL, SHORT, Case, Certificate, Refuted, beyond, own_cases, prove, under_autocast
from .explain import explain
from .fit import NoFit, fit
from .nearest import difference
from .outline import nearest_in_code
from .pattern import weights_differ
from .probe import Inputs, Seen, copy_of
from .reading import Reading
from .record import Record, has_hooks, objects, record
from .replay import Assembly, Replay, emit
from .settle import settled
from .slice import NoSlice, Program, Region, cut, drawn_inside

RUNS = ((2, 12), (3, 7), (5, 10))
FINAL = 6
_VARIANTS = 4  # ways to read a record that are tried before giving up


class NotRaised(Exception):  # noqa: N818  an answer, not a fault
    """Why a module is left as it is. `stage` counts how far it came, for choosing among reasons.

    From `FINAL` on, the modules around it need not be tried.
    """

    def __init__(self, why: str, stage: int = 0) -> None:
        super().__init__(why)
        self.stage = stage


@dataclass
class Raising:
    """A raised block: how it runs now, the proof that it computes what it did, and inputs as it is proven for."""

    idiom: str
    replay: Replay
    certificate: Certificate
    inputs: Inputs

    @property
    def assemblies(self) -> dict[str, Assembly]:
        """Expert tensors that are put together from several parameters, by the attribute that the graph reads."""
        return self.replay.assemblies


def raise_block(block: nn.Module, seen: Seen, low: torch.dtype | None = None) -> Raising:
    """Recognise the routed experts of a module and prove the raised form.

    Args:
        block: stays untouched; copies of it are run.
        seen: a call of the block, for its arguments.
        low: dtype of the autocast region that the model is called in, where the raised form is proven too. To be
            called outside of it: values are recognised as they are without.

    Raises:
        NotRaised: with what was missing, or what differed.
    """
    banks = find_banks(block)
    if not banks:
        raise NotRaised("no parameters that come once per expert")
    _refuse_hooks(block, banks)
    if (what := seen.difference()) is not None:
        raise NotRaised(f"{nearest_in_code(block)}, but it is called in several ways: with {what}", FINAL)
    own = next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)
    try:
        copied = copy_of(block)
    except Exception as e:
        raise NotRaised(f"it cannot be copied: {type(e).__name__}: {e}") from e
    inputs, runs = _read(copied, seen, banks[0])
    records = [r.record for r in runs]
    worst, nearest = NotRaised("no bank of experts explains what it computes", -1), banks[0]
    for bank in banks:
        try:
            return _raise_bank(block, copied, inputs, bank, runs, (*own_cases(own), *under_autocast(low)))
        except NotRaised as e:
            if e.stage > worst.stage:
                worst, nearest = e, bank
    # No routed sum, or one that may be a part of a larger one (stage 2): what there is instead is looked for once.
    seen_instead = difference(copied, records, nearest, carried(copied)[0]) if worst.stage in (1, 2) else None
    name, what = seen_instead or (None, str(worst))
    if "random" not in what and (drawing := drawn_inside(records[0], nearest.names)):
        what = f"random numbers are drawn among the experts ({drawing})"
    raise NotRaised(f"{nearest_to(name or idiom(records[0], nearest))}, but {what}", worst.stage) from worst


def certify_like(block: nn.Module, seen: Seen, first: Raising, low: torch.dtype | None = None) -> Raising:
    """A block that is built like one that was raised: the same program, with a (shorter) proof of its own."""
    try:
        copied, cases = copy.deepcopy(block), (*SHORT, *under_autocast(low))
        inputs = Inputs(seen, first.inputs.reading)
        proof = prove(block, copied, first.replay.forward(copied, live=True), inputs, cases)
    except Refuted as e:
        near = nearest_to(first.idiom.partition(":")[0])
        raise NotRaised(f"{near} like one that was raised, but {_for_case(e)}", 4) from e
    return Raising(first.idiom, first.replay, proof, inputs)


@dataclass
class _Run:
    record: Record
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype


def _read(copied: nn.Module, seen: Seen, bank: Bank) -> tuple[Inputs, list[_Run]]:
    """Runs on inputs of other sizes, by the first reading of what sizes mean with which the block runs at all."""
    failed: NotRaised | None = None
    for reading in Inputs(seen).readings:
        inputs = Inputs(seen, reading)
        try:
            return inputs, _runs(copied, inputs, bank)
        except NotRaised as e:
            failed = failed or e
            if not isinstance(e.__cause__, Exception):  # it ran
                break
    assert failed is not None
    raise failed


def _runs(copied: nn.Module, inputs: Inputs, bank: Bank) -> list[_Run]:
    """Runs of three sizes, one of them in float64 if the block can; the first is repeated, and has to give the same."""
    runs = []
    before = attributes(copied)
    buffers = {n: b.clone() for n, b in copied.named_buffers()}
    plan = [(RUNS[0], torch.float32), (RUNS[0], torch.float32), (RUNS[1], torch.float64), (RUNS[2], torch.float32)]
    for i, ((rows, inner), dtype) in enumerate(plan):
        seed = RUNS.index((rows, inner))
        try:
            runs.append(_run(copied, inputs, inputs.sizes(rows, inner), seed, dtype))
        except Exception as e:
            if dtype == torch.float64:
                plan.insert(i + 1, ((rows, inner), torch.float32))
                continue
            line = first_line(e)
            drawn = "random inputs and buffers" if buffers else "random inputs"
            raise NotRaised(f"it fails on {drawn} in float32: {type(e).__name__}: {line}", 1) from e
        finally:
            copied.float()
            with torch.no_grad():
                for n, b in copied.named_buffers():
                    b.copy_(buffers[n])
        now = attributes(copied)
        changed = sorted(k for k in before if now.get(k) != before[k])
        if changed:
            what = f"its forward changes the Python state {changed[0]}, and a second call may differ"
            raise NotRaised(f"{nearest_to(idiom(runs[0].record, bank))}, but {what}", 3)
    # Outputs alone: values in between may be memory that was not written yet.
    once, again = ([o.tensor.detach() for o in objects(r.record.out)] for r in runs[:2])
    if len(once) != len(again) or not all(torch.equal(a, b) for a, b in zip(once, again, strict=True)):
        what = "two runs on the same input with the same seed differ: random numbers or a state of its own"
        raise NotRaised(f"{nearest_to(idiom(runs[0].record, bank))}, but {what}", 3)
    return runs[1:]


def _run(copied: nn.Module, inputs: Inputs, sizes: Any, seed: int, dtype: torch.dtype) -> _Run:
    copied.to(dtype)
    args, kwargs = inputs.make(sizes, seed, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _Run(record(copied, args, kwargs), args, kwargs, dtype)


def _raise_bank(
    block: nn.Module, copied: nn.Module, inputs: Inputs, bank: Bank, runs: list[_Run], more: tuple[Case, ...]
) -> Raising:
    paths = {
        p: frozenset(f"{p}.{n}" for n, _ in m.named_parameters(remove_duplicate=False))
        for p, m in copied.named_modules()
        if p
    }
    limits, numbers = carried(copied)
    known: set[Reading] = set()
    options = [list(_programs(copied, r.record, bank, paths, limits, known)) for r in runs]
    shapes = [[tuple(t.tensor.shape) for t in r.record.inputs] for r in runs]
    dtypes = [r.dtype for r in runs]
    first = runs[0].record
    worst: NotRaised | None = None
    variants = range(min(_VARIANTS, *map(len, options)))
    for variant, guarded in itertools.product(variants, (False, True)):
        try:
            program = align([o[variant] for o in options], shapes, dtypes, numbers, guarded)
            if program is None:
                continue
            call = (runs[0].args, runs[0].kwargs, copied, first.out_type)
            program = settled(program, inputs, call)
            replay = emit(program, *call)
            forward = replay.forward(copied, live=True)
            proof = prove(block, copied, forward, inputs, (*FULL, *more, *beyond(copied)))
            return Raising(f"{idiom(first, bank, program)}: {replay.spec}", replay, proof, inputs)
        except NoSlice as e:
            worst = max(worst or NotRaised(str(e), 3), NotRaised(str(e), 3), key=lambda e: e.stage)
        except Refuted as e:
            worst = NotRaised(_for_case(e), 4)
    raise worst or NotRaised("nothing was found")


def _for_case(e: Refuted) -> str:
    """The text of a refutation, which begins with the case ("34 tokens, random, float32: ..") where there is one."""
    return f"for {e}" if str(e)[:1].isdigit() else str(e)


def _programs(
    copied: nn.Module, seen: Record, bank: Bank, paths: dict[str, frozenset[str]], limits: Any, known: set[Reading]
) -> Iterator[Program]:
    """Programs for one run, likeliest first; at least one, or `NotRaised`."""
    worst = NotRaised("")
    count = 0
    try:
        for found in fit(copied, seen, bank, limits, known):
            try:
                for weights in explain(seen, found):
                    try:
                        yield cut(seen, Region(found, weights), bank.names, paths)
                        count += 1
                    except NoSlice as e:
                        worst = max(worst, NotRaised(str(e), 3), key=lambda e: e.stage)
                    if count == _VARIANTS:
                        return
            except NoFit as e:
                if worst.stage < 2:
                    worst = NotRaised(weights_differ(seen, found) or str(e), 2)
            if found.last and count:
                return
    except NoFit as e:
        worst = max(worst, NotRaised(str(e), 1), key=lambda e: e.stage)
    if not count:
        raise worst


def _refuse_hooks(block: nn.Module, banks: list[Bank]) -> None:
    """Hooks on experts, on what is in them and on lists of them: these modules are not called any more."""
    names = frozenset().union(*(b.names for b in banks))
    experts: list[str] = []  # paths of modules that hold nothing but parameters of experts
    for path, module in block.named_modules():
        own = {f"{path}.{n}" for n, _ in module.named_parameters(remove_duplicate=False)} if path else set()
        if own and own <= names:
            experts.append(path)
        inside = bool(own & names) or any(path.startswith(f"{e}.") for e in experts)
        if inside and has_hooks(module):
            raise NotRaised(f"{nearest_in_code(block)}, but {path} has hooks, which would no longer run")


def carried(block: nn.Module) -> tuple[tuple[tuple[float, float], ...], list[float]]:
    """(limit, alpha) pairs for clamped activations, and all numbers that the modules and their configs carry."""
    values: dict[str, float] = {}
    numbers: set[float] = set()
    for m in block.modules():
        for source in (m.__dict__, getattr(getattr(m, "config", None), "__dict__", {})):
            for key, v in source.items():
                if type(v) in (int, float):
                    values.setdefault(key, float(v))
                    numbers.add(float(v))
    limit = next((v for k, v in values.items() if "limit" in k and v > 0), 0.0)
    alpha = next((v for k, v in values.items() if "alpha" in k and v > 0), 0.0)
    likely = [v for k, v in values.items() if "cap" in k]
    return (((limit, alpha),) if limit and alpha else ()), [*likely, *sorted(numbers)]


_TENSORS = ("_parameters", "_buffers", "_modules", "forward")


def attributes(block: nn.Module) -> dict[str, str]:
    """Plain Python state of all submodules, in a form that can be compared."""
    found = {}
    for path, m in block.named_modules():
        for key, v in m.__dict__.items():
            if key not in _TENSORS and not key.endswith("_hooks") and "_hooks_" not in key:
                found[f"{path}.{key}".lstrip(".")] = _plain(v)
    return found


def _plain(v: Any, depth: int = 0) -> str:
    if depth > 4:
        return "..."
    if isinstance(v, torch.Tensor):
        return f"tensor {v._version} {v.shape}" + (f" {v.detach().reshape(-1)[:64].tolist()}")
    if isinstance(v, dict):
        return "{" + ", ".join(f"{k}: {_plain(x, depth + 1)}" for k, x in v.items()) + "}"
    if isinstance(v, tuple | list | set | frozenset):
        return "(" + ", ".join(_plain(x, depth + 1) for x in v) + ")"
    if isinstance(v, bool | int | float | str | bytes | None):
        return repr(v)
    state = getattr(v, "__dict__", None)
    if isinstance(v, nn.Module) or callable(v) or not state:
        return type(v).__qualname__ if not callable(v) else getattr(v, "__qualname__", type(v).__qualname__)
    return f"{type(v).__qualname__} {_plain(state, depth + 1)}"


def likeness(block: nn.Module) -> Any:
    """What two blocks must have in common to be raised by one program: classes, hooks, tensors' shapes, attributes."""
    tensors = [
        (n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in (*block.named_parameters(), *block.named_buffers())
    ]
    kinds = [(n, type(m), m.training, has_hooks(m)) for n, m in block.named_modules()]
    index = {
        k: v for k, v in attributes(block).items() if not re.search(r"(^|\.)(layer_idx|layer_id|layer_number)$", k)
    }
    return (tuple(tensors), tuple(kinds), tuple(sorted(index.items())))


def nearest_to(name: str) -> str:
    """The beginning of a reason."""
    return f"nearest to {'a ' if name in ('loop over experts', 'padded buffer') else ''}{name}"


def idiom(seen: Record, bank: Bank, program: Program | None = None) -> str:
    """A name for how the block moved rows about, for people; without a program, the one that it looks most like."""
    names = {s.name for s in seen.steps}
    ops = program.ops if program else ()
    # Whether choices were dropped is known of a raised block alone.
    tokens = next((o.kwargs for o in ops if o.kind == "experts"), {"expert_choice": False, "capacity": True})
    if tokens["expert_choice"]:
        return "expert choice"
    calls = [s for s in seen.steps if s.name in ("__getitem__", "index_select", "embedding")]
    state = {o for s in calls for o in objects(s.args) if o.source == "state" and o.name in bank.names}
    gathered = any(
        len(list(objects(s.args))) > 1 and next(iter(objects(s.args))) in state and s.args[0].tensor.dim() == 3
        for s in calls
        if s.args
    )
    if gathered:
        return "gathered weights"
    if "cumsum" in names and tokens["capacity"] is not None and "einsum" in names:
        return "one-hot dispatch"
    if names & {"index_copy", "index_copy_"} or ("cumsum" in names and "bmm" in names and tokens["capacity"]):
        return "padded buffer"
    if names & {"sort", "argsort", "_grouped_mm", "grouped_mm"}:
        return "sorted rows"
    if names & {"where", "nonzero", "any"} or {"index_add_", "__setitem__"} & names:
        return "loop over experts"
    if "einsum" in names and "one_hot" in names:
        return "one-hot dispatch"
    return "every expert on every token"
