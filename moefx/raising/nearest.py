"""Why a block with experts' parameters is not raised: what it computes as ordinary experts do, and the first thing not.

`fit` looks for a whole routed sum. Where there is none, its parts are looked for among the recorded rows: the first
products of experts and tokens, the activations, the outputs f_e(x_t), a sum over all experts. Rows are compared by
direction, so that weights do not matter. Which parts are missing tells the difference: those of one expert, of one
choice, of some tokens, of crowded experts, or everything after some step. Every sentence states what was found in the
records, and nothing that was not looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from moefx.dialect.glu import glu_reference

from .bank import Bank, Stack
from .choices import rows_of, sound
from .fit import TOLERANCE, residues
from .parts import MOVES, PRODUCTS, Pool, Run, Table, TooLargeError, directions, mix, roles_of, solved_tokens
from .pattern import missing
from .reading import ACTS, Evaluator, Role
from .record import Obj, Record, objects
from .slice import RANDOM

Tensor = torch.Tensor


def difference(
    block: nn.Module, records: Sequence[Record], bank: Bank, limits: tuple[tuple[float, float], ...]
) -> tuple[str | None, str] | None:
    """The first thing in which a recorded block is no MoE layer, and its idiom where that became clear on the way.

    None where it is too large to be looked at, or nothing specific was found.
    """
    evaluate = Evaluator(block)
    device = next((s.value.device for s in records[0].snaps), torch.device("cpu"))
    try:
        # Where new tensors are on the CPU by themselves, the context would only slow every call down.
        with torch.no_grad(), nullcontext() if device.type == "cpu" else torch.device(device):
            return _diagnosis([Run(r, bank, limits, evaluate) for r in records])
    except TooLargeError:
        return None


def _diagnosis(runs: Sequence[Run]) -> tuple[str | None, str] | None:
    chosen = [r.best(False) for r in runs]
    known = all(chosen)
    top = max((t for t in chosen if t), key=lambda t: t.score, default=None) if known else runs[0].best(True)
    if top is None:
        return None
    tables = [t for r in runs if (t := r.best(not known, top.reading) or r.best(not known, None)) is not None]
    if len(tables) < len(runs):
        return None
    if known and all(bool(t.outputs.all()) for t in tables) and _made_of_outputs(runs[0], tables[0], known) is None:
        return None
    # Tensors that look like a choice may be none: a sum over all experts says more.
    summed = _summed(runs)
    if summed is not None:
        return summed
    what = _difference(runs, tables, known)
    return (None, what) if what else None


def _difference(runs: Sequence[Run], tables: Sequence[Table], known: bool) -> str | None:
    prefix = "" if known else "no tensor chooses experts for tokens, and "
    if all(bool(t.outputs.all()) for t in tables):
        what = _made_of_outputs(runs[0], tables[0], known)
        return prefix + what if what else None
    if any(bool(t.outputs.any()) for t in tables):
        if not known:
            return "the outputs of some experts are there for some tokens, but no tensor says for which"
        return missing(runs, tables)
    if any(bool(t.hidden.any()) for t in tables):
        return prefix + _after_activation(runs[0], tables[0])
    if any(bool(t.first.any()) for t in tables):
        return prefix + _after_first(runs[0], tables[0])
    return prefix + _not_read(runs)


# --- a sum over all experts


def _summed(runs: Sequence[Run]) -> tuple[str, str] | None:
    """Where a sum over experts is there, though not over a known choice: which experts it counts."""
    seen = [s for r in runs if (s := _solved(r)) is not None]
    # One expert for all tokens in every run: that is its output, and no sum.
    if len(seen) < len(runs) or all(int(s.any(0).sum()) == 1 for _, s, _ in seen):
        return None
    E = runs[0].bank.experts
    counts = torch.cat([s.sum(1) for _, s, _ in seen])
    if bool((counts == E).all()):
        c = torch.cat([c for c, _, _ in seen])
        if bool(((c - c.mean()).abs() < 1e-3 * c.abs().mean()).all()):
            return (
                _EVERY,
                f"all {E} experts count for every token, with the same weight {float(c.mean()):.3g}: no choice",
            )
        sign = "above zero" if bool((c > 0).all()) else "that is not zero"
        return _EVERY, f"every expert of every token has a weight {sign}: there is no choice (top-k) among the {E}"
    low, high = int(counts.min()), int(counts.max())
    batches = [(s, shape) for _, s, shape in seen if shape is not None and shape[1] > 1]
    if len(batches) == len(seen) and all(bool((s.view(*b, E) == s.view(*b, E)[:, :1]).all()) for s, b in batches):
        what = "one expert" if high == 1 else f"{low} to {high} experts" if low < high else f"{high} experts"
        return (
            "loop over experts",
            f"in every run all tokens of a sequence have the same choice ({what}), not one of their own",
        )
    if low == high:
        return None
    per_expert = [s.sum(0) for _, s, _ in seen]
    if all(bool((p == p[0]).all()) for p in per_expert):
        share = ", ".join(f"{int(p[0])} of {len(s)}" for p, (_, s, _) in zip(per_expert, seen, strict=True))
        text = (
            f"experts choose tokens (each {share}), but no tensor [{E}, tokens per expert] of token numbers says which"
        )
        return "expert choice", text
    return "loop over experts", f"the number of experts varies from token to token ({low} to {high}): not a fixed top-k"


_EVERY = "every expert on every token"


def _solved(run: Run) -> tuple[Tensor, Tensor, tuple[int, int] | None] | None:
    """Coefficients [N, E] of the fullest sum of all experts' outputs, which are not zero, and (sequences, tokens)."""
    best: tuple[Tensor, Tensor] | None = None
    for t in run.tables:
        if not t.dense or t.z is None or t.z.shape[-1] <= t.rows.shape[1]:
            continue
        n, E, width = t.z.shape
        ys = [s for s in rows_of(run.record, n, width) if s.time >= run.start and sound(s.value)]
        ys = [s for s in ys if not run.partial(s)]
        if not ys or not sound(t.z):
            continue
        b = torch.stack([s.value.reshape(n, width).float() for s in ys], -1)
        some = torch.eye(width) if width <= 4 * E + 16 else mix(width, 4 * E + 16)
        c, fine = residues(some.T @ t.z.transpose(1, 2), some.T @ b)
        for i in (i for i, f in enumerate(fine) if f):
            counts = c[..., i].abs() > 1e-4 * c[..., i].abs().max()
            if best is None or int(counts.sum()) >= int(best[1].sum()):
                best = c[..., i], counts
    if best is None:
        return None
    shape = next((o.tensor.shape for o in run.record.inputs if o.tensor.dim() == 3), None)
    fits = shape is not None and shape[0] * shape[1] == len(best[1])
    return *best, (shape[0], shape[1]) if shape is not None and fits else None


