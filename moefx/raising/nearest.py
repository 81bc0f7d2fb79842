"""Why a block with experts' parameters is not raised: what it computes as ordinary experts do, and the first thing not.

`fit` looks for a whole routed sum. Where there is none, its parts are looked for among the recorded rows: the first
products of experts and tokens, the activations, the outputs f_e(x_t), a sum over all experts. Rows are compared by
direction, so that weights do not matter. Which parts are missing tells the difference: those of one expert, of one
choice, of some tokens, of crowded experts, or everything after some step. Every sentence states what was found in the
records, and nothing that was not looked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from moefx.dialect.glu import glu_reference

from .bank import Bank, Stack
from .fit import (
    ACTS,
    TOLERANCE,
    Evaluator,
    Fit,
    Reading,
    Role,
    _distinct,
    _residues,
    _sizes,
    choices,
    first_use,
    readings,
    rows_of,
)
from .record import Obj, Record, Snap, objects
from .slice import RANDOM

Tensor = torch.Tensor
_LARGEST = 1 << 26  # elements of rows to search
_WORK = 2e10  # operations for one product of tokens and experts
_NARROW = 4  # rows of fewer features have the direction of another one too easily
_PRODUCTS = frozenset(
    "linear matmul __matmul__ __rmatmul__ bmm mm einsum addmm baddbmm _grouped_mm grouped_mm bilinear mul".split()
)
_MOVES = frozenset(
    "view reshape __getitem__ index_select transpose permute flatten unflatten unsqueeze squeeze expand contiguous T mT "
    "gather to float clone chunk split unbind stack cat index_copy index_copy_ __setitem__ repeat repeat_interleave "
    "expand_as view_as movedim swapaxes narrow select index_put index_put_ embedding detach type_as".split()
)


class _TooLarge(Exception):
    pass


class _Pool:
    """The rows that a block computed, along any axis of the right size, found again by direction."""

    def __init__(self, snaps: Sequence[Snap]) -> None:
        self.values = [s.value for s in snaps if s.value.is_floating_point() and s.value.dim() > 1]
        self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _rows(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        if width not in self.kept:
            axes = [(v, a) for v in self.values for a in range(v.dim()) if v.shape[a] == width]
            if sum(v.numel() for v, _ in axes) > _LARGEST:
                raise _TooLarge
            rows = torch.cat([torch.zeros(0, width), *(v.movedim(a, -1).reshape(-1, width).float() for v, a in axes)])
            rows = _directions(rows[rows.norm(dim=-1) > 1e-8])
            at = torch.randn(width, generator=torch.Generator().manual_seed(0))
            keys, order = (rows @ at).abs().sort()
            self.kept[width] = rows[order], keys, at
        return self.kept[width]

    def holds(self, wanted: Tensor) -> Tensor:
        """For each row of `wanted` [R, D] whether a multiple of it was computed."""
        rows, keys, at = self._rows(wanted.shape[-1])
        found = torch.zeros(len(wanted), dtype=torch.bool)
        if not len(rows) or wanted.shape[-1] < _NARROW:
            return found
        q = _directions(wanted.float())
        place = torch.searchsorted(keys, (q @ at).abs().contiguous())
        for step in range(-4, 4):
            other = rows[(place + step).clamp(0, len(rows) - 1)]
            found |= torch.minimum((other - q).norm(dim=-1), (other + q).norm(dim=-1)) < TOLERANCE
        return found


def _directions(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-30)


@dataclass
class _Table:
    """What a run computed of the experts `rows` [N, k] of its tokens: first products, activations, outputs, all [N, k]."""

    x: Snap
    rows: Tensor
    dense: bool
    roles: dict[Role, Tensor]
    first: Tensor
    hidden: Tensor
    outputs: Tensor
    reading: Reading | None = None
    z: Tensor | None = None  # f_e(x_t), [N, k, D]

    @property
    def score(self) -> tuple[float, ...]:
        return tuple(float(t.float().mean()) for t in (self.outputs, self.hidden, self.first))


@dataclass
class _Run:
    """A record with what was found in it."""

    record: Record
    bank: Bank
    limits: tuple[tuple[float, float], ...]
    evaluate: Evaluator
    tables: list[_Table] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = first_use(self.record, self.bank)
        self.pool = _Pool([s for s in self.record.snaps if s.time >= self.start])
        for n, width in _sizes(self.record, self.bank):
            xs = [s for s in _distinct(rows_of(self.record, n, width)) if s.time < self.start][-8:]
            options = [(rows, False) for _, rows in choices(self.record, n, self.bank.experts)][:6]
            every = torch.arange(self.bank.experts).expand(n, -1)
            for x in xs:
                for rows, dense in (*options, (every, True)):
                    self.tables += self._look(x, rows, width, dense)

    def product(self, role: Role, x: Tensor, experts: Tensor) -> Tensor:
        """Rows [R, in] times the matrices of their experts, one expert at a time: large ones are never gathered."""
        if 2.0 * len(x) * math.prod(role.stack.shape[1:]) > _WORK:
            raise _TooLarge
        out = x.new_zeros(len(x), role.stack.shape[2 if role.turned else 1])
        for e in experts.unique():
            own = experts == e
            w = self.evaluate._rows(role.stack, e[None])[0]
            out[own] = x[own] @ (w if role.turned else w.T)
            if role.bias is not None:
                out[own] += self.evaluate._rows(role.bias, e[None])[0]
        return out

    def _look(self, x: Snap, rows: Tensor, width: int, dense: bool) -> Iterator[_Table]:
        n, k = rows.shape
        experts = rows.reshape(-1)
        flat = x.value.reshape(n, 1, width).float().expand(n, k, width).reshape(-1, width)
        made: dict[Role, Tensor] = {}
        found: dict[Role, Tensor] = {}
        for role in _roles(self.bank, width):
            made[role] = self.product(role, flat, experts)
            there = self.pool.holds(made[role]).view(n, k)
            if bool(there.any()):
                found[role] = there
        none = torch.zeros(n, k, dtype=torch.bool)
        best = max(found.values(), key=lambda f: int(f.sum()), default=none)
        yield _Table(x, rows, dense, found, best, none, none)
        for reading in readings(self.bank, width, self.limits):
            if any(r not in found for r in reading.up):
                continue
            h = torch.cat([made[r] for r in reading.up], -1)
            if reading.swapped:
                pairs = reading.kind.interleaved
                h = h.unflatten(-1, (-1, 2) if pairs else (2, -1)).flip(-1 if pairs else -2).flatten(-2)
            first = torch.stack([found[r] for r in reading.up]).all(0)
            a = glu_reference(h, None, str(reading.kind))
            hidden = self.pool.holds(a).view(n, k)
            z, outputs = None, none
            if bool(hidden.any()):
                z = self.product(reading.down, a, experts)
                outputs, z = self.pool.holds(z).view(n, k), z.view(n, k, -1)
            yield _Table(x, rows, dense, found, first, hidden, outputs, reading, z)

    def best(self, *, dense: bool, reading: Reading | None = None) -> _Table | None:
        """The table of which most was computed."""
        some = [t for t in self.tables if t.dense == dense and (reading is None or t.reading == reading)]
        return max(some, key=lambda t: t.score, default=None)


def _roles(bank: Bank, width: int) -> Iterator[Role]:
    for s in bank.matrices:
        for turned in (False, True):
            if s.shape[1 if turned else 2] == width:
                out = s.shape[2 if turned else 1]
                for bias in (None, *(v for v in bank.vectors if v.shape[1] == out)):
                    yield Role(s, turned, bias)


def difference(
    block: nn.Module, records: Sequence[Record], bank: Bank, limits: tuple[tuple[float, float], ...]
) -> tuple[str | None, str] | None:
    """The first thing in which a recorded block is no MoE layer, and its idiom where that became clear on the way.

    None where it is too large to be looked at, or nothing specific was found.
    """
    evaluate = Evaluator(block)
    try:
        runs = [_Run(r, bank, limits, evaluate) for r in records]
        summed = _summed(runs)
        if summed is not None:
            return summed
        chosen = [r.best(dense=False) for r in runs]
        known = all(chosen)
        top = max((t for t in chosen if t), key=lambda t: t.score, default=None) if known else runs[0].best(dense=True)
        if top is None:
            return None
        tables = [t for r in runs if (t := r.best(dense=not known, reading=top.reading)) is not None]
        return None, _difference(runs, tables, known)
    except _TooLarge:
        return None


def _difference(runs: Sequence[_Run], tables: Sequence[_Table], known: bool) -> str:
    prefix = "" if known else "no tensor chooses experts for tokens, and "
    if all(bool(t.outputs.all()) for t in tables):
        return prefix + _made_of_outputs(runs[0], tables[0], known)
    if any(bool(t.outputs.any()) for t in tables):
        if not known:
            return "the outputs of some experts are there for some tokens, but no tensor says for which"
        return _missing(runs, tables)
    if any(bool(t.hidden.any()) for t in tables):
        return prefix + _after_activation(runs[0], tables[0])
    if any(bool(t.first.any()) for t in tables):
        return prefix + _after_first(runs[0], tables[0])
    return prefix + _not_read(runs)


# --- a sum over all experts


def _summed(runs: Sequence[_Run]) -> tuple[str, str] | None:
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
            return _EVERY, f"all {E} experts count for every token, with the same weight {float(c.mean()):.3g}: no choice"
        sign = "above zero" if bool((c > 0).all()) else "that is not zero"
        return _EVERY, f"every expert of every token has a weight {sign}: there is no choice (top-k) among the {E}"
    low, high = int(counts.min()), int(counts.max())
    batches = [(s, shape) for _, s, shape in seen if shape is not None and shape[1] > 1]
    if len(batches) == len(seen) and all(bool((s.view(*b, E) == s.view(*b, E)[:, :1]).all()) for s, b in batches):
        what = "one expert" if high == 1 else f"{low} to {high} experts" if low < high else f"{high} experts"
        return "loop over experts", f"all tokens of a sequence have the same choice ({what}): none is made per token"
    if low == high:
        return None
    per_expert = [s.sum(0) for _, s, _ in seen]
    if all(bool((p == p[0]).all()) for p in per_expert):
        share = ", ".join(f"{int(p[0])} of {len(s)}" for p, (_, s, _) in zip(per_expert, seen, strict=True))
        text = f"experts choose tokens (each {share}), but no tensor [{E}, tokens per expert] of token numbers says which"
        return "expert choice", text
    return "loop over experts", f"the number of experts varies from token to token ({low} to {high}): not a fixed top-k"


_EVERY = "every expert on every token"


def _mix(width: int, smaller: int) -> Tensor:
    """Random combinations of features, for systems that have more equations than they need."""
    return torch.randn(width, smaller, generator=torch.Generator().manual_seed(0)) * width**-0.5


def _solved(run: _Run) -> tuple[Tensor, Tensor, tuple[int, int] | None] | None:
    """Coefficients [N, E] of the fullest sum of all experts' outputs, which are not zero, and (sequences, tokens)."""
    best: tuple[Tensor, Tensor] | None = None
    for t in run.tables:
        if not t.dense or t.z is None or t.z.shape[-1] <= t.rows.shape[1]:
            continue
        n, E, width = t.z.shape
        ys = [s for s in rows_of(run.record, n, width) if s.time >= run.start]
        if not ys:
            continue
        b = torch.stack([s.value.reshape(n, width).float() for s in ys], -1)
        mix = torch.eye(width) if width <= 4 * E + 16 else _mix(width, 4 * E + 16)
        c, fine = _residues(mix.T @ t.z.transpose(1, 2), mix.T @ b)
        for i in (i for i, f in enumerate(fine) if f):
            counts = c[..., i].abs() > 1e-4 * c[..., i].abs().max()
            if best is None or int(counts.sum()) > int(best[1].sum()):
                best = c[..., i], counts
    if best is None:
        return None
    shape = next((o.tensor.shape for o in run.record.inputs if o.tensor.dim() == 3), None)
    fits = shape is not None and shape[0] * shape[1] == len(best[1])
    return *best, (shape[0], shape[1]) if shape is not None and fits else None


