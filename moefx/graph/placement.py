"""Where casts go, as a minimum cut.

A value is made wide or as codes; each reader takes it in one of the two forms. Movement steps (a row gather, a wire)
hand on the form that they read, so their form is a choice; products need codes, reductions need the wide value. A value
that is made in one form and read in the other pays one cast, however many readers there are. The total of bytes moved
is then a sum of terms of one and two binary choices, all of them submodular, and its minimum is a minimum cut:

    source side = wide, sink side = codes
    choice in a form of its own cost     an edge from the source (paid when codes) or to the sink (paid when wide)
    value made wide, some reader codes   value -> its quantize node (cost), quantize node -> reader (infinite)
    value made as codes, some wide       dequantize node -> value (cost), reader -> dequantize node (infinite)

Illegal forms have infinite cost; so has dequantizing a value that its wide readers must see unrounded. Among cuts of
equal cost the one with the fewest steps in codes is taken.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import networkx as nx

from moefx.errors import PassError

WIDE, CODES = "wide", "codes"
FORMS = (WIDE, CODES)
Key = Hashable


@dataclass(frozen=True)
class Reader:
    """Something that reads values, all in one form. `wide` and `codes` are bytes moved; None where a form is illegal.

    A step makes another value, in the form in which it reads; any other reader has `makes=None`.
    """

    name: Key
    reads: tuple[Key, ...]
    wide: int | None = 0
    codes: int | None = 0
    makes: Key | None = None


@dataclass
class Problem:
    """Values with the bytes of casting them, sources with their form, and readers in topological order."""

    # value -> bytes of quantizing and of dequantizing it, None where that is illegal
    casts: dict[Key, tuple[int | None, int | None]] = field(default_factory=dict)
    made: dict[Key, str] = field(default_factory=dict)  # values that no step makes -> form
    readers: list[Reader] = field(default_factory=list)

    def cost(self, forms: Mapping[Key, str]) -> int | None:
        """Bytes moved when every reader takes the given form; None when one of them cannot."""
        native = dict(self.made)
        total = 0
        read_as: dict[Key, set[str]] = {}
        for r in self.readers:
            form = forms[r.name]
            own = r.wide if form == WIDE else r.codes
            if own is None:
                return None
            total += own
            for v in r.reads:
                read_as.setdefault(v, set()).add(form)
            if r.makes is not None:
                native[r.makes] = form
        for v, (quantize, dequantize) in self.casts.items():
            others = read_as.get(v, set()) - {native[v]}
            if others:
                cast = quantize if native[v] == WIDE else dequantize
                if cast is None:
                    return None
                total += cast
        return total

    def components(self) -> list[Problem]:
        """Parts that share no value."""
        parts = nx.utils.UnionFind(self.casts)
        for r in self.readers:
            parts.union(*r.reads, *([] if r.makes is None else [r.makes]))
        found: dict[Key, Problem] = {}
        for v, cast in self.casts.items():
            part = found.setdefault(parts[v], Problem())
            part.casts[v] = cast
            if v in self.made:
                part.made[v] = self.made[v]
        for r in self.readers:
            found[parts[r.reads[0]]].readers.append(r)
        return list(found.values())


def solve(problem: Problem) -> dict[Key, str]:
    """The form of every reader with the fewest bytes moved. Raises `PassError` when no assignment is legal."""
    g = nx.DiGraph()
    g.add_nodes_from((WIDE, CODES))
    unit = 2 * len(problem.readers) + 2  # leaves room for the tie-break below one byte

    def edge(a: Key, b: Key, cost: int | None, extra: int = 0) -> None:
        if cost is None:
            g.add_edge(a, b)  # no capacity: infinite
        elif cost * unit + extra:
            g.add_edge(a, b, capacity=g.get_edge_data(a, b, {"capacity": 0}).get("capacity", 0) + cost * unit + extra)

    makers = {r.makes: r for r in problem.readers if r.makes is not None}

    def native(v: Key) -> Key:
        return ("reader", makers[v].name) if v in makers else problem.made[v]

    for r in problem.readers:
        node = ("reader", r.name)
        g.add_node(node)
        edge(WIDE, node, r.codes, extra=1)
        edge(node, CODES, r.wide)
    by_value: dict[Key, list[Reader]] = {}
    for r in problem.readers:
        for v in r.reads:
            by_value.setdefault(v, []).append(r)
    for v, readers in by_value.items():
        quantize, dequantize = problem.casts[v]
        edge(native(v), ("quantize", v), quantize)
        edge(("dequantize", v), native(v), dequantize)
        for r in readers:
            edge(("quantize", v), ("reader", r.name), None)
            edge(("reader", r.name), ("dequantize", v), None)
    try:
        _, (wide, _) = nx.minimum_cut(g, WIDE, CODES)
    except nx.NetworkXUnbounded as e:
        raise PassError(
            "no placement of casts is legal",
            why="a reader of a value can take it neither wide nor as codes",
            todo="change the specs of the recipe for this module",
        ) from e
    return {r.name: WIDE if ("reader", r.name) in wide else CODES for r in problem.readers}
