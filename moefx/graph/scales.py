"""Values behind casts: which nodes of a training graph hold one value, wide or as codes, and who moves and reads it.

This turns the explicit casts of a graph into placement problems (`graph/placement.py`). Movement steps are exact for
blocks within a row: row gathers and selections (rule R3), views that keep rows and concatenations (R5), wires (R6).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from torch import fx

import moefx.dialect  # noqa: F401  registers the ops
from moefx import compat
from moefx.errors import PassError
from moefx.precision.spec import QuantSpec

from .casts import DEQUANTIZE, MOVES, QUANTIZE, WIRES, is_weight, read_codes
from .edit import arguments, place, targets, value
from .placement import CODES, WIDE, Problem, Reader

ops = torch.ops.moefx
aten = torch.ops.aten
GATHERS = targets(ops.permute)
SELECTS = frozenset({aten.index_select.default, aten.slice.Tensor})  # of rows
CONCATS = frozenset({aten.cat.default})
VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


@dataclass(eq=False)
class Value:
    """One value of the program. `step` made it from `before` by moving rows, in `form`; None: computed, wide.

    `rounded` says that the recipe has it as codes on the way (a wire): its wide form is what codes dequantize to.
    """

    node: fx.Node
    shape: tuple[int, ...]
    itemsize: int
    step: fx.Node | None = None
    before: tuple[Value, ...] = ()
    form: str = WIDE
    fixed: bool = False
    spec: str | None = None
    rounded: bool = False

    def bytes(self, spec: str | None = None) -> int:
        """Bytes of the value, wide or as codes and scales."""
        if spec is None:
            return math.prod(self.shape) * self.itemsize
        return QuantSpec.parse(spec).nbytes(self.shape)


@dataclass
class Values:
    """All values of a graph; casts of weights are left out, since nothing moves them."""

    all: list[Value] = field(default_factory=list)
    wide: dict[fx.Node, Value] = field(default_factory=dict)
    codes: dict[fx.Node, tuple[Value, str]] = field(default_factory=dict)

    @staticmethod
    def of(graph: fx.Graph) -> Values:
        """Read a graph with explicit casts."""
        v = Values()
        for node in graph.nodes:
            if node.op == "call_function":
                v._add(node)
        return v

    def _add(self, node: fx.Node) -> None:
        source: Any = node.args[0] if node.args else None
        if node.target in QUANTIZE and not is_weight(node):
            self._computed(source)
        elif node.target is compat.getitem and source.target in QUANTIZE and not is_weight(source):
            if node.args[1] % 2 == 0:  # type: ignore[operator]
                specs: Any = arguments(source)["specs"]
                self.codes[node] = (self.wide[source.args[0]], specs[node.args[1] // 2])  # type: ignore[operator]
        elif node.target in DEQUANTIZE:
            found = self.codes.get(read_codes(node).codes)
            if found is not None:
                check_edge(node, found[1], read_codes(node).spec)
                self.wide[node] = found[0]
        elif node.target in WIRES and source in self.codes:
            self._moved(node, *self.codes[source])
        elif node.target is compat.getitem and source.target in MOVES and node.args[1] == 0:
            if source.args[0] in self.codes:
                self._moved(node, *self.codes[source.args[0]])
        elif node.target in WIRES and isinstance(value(node), torch.Tensor) and value(node).is_floating_point():
            # A wire that the recipe leaves wide.
            self._new(node, node, (self._computed(source),)).fixed = True
        elif is_movable(node):
            self._new(node, node, tuple(map(self._computed, moved_by(node))))

    def _computed(self, node: fx.Node) -> Value:
        if node not in self.wide:
            self._new(node, None, ())
        return self.wide[node]

    def _new(self, node: fx.Node, step: fx.Node | None, before: tuple[Value, ...]) -> Value:
        val = value(node)
        shape = tuple(compat.size_hint(s) for s in val.shape)
        made = Value(node, shape, val.element_size(), step, before, rounded=any(b.rounded for b in before))
        self.all.append(made)
        self.wide[node] = made
        return made

    def _moved(self, node: fx.Node, before: Value, spec: str) -> None:
        rows = compat.size_hint(value(node).shape[0])
        shape = (rows, *before.shape[1:])
        made = Value(node, shape, before.itemsize, node, (before,), CODES, True, spec, True)
        self.all.append(made)
        self.codes[node] = (made, spec)


def check_edge(reader: fx.Node, written: str, read: str) -> None:
    """Raise `PassError` when codes are read under another spec than they were written under."""
    a, b = (replace(QuantSpec.parse(s), stochastic=False) for s in (written, read))
    if a != b:
        raise PassError(
            f"node {reader.name} reads codes as {read!r}, which were written as {written!r}",
            where=place(reader),
            todo="change the spec of a cast and of everything that reads its codes together",
        )


def is_movable(node: fx.Node) -> bool:
    """Whether an op on wide values only moves rows, so that it could move codes and their scales."""
    if node.target in GATHERS:
        return True
    if node.target in SELECTS or node.target in CONCATS:
        along: Any = node.args[1] if len(node.args) > 1 else 0
        return along == 0 and len(value(node).shape) == 2
    if node.target not in VIEWS:
        return False
    a, b = value(node.args[0]), value(node)  # type: ignore[arg-type]
    return a.dim() >= 2 and b.dim() >= 2 and compat.is_fixed(a.shape[-1]) and a.shape[-1] == b.shape[-1]


def moved_by(node: fx.Node) -> list[fx.Node]:
    """The values whose rows a movable op moves: one, or the parts of a concatenation."""
    first: Any = node.args[0]
    return list(first) if node.target in CONCATS else [first]


@dataclass
class Region:
    """Values that movement connects, the spec in which they move as codes, and the question where."""

    values: list[Value]
    spec: str
    problem: Problem = field(default_factory=Problem)
    now: dict[Any, str] = field(default_factory=dict)


def regions(graph: fx.Graph, values: Values, allow: Callable[[str, str, bool], bool]) -> list[Region]:
    """One region for every set of connected values that any product or wire wants as codes in row blocks.

    `allow(spec, to_spec, rounded)` says whether codes may be converted where another spec is wanted of a value that the
    recipe has as codes already (`rounded`), or would cast from the wide value. A region with wires of
    several specs has no one form as codes: it stays as it is written.
    """
    parts = nx.utils.UnionFind(values.all)
    for v in values.all:
        parts.union(v, *v.before)
    root = {v: parts[v] for v in values.all}
    members: dict[Value, list[Value]] = {}
    for v in values.all:
        members.setdefault(root[v], []).append(v)
    wanted: dict[Value, list[tuple[fx.Node, str, Value]]] = {}
    for q in [n for n in graph.nodes if n.target in QUANTIZE and not is_weight(n)]:
        v = values.wide[q.args[0]]
        wanted.setdefault(root[v], []).extend((q, text, v) for text in arguments(q)["specs"])
    readers: dict[Value, list[tuple[fx.Node, Value, bool]]] = {}
    steps = {v.step for v in values.all}
    for node, v in values.wide.items():
        for user in node.users:
            if user not in steps and user.target not in QUANTIZE:
                readers.setdefault(root[v], []).append((user, v, node.target in DEQUANTIZE))
    found = []
    for first, group in members.items():
        spec = _spec(group, wanted.get(first, []))
        if spec is not None and any(v.step is not None for v in group):
            found.append(_region(group, spec, wanted.get(first, []), readers.get(first, []), allow))
    return found


def _spec(group: list[Value], wanted: list[tuple[fx.Node, str, Value]]) -> str | None:
    carried = list(dict.fromkeys(v.spec for v in group if v.spec is not None))
    # A stochastic cast stays where it is written: in front of a gather, all copies of a row would share one draw.
    by_rows = [text for _, text, _ in wanted if (s := QuantSpec.parse(text)).br == 1 and not s.stochastic]
    return None if len(carried) > 1 else next(iter(carried or by_rows), None)


def _region(
    group: list[Value], spec: str, wanted: list[tuple[fx.Node, str, Value]],
    readers: list[tuple[fx.Node, Value, bool]],
    allow: Callable[[str, str, bool], bool],
) -> Region:  # fmt: skip
    region = Region(group, spec)
    p, now = region.problem, region.now
    drawn = QuantSpec.parse(spec).stochastic
    for v in group:
        # Codes that were drawn are moved, and never drawn anew for the sake of moving them.
        cast = None if drawn and v.rounded else v.bytes() + v.bytes(spec)
        p.casts[v] = (cast, v.bytes(spec) + v.bytes() if v.rounded else None)
        if not v.before:
            p.made[v] = v.form
            continue
        free = v.step is not None and v.step.target in VIEWS
        wide = None if v.fixed and v.form == CODES else 0 if free else 2 * v.bytes()
        kept_wide = (v.fixed and v.form == WIDE) or (drawn and not v.rounded)
        codes = None if kept_wide else 0 if free else 2 * v.bytes(spec)
        p.readers.append(Reader(v, v.before, wide, codes, v))
        now[v] = v.form
    for q, text, v in wanted:
        name = (q, text)
        turned = 0 if text == spec else v.bytes(spec) + v.bytes(text) if allow(spec, text, v.rounded) else None
        again = v.bytes() + v.bytes(text)
        source: Any = q.args[0]
        if source.target in DEQUANTIZE:  # it reads codes as they are written, and widens them itself if it must
            p.readers.append(Reader(name, (v,), None, v.bytes(spec) + v.bytes() + again if turned is None else turned))
            now[name] = CODES
        else:
            p.readers.append(Reader(name, (v,), None if text == spec and not drawn else again, turned))
            now[name] = CODES if text == spec else WIDE
    for user, v, through_codes in readers:
        p.readers.append(Reader((user, v), (v,), *((None, v.bytes(spec) + v.bytes()) if through_codes else (0, None))))
        now[user, v] = CODES if through_codes else WIDE
    # A reader may read one value through two wide nodes: it is one reader.
    p.readers = list({r.name: r for r in p.readers}.values())
    return region
