"""Graphs to rewrite, and everything that must hold after any rewrite, checked without the code that is under test.

A `Subject` is a graph with real values for its inputs. It is captured once and copied for every test. `rewrite` runs
one pass on a copy through the pass manager with verification, and then checks by other means: both graphs are run as
compiled modules, model graphs are differentiated, and each node's recorded value is compared with what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moefx import compat
from moefx.capture import Captured, capture, warm_up
from moefx.errors import PassError
from moefx.graph import edit
from moefx.graph.effects import name_of
from moefx.joint import trace_joint
from moefx.manager import Pass, PassManager
from moefx.passes.raise_experts import raised
from moefx.report import PassRow, Report
from moefx.verify import Verifier

Tensor = torch.Tensor
ops = torch.ops.moefx
E, H, I, K, T = 4, 8, 6, 2, 10
# Largest relative L2 difference of outputs and gradients by numerics class.
ALLOWED = {
    "exact": {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float64: 0.0},
    "rounding": {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12},
}


class Made(nn.Module):
    """A module whose forward is a function of the module and the inputs; parameters (or buffers) by keyword."""

    def __init__(self, fn: Callable[..., Any], *, grad: bool = True, **tensors: Tensor) -> None:
        super().__init__()
        self.fn = fn
        for name, t in tensors.items():
            if grad:
                self.register_parameter(name, nn.Parameter(t))
            else:
                self.register_buffer(name, t)

    def forward(self, x: Tensor, *args: Tensor) -> Any:
        """Call the function."""
        return self.fn(self, x, *args)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same normal numbers at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def weights(layout: str = "nk", bias: bool = False, gated: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Parameters of a router and of one bank of experts: router, up, down, and up_bias, down_bias if asked for."""
    width = 2 * I if gated else I
    found = {
        "router": rand(E, H, seed=seed + 1),
        "up": rand(E, width, H, seed=seed + 2),
        "down": rand(E, H, I, seed=seed + 3),
    }
    if bias:
        found |= {"up_bias": rand(E, width, seed=seed + 4), "down_bias": rand(E, H, seed=seed + 5)}
    if layout == "kn":
        found |= {k: found[k].transpose(1, 2).contiguous() for k in ("up", "down")}
    return found


