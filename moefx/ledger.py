"""The ledger of precision casts: what a recipe asked for, what is left of it, and why.

`before` counts the explicit casts that the `quantize` pass wrote, `after` those that are left when all passes have
run: quantize and dequantize nodes of the training graph, one per tensor whatever the number of orientations. Those of
weights are counted apart, because they run once a step and not once a token. A cast that an activation writes itself is
`fused`; `transposes` are scaling-aware changes of orientation on codes. `stored` counts encodings that exist only so
that the backward keeps less: they are outputs and inputs of fused ops and no casts of their own. `recomputed` counts
casts of the forward that the backward makes again, because their wide input is kept for another reader anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from . import compat
from .graph.casts import DELAYED, DEQUANTIZE, QUANTIZE, TURNS, cast_of, explicit_casts
from .graph.edit import arguments, is_backward, value
from .precision.spec import QuantSpec


def rows(graph: fx.Graph) -> list[dict[str, Any]]:
    """One row for every explicit cast of a training graph, in order."""
    return [_row(node) for node in explicit_casts(graph)]


def _row(node: fx.Node) -> dict[str, Any]:
    a, cast = arguments(node), cast_of(node)
    if "specs" in a:
        wide, narrow, kind = value(a["x"]), list(a["specs"]), "quantize"
    else:
        wide, narrow, kind = value(node), [a["spec"]], "dequantize"
    shape = tuple(int(s) if isinstance(s, int) else int(s.node.hint) for s in wide.shape)
    groups = None if a["offsets"] is None or len(shape) != 2 else value(a["offsets"]).shape[0] - 1
    codes = sum(QuantSpec.parse(s).nbytes(shape, groups) for s in narrow)
    dtype, specs = str(wide.dtype).removeprefix("torch."), " & ".join(narrow)
    return {
        "key": cast.key, "layer": cast.layer, "tensor": cast.tensor, "role": cast.role, "use": cast.use,
        "direction": "bwd" if is_backward(node) else "fwd", "op": kind, "shape": list(shape),
        "from": dtype if kind == "quantize" else specs, "to": specs if kind == "quantize" else dtype,
        "bytes": int(codes + wide.element_size() * torch.Size(shape).numel()),
        "now": "", "fate": "", "kept_because": node.meta.get("moefx_kept") or _because(node, cast.role),
    }  # fmt: skip


def ledger(before: fx.Graph | None, after: fx.Graph, passes: Iterable[Any]) -> dict[str, Any]:
    """The `casts` of a report; `before` is the graph behind `quantize`, None when no recipe asked for casts."""
    wanted = [] if before is None else rows(before)
    left = {r["key"]: r for r in rows(after)}
    fates = {key: f"{what} [{p.name}]" for p in passes for key, what in p.casts.items()}
    fused: dict[str, str] = {}
    turned = stored = again = 0
    for node in after.nodes:
        for cast in node.meta.get("moefx_fused", ()) if node.op == "call_function" else ():
            fused[cast.key] = node.name
        turned += node.op == "call_function" and node.target in TURNS
        again += node.op == "call_function" and node.target in QUANTIZE and compat.is_recomputed(node)
        stored += node.op == "call_function" and "moefx_stored" in node.meta
    table = []
    for r in wanted:
        if r["key"] in left:
            now = left.pop(r["key"])
            r |= {"fate": "kept", "now": now["to"], "bytes": now["bytes"]}
            r["kept_because"] = now["kept_because"]
        elif r["key"] in fused:
            r |= {"kept_because": "", "fate": f"fused: {fates.get(r['key'], fused[r['key']])}"}
        else:
            r |= {"kept_because": "", "fate": f"removed: {fates.get(r['key'], 'nobody read it any more')}"}
        table.append(r)
    table += [r | {"fate": "added", "now": r["to"]} for r in left.values()]
    weights = [r for r in table if r["role"] == "weight"]
    others = [r for r in table if r["role"] != "weight"]
    return {
        "before": sum(r["fate"] != "added" for r in others),
        "after": sum(r["fate"] in ("kept", "added") for r in others),
        "weights_before": sum(r["fate"] != "added" for r in weights),
        "weights_after": sum(r["fate"] in ("kept", "added") for r in weights),
        "fused": sum(r["fate"].startswith("fused") for r in others),
        "transposes": turned,
        "stored": stored,
        "recomputed": again,
        "rows": table,
    }


def _because(node: fx.Node, role: str) -> str:
    """Why a cast that is left is there."""
    if role == "weight":
        return "once a step: the parameter changes"
    if node.target in DELAYED:
        return "its scale comes from earlier steps, which no fused op takes"
    if node.target in QUANTIZE:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.target in DEQUANTIZE:
            return "its input comes from codes, and no pass of this pipeline folds the two"
        return f"its input is wide: made by {_op(source)}"
    return f"read wide by {', '.join(sorted({_op(u) for u in node.users}))}"


def _op(node: fx.Node) -> str:
    source = node.args[0] if node.target is compat.getitem else node
    schema = getattr(getattr(source, "target", None), "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else node.name