# --- parts that are there, and what becomes of them


def _made_of_outputs(run: Run, t: Table, known: bool) -> str | None:
    """All outputs were computed; what was made of them. None if it is a weighted sum after all."""
    assert t.z is not None
    n, k, width = t.z.shape
    whose = "every choice's output f_e(x_t)" if known else "every expert's output for every token"
    late = [s for s in run.record.snaps if s.time >= run.start and sound(s.value)]
    z = directions(t.z)
    for s in late:
        if k > 1 and s.value.shape[-1:] == (k * width,) and s.value.numel() == n * k * width:
            other = directions(s.value.reshape(n, k, width).float())
            if bool((torch.minimum((z - other).norm(dim=-1), (z + other).norm(dim=-1)) < TOLERANCE).all()):
                return f"the {k} outputs of a token are concatenated to {k * width} features, not added"
    ys = [s for s in late if s.value.shape[-1] == width and s.value.numel() == n * width]
    flat = [s.value.reshape(n, width).float() for s in ys]
    x = t.x.value.reshape(n, -1).float()
    if flat and x.shape[-1] == width > k + 1:
        c, fine = residues(torch.cat([t.z, x[:, None]], 1).transpose(1, 2), torch.stack(flat, -1))
        for i in (i for i, f in reversed(list(enumerate(fine))) if f):
            own, direct = c[:, :k, i].sum(1), c[:, k, i]
            if bool((direct.abs() > TOLERANCE).all()):
                if bool(((own - direct).abs() <= 1e-3 * own.abs().max()).all()):
                    return "every expert adds its input to its output, a residual: f(x) + x is what is summed"
                return "the sum of the outputs holds a multiple of the token itself as well"
    flat = [f for s, f in zip(ys, flat, strict=True) if not run.partial(s)]
    for name, extreme in (("largest", t.z.amax(1)), ("smallest", t.z.amin(1))):
        if k > 1 and any(bool((f - extreme).norm() <= TOLERANCE * extreme.norm()) for f in flat):
            return f"of a token's {k} outputs the {name} is taken in every feature, not a weighted sum"
    if flat and width > k:
        solved, right = solved_tokens(t.z, flat)
        if solved == n:
            return None
        if n > right >= max(2, n // 2):
            return f"a weighted sum of a token's outputs is there for {right} of {n} tokens, and not for the others"
    return f"{whose} is there, but what is made of them is no weighted sum"


def _after_activation(run: Run, t: Table) -> str:
    assert t.reading is not None
    makers = _makers(run, t.reading.down.stack)
    act = t.reading.kind.act
    if names := sorted(makers & RANDOM):
        return (
            f"between the activation ({act}) and the second product comes {names[0]}: random numbers inside the experts"
        )
    last = " or ".join(sorted(makers)) if makers else ""
    detail = f"; what it is multiplied with was made by {last}" if last else ""
    return f"the experts are ordinary up to their activation ({act}), but the second product is another one{detail}"


def _after_first(run: Run, t: Table) -> str:
    """Only first products were found."""
    for role, there in t.roles.items():
        chain = _chain(run, t, role) if bool(there.any()) else None
        if chain is not None:
            return chain
    missing = [s for s in run.bank.matrices if s not in {r.stack for r in t.roles}]
    if len(run.bank.matrices) == 3 and len(missing) == 2:
        return f"of a gate and an up projection only one reads the token: {next(iter(t.roles)).stack}"
    return (
        "the experts are ordinary up to their first product, but what follows is no activation that the dialect has "
        f"({', '.join(ACTS)}, and clamp with numbers that the module carries)"
    )


def _chain(run: Run, t: Table, role: Role) -> str | None:
    """Whether another matrix of the bank multiplies the activated first product, and is not the last."""
    n, k = t.rows.shape
    experts = t.rows.reshape(-1)
    rows = t.x.value.reshape(n, 1, -1).float().expand(n, k, -1).flatten(0, 1)
    h = run.product(role, rows, experts)
    for act in ACTS:
        a = glu_reference(h, None, f"plain {act}")
        if not bool(run.pool.holds(a).any()):
            continue
        for other in roles_of(run.bank, a.shape[-1]):
            if other.stack != role.stack and bool(run.pool.holds(run.product(other, a, experts)).any()):
                count = len(run.bank.matrices)
                return (
                    f"its experts are deep: {count} matrices one after another ({role.stack}, {act}, {other.stack}, ..)"
                )
        return f"the activation ({act}) is there, but no other matrix of the experts multiplies it"
    return None


def _not_read(runs: Sequence[Run]) -> str:
    """The experts' matrices never meet a token's own row."""
    mixed = [m for r in runs if (m := _mixtures(r)) is not None]
    if mixed and all(mixed):
        return "what the experts read are mixtures of several tokens of a sequence, not single tokens"
    run = runs[0]
    makers: set[str] = set()
    for s in run.bank.matrices:
        makers |= _makers(run, s)
    detail = f" (what they are multiplied with was made by {' or '.join(sorted(makers))})" if makers else ""
    return (
        f"no matrix of the experts is multiplied with a token's row as it was before the first of them was read{detail}"
    )


def _operands(run: Run, stack: Stack) -> list[tuple[Obj, int]]:
    """What is multiplied with a stack's matrices, and at which step."""
    made: set[Obj] = set()
    found: list[tuple[Obj, int]] = []
    for step in run.record.steps:
        given = objects((step.args, step.kwargs))
        mine = [o for o in given if o in made or (o.source == "state" and o.name in stack.names)]
        if mine and step.name in MOVES:
            made.update(objects(step.out))
        elif mine and step.name in PRODUCTS:
            others = [o for o in given if o not in mine and o.source != "state" and o.tensor.is_floating_point()]
            found += [(o, step.index) for o in others[:1]]
    return found


def _makers(run: Run, stack: Stack) -> set[str]:
    """Names of the functions that made what is multiplied with a stack, moves of rows aside."""
    names = set()
    for obj, _ in _operands(run, stack):
        while obj.source == "step":
            step = run.record.steps[obj.step]
            before = [o for o in objects((step.args, step.kwargs)) if o.tensor.is_floating_point()]
            if step.name not in MOVES or not before:
                names.add(step.name)
                break
            obj = before[0]
    return names


def _mixtures(run: Run) -> bool | None:
    """Whether the experts' inputs are sums of several rows of one sequence; None where rows are too few to tell."""
    x = next((o.tensor.detach() for o in run.record.inputs if o.tensor.dim() == 3), None)
    if x is None or not 1 < x.shape[1] < x.shape[2]:
        return None
    width = x.shape[2]
    bases = torch.linalg.qr(x.transpose(1, 2).double()).Q  # [B, H, T]
    tokens = Pool([s for s in run.record.snaps if s.obj.source == "input"])
    values = {s.obj: s.value for s in run.record.snaps}
    seen = False
    for stack in run.bank.matrices:
        for obj, _ in _operands(run, stack):
            v = values.get(obj)
            if v is None or v.shape[-1] != width or not v.numel():
                continue
            r = directions(v.reshape(-1, width).double())
            left = (r - r @ bases @ bases.transpose(1, 2)).norm(dim=-1).amin(0)
            if bool((left > 1e-4).any()) or bool(tokens.holds(r).any()):
                return False
            seen = True
        if seen:
            return True
    return None