def route(m: nn.Module, x: Tensor, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights and indices of a softmax router."""
    logits = nn.functional.linear(x, m.router)  # type: ignore[arg-type]
    w, idx = torch.topk(torch.softmax(logits, -1), k, dim=-1)
    return logits, w, idx


def experts(m: nn.Module, x: Tensor, idx: Tensor, w: Tensor, kind: str = "silu") -> Tensor:
    """One bank of experts as the dialect ops that `expand_experts` makes."""
    token, order, slot, offsets = ops.plan(idx, E, 1)
    h = ops.grouped_mm(ops.permute(x, token, slot), m.up, offsets)
    y: Tensor = ops.unpermute(ops.grouped_mm(ops.glu(h, None, kind), m.down, offsets), token, order, slot, w)
    return y


def bank(kind: str = "silu") -> Callable[[Any, Tensor], Tensor]:
    """The forward of a router and one bank."""

    def fn(m: Any, x: Tensor) -> Tensor:
        _, w, idx = route(m, x)
        return experts(m, x, idx, w, kind)

    return fn


@dataclass
class Subject:
    """A graph of one level with real values of its placeholders."""

    gm: fx.GraphModule
    values: list[Any]
    level: str
    fake_mode: Any

    def copy(self) -> Subject:
        """Another graph over the same values."""
        return Subject(edit.copy_graph(self.gm), self.values, self.level, self.fake_mode)

    @property
    def graph(self) -> fx.Graph:
        """The FX graph."""
        return self.gm.graph


def model_graph(module: nn.Module, *args: Tensor, dynamic: Any = None, **kwargs: Tensor) -> Subject:
    """The model graph of a call, experts raised where the module has any in the transformers sense."""
    return as_subject(captured_graph(module, *args, dynamic=dynamic, **kwargs))


def captured_graph(module: nn.Module, *args: Tensor, dynamic: Any = None, **kwargs: Tensor) -> Captured:
    """The same, as captured."""
    warm_up(module, args, kwargs)
    with raised(module):
        found = capture(module, args, kwargs, dynamic)
    for node in found.graph.find_nodes(op="placeholder"):
        node.meta["moefx_name"] = found.names[node.name]
    return found


def as_subject(captured: Captured) -> Subject:
    """A captured model graph with the values that it was captured with."""
    values = compat.flat_inputs(captured.gm, captured.args, captured.kwargs)
    return Subject(captured.gm, values, "model", captured.gm.meta["fake_mode"])


def training_graph(module: nn.Module, *args: Tensor, passes: Iterable[Pass] = (), **kwargs: Tensor) -> Subject:
    """The training graph of a call, after the given model-level passes."""
    return trained(module, captured_graph(module, *args, **kwargs), passes)


def trained(module: nn.Module, captured: Captured, passes: Iterable[Pass] = ()) -> Subject:
    """The training graph of a captured call; uses the captured graph up."""
    PassManager(tuple(passes), ANY).run("model", captured.gm, Report(), captured.gm.meta["fake_mode"])
    joint = trace_joint(captured, grad=True, codegen="eager")
    inputs = torch.utils._pytree.tree_leaves((captured.args, captured.kwargs))
    state = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    values: list[Any] = []
    for slot, node in zip(joint.inputs, joint.graph.find_nodes(op="placeholder"), strict=True):
        node.meta["moefx_name"] = str(slot.key)
        if slot.kind == "tangent":
            shape = [int(s) for s in node.meta["val"].shape]
            values.append(rand(*shape, seed=int(slot.key), dtype=node.meta["val"].dtype))
        else:
            values.append(inputs[int(slot.key)] if slot.kind == "input" else state[str(slot.key)].detach())
    return Subject(joint.gm, values, "training", joint.fake_mode)


ANY = frozenset({"captured", "moe_raised", "experts_expanded", "plans_shared"})


@dataclass
class Rewritten:
    """What a pass made of a subject."""

    before: fx.Graph
    subject: Subject
    row: PassRow
    report: Report

    @property
    def graph(self) -> fx.Graph:
        """The graph after the pass."""
        return self.subject.graph

    @property
    def changed(self) -> bool:
        """Whether the pass changed anything."""
        return len(self.report.graphs) > 0

    @property
    def reasons(self) -> list[str]:
        """Why candidates were rejected."""
        return [r["why"] for r in self.row.rejected]

    def new(self) -> list[fx.Node]:
        """Nodes that the pass made."""
        names = {n.name for n in self.before.nodes}
        return [n for n in self.graph.nodes if n.name not in names]


def rewrite(p: Pass, subject: Subject, numerics: str | None = None) -> Rewritten:
    """Run a pass on a copy of `subject`, and check everything that must hold whatever the pass."""
    s, report = subject.copy(), Report()
    before = edit.copy_plain(s.graph)
    verifier = Verifier(s.values, grad=s.level == "model")
    PassManager((p,), ANY | frozenset(p.requires)).run(s.level, s.gm, report, s.fake_mode, verifier)
    done = Rewritten(before, s, report.passes[0], report)
    same_results(run(subject, before), run(s), numerics or p.numerics)
    if done.changed:
        assert done.row.error is not None
        values_are_true(s)
        origin_is_kept(p, done)
    else:
        assert [n.name for n in before.nodes] == [n.name for n in s.graph.nodes]
        assert done.row.error is None
        assert done.row.matched == 0
    untouched_twice(p, s)
    return done


def count(graph: fx.Graph, name: str) -> int:
    """How many nodes call the function, method or op of this name."""
    return sum(name_of(n) == name for n in graph.nodes if n.op in ("call_function", "call_method"))


def nodes(graph: fx.Graph, name: str) -> list[fx.Node]:
    """The nodes that call the function, method or op of this name."""
    return [n for n in graph.nodes if n.op in ("call_function", "call_method") and name_of(n) == name]


def run(subject: Subject, graph: fx.Graph | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Outputs, and for model graphs gradients and inputs after the run. The graph is compiled to Python and called."""
    values = [v.detach().clone() if isinstance(v, Tensor) else v for v in subject.values]
    leaves = {}
    if subject.level == "model":
        for i, (v, live) in enumerate(zip(values, subject.values, strict=True)):
            if isinstance(v, Tensor) and live.requires_grad:
                leaves[i] = v.requires_grad_()
    module = fx.GraphModule(subject.gm, edit.copy_plain(graph or subject.graph))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        outs = module(*values)
    found = {f"output {i}": o for i, o in enumerate(outs) if isinstance(o, Tensor)}
    total = sum((o.double() * rand(*o.shape, seed=i)).sum() for i, o in enumerate(outs) if differentiable(o))
    if isinstance(total, Tensor):
        total.backward()  # type: ignore[no-untyped-call]
    found |= {f"gradient {i}": v.grad for i, v in leaves.items() if v.grad is not None}
    found |= {f"input {i}": v for i, v in enumerate(values) if isinstance(v, Tensor)}  # torch 2.11 passes sizes, too
    return {k: t.detach() for k, t in found.items()}


def differentiable(value: object) -> bool:
    """Whether autograd goes through a value."""
    return isinstance(value, Tensor) and value.requires_grad


def same_results(a: dict[str, Tensor], b: dict[str, Tensor], numerics: str) -> None:
    """The same outputs, gradients and buffers, within the class; at least one of them is not zero."""
    assert a.keys() == b.keys()
    assert any(bool(t.any()) for k, t in a.items() if not k.startswith("input"))
    for key, x in a.items():
        y = b[key]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), key
        if not x.is_floating_point() or numerics == "exact" or key.startswith("input"):
            assert torch.equal(x, y), f"{key} is not the same"
        elif numerics == "rounding":
            error = float((x.double() - y.double()).norm() / x.double().norm().clamp_min(1e-12))
            assert error <= ALLOWED[numerics][x.dtype], f"{key} is off by {error:.1e}"


class Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node gave."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Keep shapes, strides and dtypes only: later nodes may write into the result."""
        result = super().run_node(n)
        self.found[n] = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), result
        )
        return result


def values_are_true(subject: Subject) -> None:
    """Every node has a recorded value, of the shape, dtype and (training level) strides that it computes."""
    recorder = Recorder(subject.gm)
    values = [v.detach().clone() if isinstance(v, Tensor) else v for v in subject.values]
    recorder.run(*values, enable_io_processing=False)
    for node, actual in recorder.found.items():
        if node.op in ("placeholder", "output"):
            continue
        want = edit.value(node)
        for a, w in zip(flat(actual), flat(want), strict=True):
            assert isinstance(w, Tensor), f"{node.name} has no recorded value"
            assert a.dtype == w.dtype, f"{node.name} is {a.dtype}, not {w.dtype}"
            assert list(a.shape) == sizes(w.shape, a.shape), f"{node.name} is {tuple(a.shape)}, not {tuple(w.shape)}"
            if subject.level == "training":
                kept = [(s, int(v)) for n, s, v in zip(a.shape, a.stride(), w.stride(), strict=True) if n > 1]
                assert all(s == v for s, v in kept), f"{node.name} has strides {a.stride()}, not {w.stride()}"


def sizes(recorded: Iterable[Any], actual: Iterable[int]) -> list[int]:
    """Recorded sizes; a symbolic one is taken for what it was in this run."""
    return [r if isinstance(r, int) else a for r, a in zip(recorded, actual, strict=True)]


def flat(value: Any) -> list[Tensor]:
    """The tensors in a value."""
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)]


def origin_is_kept(p: Pass, done: Rewritten) -> None:
    """New nodes name the pass, and carry a module path and a source line of what they replace. Others are as before."""
    before = {n.name: n for n in done.before.nodes}
    lines = {(edit.module_path(n), edit.source_line(n)) for n in done.before.nodes}
    for node in done.graph.nodes:
        was = before.get(node.name)
        if was is None:
            assert node.meta["moefx_passes"][-1] == p.name
            assert (edit.module_path(node), edit.source_line(node)) in lines, node.name
            assert edit.source_line(node), f"{node.name} lost its source line"
        elif node.op not in ("placeholder", "output"):
            same = was.target == node.target and str(was.args) == str(node.args) and str(was.kwargs) == str(node.kwargs)
            made = node.meta.get("moefx_passes", ())
            assert made == was.meta.get("moefx_passes", ()) if same else made[-1] == p.name, node.name


def untouched_twice(p: Pass, subject: Subject) -> None:
    """A second run changes nothing and finds nothing to change."""
    text, report = str(subject.graph), Report()
    PassManager((p,), ANY | frozenset(p.requires)).run(subject.level, subject.gm, report, subject.fake_mode)
    assert str(subject.graph) == text
    assert report.passes[0].matched == 0
    assert len(report.graphs) == 0


def put(subject: Subject, after: fx.Node, target: Any, *args: Any, users: bool = True) -> fx.Node:
    """Insert a call behind a node, with value and origin; the node's other users read it, if asked for."""
    graph, readers = subject.graph, list(after.users)
    with graph.inserting_after(max([after, *[a for a in args if isinstance(a, fx.Node)]])):
        new = graph.call_function(target, args)
    new.meta = edit.origin(after)
    with torch.no_grad(), subject.fake_mode:
        edit.set_value(new, target(*fx.map_arg(args, edit.value)), subject.level)
    for reader in readers if users else ():
        reader.replace_input_with(after, new)
    return new


def failure(p: Pass, subject: Subject, verify: bool = False) -> PassError:
    """The error that a pass raises on a copy of `subject`."""
    s = subject.copy()
    verifier = Verifier(s.values, grad=s.level == "model") if verify else None
    try:
        PassManager((p,), ANY | frozenset(p.requires)).run(s.level, s.gm, Report(), s.fake_mode, verifier)
    except PassError as e:
        return e
    raise AssertionError(f"{p.name} passed")


def symbolic(graph: fx.Graph, name: str) -> bool:
    """Whether all results of the nodes of this name have a size that is a symbol."""
    found = [t for n in nodes(graph, name) for t in flat(edit.value(n))]
    return bool(found) and all(any(isinstance(s, torch.SymInt) for s in t.shape) for t in found)
