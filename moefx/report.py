"""The report: what every stage and pass did, as data, and as text for people."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

import moefx.kernels.registry as providers
from moefx.holder import attribute
from moefx.view.casts import summary


@dataclass
class PassRow:
    """What one pass did to one graph.

    Attributes:
        matched: rewrites done; 0 means that the pattern was looked for and not found.
        rejected: candidates left alone, each with its reason.
        error: largest relative difference measured by `verify=True`, or None when it was not measured.
        casts: what became of precision casts, by their names in the ledger.
    """

    name: str
    level: str
    numerics: str
    matched: int = 0
    rejected: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    error: float | None = None
    notes: list[str] = field(default_factory=list)
    casts: dict[str, str] = field(default_factory=dict)


class Graphs(Mapping[str, fx.GraphModule]):
    """Graphs by stage or pass name, in order. Kept as bare graphs; a GraphModule is made when one is looked at."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[dict[str, Any], fx.Graph]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        """Another collection of the same snapshots, which nobody changes."""
        new = Graphs()
        new._kept.update(self._kept)
        return new

    def keep(self, name: str, root: fx.GraphModule, graph: fx.Graph) -> None:
        """Add a snapshot; a name that is taken gets a number.

        Of the root, what the graph reads off it is kept alone: a captured graph's leads to the model.
        """
        unique, n = name, 2
        while unique in self._kept:
            unique, n = f"{name}#{n}", n + 1
        constants = {str(n.target): attribute(root, n.target) for n in graph.find_nodes(op="get_attr")}
        self._kept[unique] = (constants, graph)

    def graph(self, name: str) -> fx.Graph | None:
        """The bare graph of a stage, None when there is no such stage."""
        return self._kept[name][1] if name in self._kept else None

    def __getitem__(self, name: str) -> fx.GraphModule:
        if name not in self._kept:
            raise KeyError(f"no stage {name!r}; there are {', '.join(self._kept)}")
        constants, graph = self._kept[name]
        return fx.GraphModule(constants, graph, class_name=name.replace("#", "_"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


@dataclass
class Report:
    """What `moefx.optimize` did. `print(report)` for people, `to_dict()` for programs (keys are stable).

    `passes`, `stages`, `graphs`, `casts` and `memory` describe the signature that was compiled first; `signatures`
    lists all.
    """

    model: str = ""
    recipe: str = ""
    codegen: str = ""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    passes: list[PassRow] = field(default_factory=list)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    casts: dict[str, Any] = field(
        default_factory=lambda: {
            "before": 0, "after": 0, "weights_before": 0, "weights_after": 0, "fused": 0, "transposes": 0, "stored": 0,
            "recomputed": 0,
            "rows": [],
        }
    )  # fmt: skip
    memory: dict[str, Any] = field(default_factory=dict)
    signatures: list[dict[str, Any]] = field(default_factory=list)
    losses: list[dict[str, Any]] = field(default_factory=list)
    graphs: Graphs = field(default_factory=Graphs)

    @property
    def providers(self) -> dict[str, dict[str, int]]:
        """Which implementation ran for each dialect op, with call counts, in this process."""
        return providers.used()

    def to_dict(self) -> dict[str, Any]:
        """Plain data: blocks, passes, casts, stages, memory, providers, signatures, losses, and what was optimized
        how."""
        data = {
            "model": self.model,
            "recipe": self.recipe,
            "codegen": self.codegen,
            "blocks": self.blocks,
            "passes": [vars(p) for p in self.passes],
            "casts": self.casts,
            "stages": self.stages,
            "memory": self.memory,
            "providers": self.providers,
            "signatures": self.signatures,
            "losses": self.losses,
        }
        return copy.deepcopy(data)

    def __str__(self) -> str:
        raised = [b for b in self.blocks if b["raised"]]
        lines = [f"moefx report: {self.model}, recipe {self.recipe}, codegen {self.codegen}", ""]
        lines.append(f"MoE blocks: {len(raised)} raised, {len(self.blocks) - len(raised)} left alone")
        for b in self.blocks:
            state = f"raised: {b['idiom']}" if b["raised"] else "left alone"
            why = f" - {b['reason']}" if b["reason"] else ""
            proof = _proof(b["certificate"]) if b.get("certificate") else ""
            lines.append(f"  {b['path'] or 'the model itself'} ({b['cls']}) {state}{why}{proof}")
        lines += [
            "",
            f"{'pass':<22}{'level':<10}{'numerics':<10}{'matched':>8}{'rejected':>9}{'nodes':>14}{'ms':>8}  error",
        ]
        for p in self.passes:
            error = "" if p.error is None else f"{p.error:.1e}"
            change = f"{p.nodes_before} > {p.nodes_after}"
            lines.append(
                f"{p.name:<22}{p.level:<10}{p.numerics:<10}{p.matched:>8}{len(p.rejected):>9}{change:>14}"
                f"{p.seconds * 1e3:>8.1f}  {error}".rstrip()
            )
            lines += [f"    note: {note}" for note in p.notes]
            reasons: dict[str, list[str]] = {}
            for r in p.rejected:
                reasons.setdefault(r["why"], []).append(r["node"])
            lines += [
                f"    rejected {len(nodes)} ({nodes[0]}{', ...' if len(nodes) > 1 else ''}): {why}"
                for why, nodes in reasons.items()
            ]
        lines += ["", f"{'stage':<22}{'seconds':>8}{'nodes':>8}"]
        for name, s in self.stages.items():
            lines.append(f"{name:<22}{s['seconds']:>8.2f}{s['nodes']:>8}")
        if self.memory.get("saved_bytes") is not None:
            lines += [
                "",
                f"saved for backward: {self.memory['saved_bytes'] / 2**20:.2f} MiB besides parameters and inputs",
            ]
        lines.append(summary(self.casts))
        for row in self.losses:
            weight = "" if row["weight"] is None else f", weight {row['weight']:g}"
            lines.append(f"losses: {row['kind']} ({row['name']}{weight}) taps {len(row['layers'])} layers")
        lines.append(f"signatures compiled: {len(self.signatures)}")
        return "\n".join(lines)


def _proof(certificate: dict[str, Any]) -> str:
    """The largest relative differences that were measured between a block and its raised form."""
    found = ", ".join(f"{dtype} {max(e.values()):.0e}" for dtype, e in certificate["errors"].items())
    return f"; proven: {found} in {certificate['cases']} cases"
