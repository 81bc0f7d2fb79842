"""The report: data with stable keys, and text for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from torch import fx

import moefx
from moefx.manager import Context
from moefx.report import Graphs, Report
from tests import reference

KEYS = {"blocks", "passes", "casts", "stages", "memory", "providers", "signatures", "losses"}
WHAT_WAS_DONE = {"model", "recipe", "codegen"}
PASS_KEYS = {"name", "level", "numerics", "matched", "rejected", "seconds"}
BLOCK_KEYS = {"path", "raised", "idiom", "error", "reason"}
CAST_KEYS = {"before", "after", "weights_before", "weights_after", "fused", "transposes", "stored", "recomputed",
    "rows"}  # fmt: skip


@dataclass(frozen=True)
class Choosy(moefx.Pass):
    """Rejects every product for one of two reasons."""

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        """Reject."""
        found = [n for n in graph.nodes if n.op == "call_function" and n.users][:5]
        for i, node in enumerate(found):
            ctx.rejected(node, "too narrow" if i else "too wide")


@pytest.fixture(scope="module")
def opt() -> moefx.OptimizedModule:
    """A small model with every default pass and one that rejects."""
    pytest.importorskip("transformers")
    passes = moefx.pipeline("bf16", codegen="eager").insert(Choosy(), after="dead_code")
    return reference.optimize(reference.tiny(), passes=passes, verify=True)


def test_keys_are_stable(opt: moefx.OptimizedModule) -> None:
    """Those of docs/architecture.md, and what was optimized how."""
    data = opt.report.to_dict()
    assert data.keys() == KEYS | WHAT_WAS_DONE
    assert all(row.keys() >= PASS_KEYS for row in data["passes"])
    assert all(row.keys() >= BLOCK_KEYS for row in data["blocks"])
    assert all(row.keys() >= {"seconds", "nodes"} for row in data["stages"].values())
    assert data["casts"].keys() == CAST_KEYS
    assert all(r.keys() == {"node", "why"} for p in data["passes"] for r in p["rejected"])
    assert (data["recipe"], data["codegen"]) == ("bf16", "eager")


def test_json_gives_back_the_same(opt: moefx.OptimizedModule) -> None:
    data = opt.report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_data_is_a_copy(opt: moefx.OptimizedModule) -> None:
    """Who edits what `to_dict` gave does not edit the report."""
    first = opt.report.to_dict()
    passes = len(first["passes"])
    for rows in (first["passes"], first["blocks"], first["signatures"], first["casts"]["rows"]):
        rows.clear()
    first["stages"].clear()
    again = opt.report.to_dict()
    assert len(again["passes"]) == passes > 10
    assert again["blocks"]
    assert again["stages"]
    assert again["signatures"]


def test_rows_say_what_the_passes_did(opt: moefx.OptimizedModule) -> None:
    rows = {p["name"]: p for p in opt.report.to_dict()["passes"]}
    assert list(rows) == [p.name for p in opt.options.passes.ordered()]
    assert (rows["expand_experts"]["matched"], rows["expand_experts"]["level"]) == (1, "model")
    assert rows["merge_routers"]["matched"] == 2
    assert rows["merge_routers"]["numerics"] == "rounding"
    assert len(rows["choosy"]["rejected"]) == 5
    assert rows["choosy"]["error"] is None
    assert rows["expand_experts"]["error"] == 0.0
    for row in rows.values():
        assert row["nodes_before"] > 0
        assert row["nodes_after"] > 0
        assert row["seconds"] > 0


def test_text_names_blocks_passes_and_stages(opt: moefx.OptimizedModule) -> None:
    text, data = str(opt.report), opt.report.to_dict()
    lines = text.splitlines()
    (block,) = [line for line in lines if "model.layers.0.mlp.experts" in line and "raised: silu | nk" in line]
    assert "Qwen3MoeExperts" in block
    for row in data["passes"]:
        (line,) = [x for x in lines if x.split()[:1] == [row["name"]]]
        assert line.split()[1:5] == [row["level"], row["numerics"], str(row["matched"]), str(len(row["rejected"]))]
        assert f"{row['nodes_before']} > {row['nodes_after']}" in line
    assert {line.split("  ")[0] for line in lines} >= set(data["stages"])
    assert "1 raised, 0 left alone" in text
    assert "saved for backward" in text


def test_rejections_are_grouped_by_reason(opt: moefx.OptimizedModule) -> None:
    rejected = [line.strip() for line in str(opt.report).splitlines() if line.strip().startswith("rejected ")]
    assert len(rejected) == 2
    assert rejected[0].startswith("rejected 1 (")
    assert rejected[0].endswith("): too wide")
    assert rejected[1].startswith("rejected 4 (")
    assert rejected[1].endswith(", ...): too narrow")


def test_blocks_that_were_left_alone_say_why() -> None:
    block = {"path": "mlp", "cls": "Experts", "raised": False, "idiom": None, "error": None, "reason": "a loop"}
    text = str(Report("M", "bf16", "eager", blocks=[block]))
    assert "0 raised, 1 left alone" in text
    assert "mlp (Experts) left alone - a loop" in text


def test_an_empty_report_prints() -> None:
    assert "signatures compiled: 0" in str(Report())
    assert json.dumps(Report().to_dict())


def test_a_new_signature_is_appended(opt: moefx.OptimizedModule) -> None:
    """The rest of the report stays about the first one."""
    before = opt.report.to_dict()
    opt(**reference.batch(1, 4))
    after = opt.report.to_dict()
    assert len(after["signatures"]) == len(before["signatures"]) + 1
    assert after["signatures"][-1]["inputs"] == ["int64[1, 4]", "int64[1, 4]"]
    assert after["signatures"][-1]["mode"] == "train"
    assert after["passes"] == before["passes"]
    assert f"signatures compiled: {len(after['signatures'])}" in str(opt.report)
    opt(**reference.batch(1, 4))
    assert len(opt.report.to_dict()["signatures"]) == len(after["signatures"])


def test_providers_are_counted(opt: moefx.OptimizedModule) -> None:
    opt(**reference.batch())
    before = opt.report.to_dict()["providers"]
    opt(**reference.batch())
    after = opt.report.to_dict()["providers"]

    def total(found: Any) -> int:
        return sum(found["grouped_mm"].values())

    assert total(after) == total(before) + 2
    assert all("/cpu/" in key for key in after["grouped_mm"])


def test_graphs_are_an_ordered_mapping() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    root, graphs = fx.GraphModule({}, fx.Graph()), Graphs()
    for name in ("b", "a", "b", "b"):
        graphs.keep(name, root, graph)
    assert list(graphs) == ["b", "a", "b#2", "b#3"]
    assert len(graphs) == 4
    assert "a" in graphs
    assert graphs["b#3"](7) == 7
    with pytest.raises(KeyError, match="no stage 'c'; there are b, a"):
        graphs["c"]