# --- parts that are there, and what becomes of them


def _made_of_outputs(run: _Run, t: _Table, known: bool) -> str:
    """All outputs were computed, and no weighted sum of them."""
    assert t.z is not None
    n, k, width = t.z.shape
    whose = "every choice's output f_e(x_t)" if known else "every expert's output for every token"
    late = [s for s in run.record.snaps if s.time >= run.start and s.value.is_floating_point()]
    z = _directions(t.z)
    for s in late:
        if k > 1 and s.value.shape[-1] == k * width and s.value.numel() == n * k * width:
            other = _directions(s.value.reshape(n, k, width).float())
            if bool((torch.minimum((z - other).norm(dim=-1), (z + other).norm(dim=-1)) < TOLERANCE).all()):
                return f"the {k} outputs of a token are concatenated to {k * width} features, not added"
    ys = [s for s in late if s.value.shape[-1] == width and s.value.numel() == n * width]
    flat = [s.value.reshape(n, width).float() for s in ys]
    x = t.x.value.reshape(n, -1).float()
    if flat and x.shape[-1] == width > k + 1:
        c, fine = _residues(torch.cat([t.z, x[:, None]], 1).transpose(1, 2), torch.stack(flat, -1))
        for i in (i for i, f in reversed(list(enumerate(fine))) if f):
            own, direct = c[:, :k, i].sum(1), c[:, k, i]
            if bool((direct.abs() > TOLERANCE).all()):
                if bool(((own - direct).abs() <= 1e-3 * own.abs().max()).all()):
                    return "every expert adds its input to its output, a residual: f(x) + x is what is summed"
                return "the sum of the outputs holds a multiple of the token itself as well"
    for name, extreme in (("largest", t.z.amax(1)), ("smallest", t.z.amin(1))):
        if k > 1 and any(bool((f - extreme).norm() <= TOLERANCE * extreme.norm()) for f in flat):
            return f"of a token's {k} outputs the {name} is taken in every feature, not a weighted sum"
    if flat and width > k:
        right = _solved_tokens(t.z, flat)
        if n > right >= max(2, n // 2):
            return f"a weighted sum of a token's outputs is there for {right} of {n} tokens, and not for the others"
    return f"{whose} is there, but what is made of them is no weighted sum"


def _solved_tokens(z: Tensor, ys: Sequence[Tensor]) -> int:
    """For how many tokens the best of `ys` is a sum of z [N, k, D]."""
    a = z.transpose(1, 2).double()
    b = torch.stack(ys, -1).double()
    left = (a @ torch.linalg.lstsq(a, b).solution - b).norm(dim=1)
    size = b.norm(dim=1)
    return int(((left <= TOLERANCE * size) & (size > 1e-6 * size.amax(0))).sum(0).max())


def _after_activation(run: _Run, t: _Table) -> str:
    assert t.reading is not None
    makers = _makers(run, t.reading.down.stack)
    act = t.reading.kind.act
    if names := sorted(makers & RANDOM):
        return f"between the activation ({act}) and the second product comes {names[0]}: random numbers inside the experts"
    last = " or ".join(sorted(makers)) if makers else ""
    detail = f"; what it is multiplied with was made by {last}" if last else ""
    return f"the experts are ordinary up to their activation ({act}), but the second product is another one{detail}"


def _after_first(run: _Run, t: _Table) -> str:
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


def _chain(run: _Run, t: _Table, role: Role) -> str | None:
    """Whether another matrix of the bank multiplies the activated first product, and is not the last."""
    n, k = t.rows.shape
    experts = t.rows.reshape(-1)
    rows = t.x.value.reshape(n, 1, -1).float().expand(n, k, -1).flatten(0, 1)
    h = run.product(role, rows, experts)
    for act in ACTS:
        a = glu_reference(h, None, f"plain {act}")
        if not bool(run.pool.holds(a).any()):
            continue
        for other in _roles(run.bank, a.shape[-1]):
            if other.stack != role.stack and bool(run.pool.holds(run.product(other, a, experts)).any()):
                count = len(run.bank.matrices)
                return f"its experts are deep: {count} matrices one after another ({role.stack}, {act}, {other.stack}, ..)"
        return f"the activation ({act}) is there, but no other matrix of the experts multiplies it"
    return None


def _not_read(runs: Sequence[_Run]) -> str:
    """The experts' matrices never meet a token's own row."""
    mixed = [m for r in runs if (m := _mixtures(r)) is not None]
    if mixed and all(mixed):
        return "what the experts read are mixtures of several tokens of a sequence, not single tokens"
    run = runs[0]
    makers: set[str] = set()
    for s in run.bank.matrices:
        makers |= _makers(run, s)
    detail = f" (what they are multiplied with was made by {' or '.join(sorted(makers))})" if makers else ""
    return f"no matrix of the experts is multiplied with a token's row as it was before the first of them was read{detail}"


def _operands(run: _Run, stack: Stack) -> list[tuple[Obj, int]]:
    """What is multiplied with a stack's matrices, and at which step."""
    made: set[Obj] = set()
    found: list[tuple[Obj, int]] = []
    for step in run.record.steps:
        given = objects((step.args, step.kwargs))
        mine = [o for o in given if o in made or (o.source == "state" and o.name in stack.names)]
        if mine and step.name in _MOVES:
            made.update(objects(step.out))
        elif mine and step.name in _PRODUCTS:
            others = [o for o in given if o not in mine and o.source != "state" and o.tensor.is_floating_point()]
            found += [(o, step.index) for o in others[:1]]
    return found


def _makers(run: _Run, stack: Stack) -> set[str]:
    """Names of the functions that made what is multiplied with a stack, moves of rows aside."""
    names = set()
    for obj, _ in _operands(run, stack):
        while obj.source == "step":
            step = run.record.steps[obj.step]
            before = [o for o in objects((step.args, step.kwargs)) if o.tensor.is_floating_point()]
            if step.name not in _MOVES or not before:
                names.add(step.name)
                break
            obj = before[0]
    return names


def _mixtures(run: _Run) -> bool | None:
    """Whether the experts' inputs are sums of several rows of one sequence; None where rows are too few to tell."""
    x = next((o.tensor.detach() for o in run.record.inputs if o.tensor.dim() == 3), None)
    if x is None or not 1 < x.shape[1] < x.shape[2]:
        return None
    width = x.shape[2]
    bases = torch.linalg.qr(x.transpose(1, 2).double()).Q  # [B, H, T]
    tokens = _Pool([s for s in run.record.snaps if s.obj.source == "input"])
    values = {s.obj: s.value for s in run.record.snaps}
    seen = False
    for stack in run.bank.matrices:
        for obj, _ in _operands(run, stack):
            v = values.get(obj)
            if v is None or v.shape[-1] != width or not v.numel():
                continue
            r = _directions(v.reshape(-1, width).double())
            left = (r - r @ bases @ bases.transpose(1, 2)).norm(dim=-1).amin(0)
            if bool((left > 1e-4).any()) or bool(tokens.holds(r).any()):
                return False
            seen = True
        if seen:
            return True
    return None


# --- some outputs that are there, and others that are not


@dataclass
class _Pairs:
    """All (token, expert) pairs of all runs, flat."""

    run: Tensor
    token: Tensor
    place: Tensor  # in its sequence
    choice: Tensor
    expert: Tensor
    load: Tensor  # rows of its expert in its run
    first: Tensor
    good: Tensor


def _pairs(runs: Sequence[_Run], tables: Sequence[_Table]) -> _Pairs:
    parts = []
    for i, (run, t) in enumerate(zip(runs, tables, strict=True)):
        n, k = t.rows.shape
        token = torch.arange(n)[:, None].expand(n, k)
        shape = next((o.tensor.shape for o in run.record.inputs if o.tensor.dim() == 3), None)
        place = token % shape[1] if shape is not None and shape[0] * shape[1] == n else token
        load = torch.bincount(t.rows.reshape(-1), minlength=run.bank.experts)[t.rows]
        one = (torch.full((n, k), i), token, place, torch.arange(k).expand(n, k), t.rows, load, t.first, t.outputs)
        parts.append([v.reshape(-1) for v in one])
    return _Pairs(*(torch.cat(list(v)) for v in zip(*parts, strict=True)))


def _missing(runs: Sequence[_Run], tables: Sequence[_Table]) -> str:
    """The rule behind the outputs that are not there: one that explains all of them, or several one after another."""
    p = _pairs(runs, tables)
    everything = torch.ones_like(p.good)
    rules: list[Callable[[Tensor], tuple[str, Tensor] | None]] = [
        lambda alive: _by_expert(p, alive, runs, tables),
        lambda alive: _by_choice(p, alive),
        lambda alive: _by_load(p, alive),
        lambda alive: _by_token(p, alive),
    ]
    alone = [f for rule in rules if (f := rule(everything)) and bool((f[1] == ~p.good).all())]
    if alone:
        return "; or, as the same outputs are missing then: ".join(text for text, _ in alone)
    alive, said = everything, []
    for rule in rules:
        found = rule(alive)
        if found is not None:
            said.append(found[0])
            alive = alive & ~found[1]
    left = int((alive & ~p.good).sum())
    if not said:
        return (
            f"of {len(p.good)} outputs f_e(x_t) in {len(runs)} runs {left} are not there, by no rule in experts, "
            f"choices, tokens or loads{_where(p, ~p.good)}"
        )
    return "; and ".join([*said, f"{left} other outputs are missing"] if left else said)


def _where(p: _Pairs, bad: Tensor) -> str:
    """How far a part that differs is ordinary."""
    there = p.first[bad]
    if bool(there.all()):
        return " (their first products are ordinary, what follows is not)"
    return "" if bool(there.any()) else " (from the first product on: the input is another one)"


def _groups(key: Tensor, p: _Pairs, alive: Tensor, least: int) -> Tensor | None:
    """The pairs in groups of equal `key` of which no output is there; None if there are no such or no other groups."""
    size = torch.bincount(key[alive], minlength=int(key.max()) + 1)
    good = torch.bincount(key[alive & p.good], minlength=len(size))
    bad = (size >= least) & (good == 0)
    if not bool(bad.any()) or not bool((good > 0).any()):
        return None
    return bad[key] & alive


def _list(name: str, values: Tensor) -> str:
    numbers = [str(v) for v in sorted(set(values.tolist()))]
    shown = ", ".join(numbers[:4]) + (", .." if len(numbers) > 4 else "")
    return f"{name}{'s' if len(numbers) > 1 else ''} {shown}"


def _by_expert(
    p: _Pairs, alive: Tensor, runs: Sequence[_Run], tables: Sequence[_Table]
) -> tuple[str, Tensor] | None:
    bad = _groups(p.expert, p, alive, 3)
    if bad is None:
        return None
    which = sorted(set(p.expert[bad].tolist()))
    text = f"{_list('expert', p.expert[bad])} compute{'s' if len(which) == 1 else ''} something else than the others"
    acts = {}
    for e in sorted(set(p.expert[alive].tolist())):
        acts[e] = _activation(runs[0], e, tables[0])
    if tables[0].reading is not None and bool(p.first[bad].all()):
        named = ", ".join(f"expert {e} {a or 'none that the dialect has'}" for e, a in list(acts.items())[:6])
        if any(acts[e] for e in which):
            return f"the experts have different activations: {named}", bad
        return f"{text}: their activation, or what follows it (the others have {tables[0].reading.kind.act})", bad
    return text + _where(p, bad), bad


def _activation(run: _Run, e: int, like: _Table) -> str | None:
    """The activation with which all outputs of one expert are there."""
    for t in run.tables:
        if t.reading is not None and like.reading is not None and t.rows is like.rows and t.x is like.x:
            own = t.rows == e
            if t.reading.up == like.reading.up and bool(own.any()) and bool(t.outputs[own].all()):
                return t.reading.kind.act
    return None


def _by_choice(p: _Pairs, alive: Tensor) -> tuple[str, Tensor] | None:
    bad = _groups(p.choice, p, alive, 3)
    if bad is None:
        return None
    where = _where(p, bad) or " (other outputs are not there)"
    several = len(set(p.choice[bad].tolist())) > 1
    verb = "are" if several else "is"
    text = f"{_list('choice', p.choice[bad])} of every token (counted from 0) {verb} computed in another way than the others"
    return text + where, bad


def _by_load(p: _Pairs, alive: Tensor) -> tuple[str, Tensor] | None:
    wrong = alive & ~p.good
    right = alive & p.good
    if not bool(wrong.any()) or not bool(right.any()):
        return None
    most, least = int(p.load[right].max()), int(p.load[wrong].min())
    if most >= least:
        return None
    text = f"what an expert computes depends on how many rows it gets: with up to {most} rows it is ordinary, from {least} on not"
    return text + _where(p, wrong), wrong


def _by_token(p: _Pairs, alive: Tensor) -> tuple[str, Tensor] | None:
    for name, key in (("token", p.token), ("position", p.place)):
        bad = _groups(key, p, alive, 3)
        if bad is not None and bool((bad == (alive & ~p.good)).all()):
            rest = " of every sequence" if name == "position" else ""
            return f"{_list(name, key[bad])}{rest} is treated in another way than the others{_where(p, bad)}", bad
    return None


# --- weights


def weights_differ(record: Record, fit: Fit) -> str | None:
    """For a routed sum whose weights are no recorded values: which expert's weights are the ones that are not."""
    tokens, k = fit.c.shape
    largest = fit.c.abs().max()
    zero = fit.c.abs() <= 1e-4 * largest
    silent = [e for e in range(fit.experts) if bool((fit.chosen == e).sum() > 2) and bool(zero[fit.chosen == e].all())]
    best: tuple[int, str] | None = None
    for s in record.snaps:
        v = s.value
        if not v.is_floating_point() or s.time >= fit.y.time or v.numel() not in (tokens * k, tokens * fit.experts):
            continue
        gates = v.shape[-1:] == (fit.experts,) and v.numel() == tokens * fit.experts
        if not gates and v.numel() != tokens * k:
            continue
        values = v.reshape(tokens, -1).gather(1, fit.chosen).float() if gates else v.reshape(tokens, k).float()
        right = (values - fit.c).abs() <= 1e-3 * largest
        wrong = [e for e in range(fit.experts) if not bool(right[fit.chosen == e].all())]
        if not wrong or len(wrong) == len(set(fit.chosen.reshape(-1).tolist())):
            continue
        if best is None or len(wrong) < best[0]:
            which = _list("expert", torch.tensor(wrong))
            ratio = torch.cat([(fit.c / values)[fit.chosen == e] for e in wrong])
            text = f"the weight of {which} is not the recorded one that the others have"
            if silent == wrong:
                text = f"{which} counts for nothing: its weight is zero wherever it is chosen, unlike the others'"
            elif bool(((ratio - ratio[0]).abs() < 1e-3).all()):
                text = f"the weight of {which} is {float(ratio[0]):.3g} times the recorded one, unlike the others'"
            best = len(wrong), text
    return best[1] if best else None
