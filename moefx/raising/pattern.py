"""Which rule leaves out what is missing: some experts, choices or tokens, crowded experts, or one expert's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .fit import Fit
from .parts import Run, Table
from .record import Record

Tensor = torch.Tensor


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


def _pairs(runs: Sequence[Run], tables: Sequence[Table]) -> _Pairs:
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


def missing(runs: Sequence[Run], tables: Sequence[Table]) -> str:
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
        return "; or, which the runs cannot tell apart, ".join(text for text, _ in alone)
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
    return "" if bool(there.any()) else " (already their first products are not those of the token's own row)"


def _groups(key: Tensor, p: _Pairs, alive: Tensor, least: int) -> Tensor | None:
    """The pairs in groups of equal `key` of which no output is there; None if there are no such or no other groups."""
    size = torch.bincount(key[alive], minlength=int(key.max()) + 1)
    good = torch.bincount(key[alive & p.good], minlength=len(size))
    bad = (size >= least) & (good == 0)
    if not bool(bad.any()) or not bool((good > 0).any()):
        return None
    return bad[key] & alive


def listed(name: str, values: Tensor) -> str:
    numbers = [str(v) for v in sorted(set(values.tolist()))]
    shown = ", ".join(numbers[:4]) + (", .." if len(numbers) > 4 else "")
    return f"{name}{'s' if len(numbers) > 1 else ''} {shown}"


def _by_expert(p: _Pairs, alive: Tensor, runs: Sequence[Run], tables: Sequence[Table]) -> tuple[str, Tensor] | None:
    bad = _groups(p.expert, p, alive, 3)
    if bad is None:
        return None
    which = sorted(set(p.expert[bad].tolist()))
    acts = {e: _activation(runs, tables, e) for e in sorted(set(p.expert[alive].tolist()))}
    if bool(p.first[bad].all()) and any(acts[e] for e in which):
        named = ", ".join(f"expert {e} {a or 'something else'}" for e, a in list(acts.items())[:6])
        return f"the experts have different activations: {named}{', ..' if len(acts) > 6 else ''}", bad
    verb = "computes" if len(which) == 1 else "compute"
    return f"{listed('expert', p.expert[bad])} {verb} something else than the others{_where(p, bad)}", bad


def _activation(runs: Sequence[Run], tables: Sequence[Table], e: int) -> str | None:
    """The activation with which all outputs of one expert are there, in all runs in which it has rows."""
    kinds: set[str] | None = None
    for run, like in zip(runs, tables, strict=True):
        own = like.rows == e
        if like.reading is None or not bool(own.any()):
            continue
        alike = [(t, t.reading) for t in run.tables if t.rows is like.rows and t.x is like.x and t.reading is not None]
        here = {str(r.kind) for t, r in alike if r.up == like.reading.up and bool(t.outputs[own].all())}
        kinds = here if kinds is None else kinds & here
    return min(kinds).removeprefix("plain ") if kinds else None


def _by_choice(p: _Pairs, alive: Tensor) -> tuple[str, Tensor] | None:
    bad = _groups(p.choice, p, alive, 3)
    if bad is None:
        return None
    where = _where(p, bad) or " (other outputs are not there)"
    verb = "are" if len(set(p.choice[bad].tolist())) > 1 else "is"
    which = listed("choice", p.choice[bad])
    return f"{which} of every token (counted from 0) {verb} computed in another way than the others{where}", bad


def _by_load(p: _Pairs, alive: Tensor) -> tuple[str, Tensor] | None:
    wrong = alive & ~p.good
    right = alive & p.good
    if not bool(wrong.any()) or not bool(right.any()):
        return None
    most, least = int(p.load[right].max()), int(p.load[wrong].min())
    if most >= least:
        return None
    how = f"with up to {most} rows it is ordinary, from {least} on not"
    return f"what an expert computes depends on how many rows it gets: {how}" + _where(p, wrong), wrong


def _by_token(p: _Pairs, alive: Tensor) -> tuple[str, Tensor] | None:
    for name, key in (("token", p.token), ("position", p.place)):
        bad = _groups(key, p, alive, 3)
        if bad is not None and bool((bad == (alive & ~p.good)).all()):
            rest = " of every sequence" if name == "position" else ""
            verb = "are" if len(set(key[bad].tolist())) > 1 else "is"
            return f"{listed(name, key[bad])}{rest} {verb} treated in another way than the others{_where(p, bad)}", bad
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
        real = fit.chosen.clamp_max(fit.experts - 1)  # indices past the last expert stand for none of the bank
        values = v.reshape(tokens, -1).gather(1, real).float() if gates else v.reshape(tokens, k).float()
        right = (values - fit.c).abs() <= 1e-3 * largest
        wrong = [e for e in range(fit.experts) if not bool(right[fit.chosen == e].all())]
        if not wrong or len(wrong) == len(set(fit.chosen.reshape(-1).tolist())):
            continue
        if best is None or len(wrong) < best[0]:
            which = listed("expert", torch.tensor(wrong))
            ratio = torch.cat([(fit.c / values)[fit.chosen == e] for e in wrong])
            text = f"the weight of {which} is not the recorded one that the others have"
            if silent == wrong:
                text = f"the fullest sum of experts' outputs that is there does not count {which}, chosen or not"
            elif bool(((ratio - ratio[0]).abs() < 1e-3).all()):
                text = f"the weight of {which} is {float(ratio[0]):.3g} times the recorded one, unlike the others'"
            best = len(wrong), text
    return best[1] if best else None
