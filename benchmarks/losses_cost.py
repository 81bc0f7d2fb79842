"""What the losses of routing cost: work and saved bytes counted in the graphs; seconds and saved bytes measured here.

    python benchmarks/losses_cost.py [--time] [--quick]

Counted on a transformers Qwen3-MoE of two layers with the widths of Qwen3-30B-A3B (H = 2048, I = 768, top-8) but 16
experts and a small vocabulary, which makes every share larger than in the full model. Flops: 2 M N K for products, the
terms of the formulas in docs/losses.md for `moefx.overlap`, one per element written or summed for everything else.
Seconds are process CPU time on one thread, the cases in turn, `REPEATS` rounds after one that is left out; the ratio to
no losses is taken within a round, and all turns are in results/losses_cost_turns.csv. What is small beside the noise of
the products is seen by calls: the seconds of those calls of operators that only the step with losses makes, over those
of all calls. Measured bytes are those of the storages that autograd holds behind the forward, parameters and inputs
apart, on the model and tokens of the counted ones; a storage that is kept under two shapes is counted twice there and
measured once. `--quick` has small widths and writes nothing: it shows that everything runs.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import moefx
from moefx.capture import capture, warm_up
from moefx.graph.edit import arguments, value
from moefx.joint import split, trace_joint
from moefx.losses import as_losses
from moefx.manager import PassManager
from moefx.passes import pipeline, with_losses
from moefx.passes.raise_experts import raised
from moefx.program import _bytes
from moefx.report import Report

RESULTS = Path(__file__).parent / "results" / "losses_cost.csv"
TURNS = RESULTS.with_name("losses_cost_turns.csv")
REPEATS = 12
TIMED = ("", "sp", "cp", "sp,cp", "sp,cp,lb,z")
CASES = ("", "sp", "cp", "lb", "sp,cp", "sp,cp,lb,z", "metrics", "var", "orth", "erc")
Inputs = dict[str, torch.Tensor]


def model(H: int = 2048, I: int = 768, k: int = 8, E: int = 16, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Two layers with random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=H, intermediate_size=H, num_hidden_layers=2, num_attention_heads=max(H // 128, 1),
        num_key_value_heads=max(H // 512, 1), head_dim=128, num_experts=E, num_experts_per_tok=k,
        moe_intermediate_size=I, attn_implementation="sdpa", dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM._from_config(config, dtype=dtype).train()


def batch(T: int) -> Inputs:
    """Two sequences of T / 2 tokens."""
    ids = torch.randint(0, 512, (2, T // 2), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def halves(net: Any, inputs: Inputs, losses: str, codegen: str) -> tuple[fx.GraphModule, fx.GraphModule, int]:
    """Forward and backward graphs of a training step, and how many outputs the forward has before what it saves."""
    passes: PassManager = with_losses(pipeline("bf16", codegen=codegen), as_losses(losses))
    with contextlib.ExitStack() as stack:
        warm_up(net, (), inputs)
        stack.enter_context(raised(net))
        captured = capture(net, (), inputs)
        passes.run("model", captured.gm, Report(), captured.gm.meta["fake_mode"])
        joint = trace_joint(captured, grad=True, codegen=codegen)
    passes.run("training", joint.gm, Report(), joint.fake_mode)
    return (*split(joint, codegen=codegen), joint.fwd_outputs)


def flops(graph: fx.Graph) -> int:
    """Work of all nodes of a training graph."""
    return sum(_flops(n) for n in graph.nodes if n.op == "call_function")


def _flops(node: fx.Node) -> int:
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    outs = [v for v in pytree.tree_leaves(value(node)) if isinstance(v, torch.Tensor)]
    ins = [v for n in node.all_input_nodes for v in pytree.tree_leaves(value(n)) if isinstance(v, torch.Tensor)]
    if name in ("moefx::grouped_mm", "moefx::grouped_wgrad"):
        a = [value(n) for n in node.args[:2]]  # type: ignore[union-attr]
        return 2 * a[0].shape[0] * a[0].shape[1] * (a[1].shape[1])
    if name in ("moefx::overlap", "moefx::overlap_backward"):
        z, slot = (value(arguments(node)[key]) for key in ("z", "slot"))
        T, k, I = *slot.shape, z.shape[1]
        # Rows: square, sum, scale. Gram: k^2 products of rows. Backward: both again, C U, and the projection.
        return T * (3 * k * I + 2 * k * k * I) + (T * (2 * k * k * I + 5 * k * I) if "backward" in name else 0)
    packet = getattr(node.target, "overloadpacket", None)
    if packet in flop_registry:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        return int(flop_registry[packet](*args, **kwargs, out_val=value(node)))
    if node.target is moefx.compat.getitem or name.startswith(("aten::view", "aten::detach", "aten::permute")):
        return 0
    return max((math.prod(v.shape) for v in (*outs, *ins)), default=0)


def count(net: Any, inputs: Inputs, losses: str, codegen: str) -> tuple[int, int]:
    """Flops of a step, bytes that its forward keeps for the backward."""
    fw, bw, outputs = halves(net, inputs, losses, codegen)
    saved: Sequence[Any] = fw.graph.output_node().args[0][outputs:]  # type: ignore[index, assignment]
    return flops(fw.graph) + flops(bw.graph), _bytes(saved) or 0


def kept(net: Any, inputs: Inputs, losses: str) -> int:
    """Bytes that autograd holds between forward and backward, measured: each storage once, no parameter, no input."""
    opt = moefx.optimize(net, inputs, losses=losses, codegen="eager")
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), *inputs.values())}
    held: dict[int, torch.UntypedStorage] = {}  # alive until all are known, so that no address comes twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = opt(**inputs)
    assert out.loss.requires_grad
    return sum(storage.nbytes() for storage in held.values())


def seconds(net: Any, inputs: Inputs, cases: Sequence[str]) -> dict[str, list[float]]:
    """Process CPU seconds of training steps, the cases in turn: what drifts on the machine drifts for all of them."""
    arms = {losses: moefx.optimize(net, inputs, losses=losses, codegen="eager") for losses in cases}
    found: dict[str, list[float]] = {losses: [] for losses in cases}
    for r in range(REPEATS + 1):
        for losses, opt in arms.items():
            net.zero_grad(set_to_none=True)
            begun = time.process_time()
            opt(**inputs).loss.backward()
            if r:
                found[losses].append(time.process_time() - begun)
    return found


class Calls(TorchDispatchMode):
    """Process CPU seconds of every call of an operator, by operator and the shapes and dtypes that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        begun = time.process_time()
        out = func(*args, **(kwargs or {}))
        took = time.process_time() - begun
        self.found[" ".join([str(func), *(f"{tuple(t.shape)}{t.dtype}" for t in tensors)])].append(took)
        return out


def calls(net: Any, inputs: Inputs, losses: str) -> dict[str, tuple[int, float]]:
    """Calls of one training step by kind: how many, and what one takes, the median over the calls of all rounds."""
    opt = moefx.optimize(net, inputs, losses=losses, codegen="eager")
    rounds = []
    for r in range(REPEATS + 1):
        net.zero_grad(set_to_none=True)
        with Calls() as seen:
            opt(**inputs).loss.backward()
        if r:
            rounds.append(seen.found)
    kinds = rounds[0]
    assert all(r.keys() == kinds.keys() for r in rounds)
    return {kind: (len(kinds[kind]), statistics.median(t for r in rounds for t in r[kind])) for kind in kinds}


def measured_calls(net: Any, inputs: Inputs, cases: Sequence[str], what: str) -> list[dict[str, Any]]:
    """Rows of the seconds in calls that only the step with losses makes, less those that only the one without makes."""
    rows = []
    base = calls(net, inputs, "")
    whole = sum(n * t for n, t in base.values())
    for losses in cases:
        now = base if not losses else calls(net, inputs, losses)
        known, none = base | now, (0, 0.0)
        more = sum((now.get(kind, none)[0] - base.get(kind, none)[0]) * took for kind, (_, took) in known.items())
        rows.append(_timed(what, losses, whole + more, f"{100 * more / whole:.2f}"))
    return rows


def _timed(what: str, losses: str, seconds: float, extra: str) -> dict[str, Any]:
    """A row of seconds, which is printed, too."""
    row = {"what": what, "losses": losses or "none", "value": f"{seconds:.4f}", "unit": "s", "extra_percent": extra}
    print(row, flush=True)
    return row


def counted(net: Any, inputs: Inputs) -> list[dict[str, Any]]:
    """Rows of work and saved bytes, by case and codegen."""
    rows: list[dict[str, Any]] = []
    for codegen in ("eager", "inductor"):
        base = count(net, inputs, "", codegen)
        for losses in CASES:
            work, saved = count(net, inputs, losses, codegen)
            rows.append({
                "what": f"counted, {codegen}", "losses": losses or "none", "value": work, "unit": "flop",
                "extra_percent": f"{100 * (work / base[0] - 1):.3f}", "saved_bytes": saved,
                "extra_saved_percent": f"{100 * (saved / base[1] - 1):.3f}",
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def measured_bytes(net: Any, inputs: Inputs, what: str) -> list[dict[str, Any]]:
    """Rows of the bytes that autograd holds, by case."""
    rows: list[dict[str, Any]] = []
    for losses in CASES:
        rows.append({"what": what, "losses": losses or "none", "saved_bytes": kept(net, inputs, losses)})
        extra = rows[-1]["saved_bytes"] / rows[0]["saved_bytes"] - 1
        rows[-1]["extra_saved_percent"] = f"{100 * extra:.3f}"
        print(rows[-1], flush=True)
    return rows


def measured_seconds(took: dict[str, list[float]], what: str) -> list[dict[str, Any]]:
    """Rows of the medians, and of the median ratio within a turn."""
    rows = []
    for losses, values in took.items():
        ratio = statistics.median(a / b for a, b in zip(values, took[""], strict=True))
        rows.append(_timed(what, losses, statistics.median(values), f"{100 * (ratio - 1):.1f}"))
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One CSV; the first row has all columns."""
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Write the CSVs and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true", help="measure seconds and saved bytes, too (minutes)")
    parser.add_argument("--quick", action="store_true", help="small widths; write nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"H": 128, "I": 64, "k": 2, "E": 4} if given.quick else {}
    many, few = (64, 32) if given.quick else (512, 256)
    net = model(**sizes)
    rows = counted(net, batch(many))
    turns: list[dict[str, Any]] = []
    if given.time:
        rows += measured_bytes(net, batch(many), f"measured, eager, CPU, T={many}, bf16")
        wide = model(**sizes, dtype=torch.float32)
        rows += measured_calls(wide, batch(few), TIMED, f"measured by calls, eager, CPU, T={few}, fp32")
        took = seconds(wide, batch(few), TIMED)
        rows += measured_seconds(took, f"measured, eager, CPU, T={few}, fp32")
        turns = [{"turn": i, **{n or "none": f"{v[i]:.4f}" for n, v in took.items()}} for i in range(REPEATS)]
        print(*turns, sep="\n", flush=True)
    if not given.quick:
        write(RESULTS, rows)
        if turns:
            write(TURNS, turns)


if __name__ == "__main__":
    main()
