"""A routed sum that was recognised in a model graph, as a few nodes in its place, and the proof that they do the same.

The patch is a graph of its own. It is run beside the stretch that it replaces, on values that neither has seen, and
then copied into the model graph node by node, so that what was proved is what is put in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moefx import compat
from moefx.errors import first_line
from moefx.graph.effects import mutated

from .capacity import Dropping
from .certify import LIMITS, relative
from .colour import tensor
from .explain import Weights
from .fit import Fit
from .record import Obj
from .replay import Emitter
from .slice import NoSlice, Region, experts_op
from .stretch import Stretch, base

Tensor = torch.Tensor
_MOST = 40  # runs in which every expert should have had a token
_VIEWS = ("flatten", "reshape", "view")


class NotProvedError(Exception):
    """The patch computes something else; the text says in what, and by how much."""


@dataclass
class Patch:
    """Nodes for one routed sum. `inputs` are nodes of the model graph, one for every placeholder of `graph`."""

    graph: fx.Graph
    inputs: list[fx.Node]
    y: fx.Node
    end: int  # position in the stretch behind which the sum is complete
    spec: str

    def __call__(self, env: dict[fx.Node, Any]) -> Any:
        """The sum from values of the model graph's nodes."""
        owner = torch.nn.Module()
        return fx.Interpreter(owner, graph=self.graph).run(*[env[n] for n in self.inputs])


def make_patch(stretch: Stretch, fit: Fit, weights: Weights) -> Patch:
    """The nodes for a fit; raises `NoSlice` when what they would read is not there any more."""
    region = Region(fit, weights)
    objs: dict[Obj, fx.Node] = {s.obj: stretch.node_of(s.obj) for s in region.inputs}
    for s in region.inputs:
        if s.obj.tensor._version and _changed(stretch, objs[s.obj], s.time, fit.y.time):
            raise NoSlice("a value that the experts read is written in place before they are done")
    dynamic = any(compat.is_symbol(size) for n in objs.values() if (t := tensor(n)) is not None for size in t.shape)
    if weights.capacity is not None and dynamic:
        raise NoSlice("experts have a capacity, and the number of tokens is a symbol")
    read = tuple(s.value for s in {s.obj: s for s in region.inputs}.values())
    emitter = Emitter(read, {}, [f"arg{i}" for i in range(len(read))])
    leaf = dict(zip({s.obj: s for s in region.inputs}, emitter.leaves, strict=True))
    by_name = {n.name: n for n in stretch.inputs}
    values = {name: t for name, n in by_name.items() if (t := tensor(n)) is not None}
    emitter.dims = lambda name: values[name].dim()
    detail = experts_op(region, {}, leaf.__getitem__).kwargs
    capacity = weights.capacity
    drop = None
    if capacity is not None:
        drop = Dropping(capacity.order, capacity.groups, capacity.rows)
    y = stretch.node_of(fit.y.obj)
    shape = tensor(y)
    assert shape is not None
    if any(map(compat.is_symbol, shape.shape)):
        detail["shape"] = _symbolic(shape.shape)
    out = emitter.experts(fit.reading, detail, drop)
    emitter.graph.output(out)
    inputs = [*objs.values(), *_with_parameters(emitter, by_name)]
    x = tensor(stretch.node_of(fit.x.obj))
    assert x is not None
    _in_one_dtype(emitter.graph, x.dtype, dict(zip(emitter.graph.find_nodes(op="placeholder"), inputs, strict=True)))
    return Patch(emitter.graph, inputs, y, fit.y.time, emitter.spec)


def _symbolic(shape: Any) -> tuple[Any, ...]:
    """A shape with -1 in the place of its one symbol."""
    found = tuple(-1 if compat.is_symbol(s) else s for s in shape)
    if found.count(-1) > 1:
        raise NoSlice("several sizes of the sum are symbols")
    return found


def _changed(stretch: Stretch, node: fx.Node, since: int, until: int) -> bool:
    mine = base(node)
    return any(base(m) is mine for n in stretch.nodes[since + 1 : until + 1] for m in mutated(n))


def _with_parameters(emitter: Emitter, by_name: dict[str, fx.Node]) -> list[fx.Node]:
    """Put placeholders and the assembling of stacks in the place of `get_attr` nodes; the placeholders' nodes."""
    graph, made = emitter.graph, dict[str, fx.Node]()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    last = emitter.leaves[-1]

    def get(name: str) -> fx.Proxy:
        if name not in made:
            with graph.inserting_after([last, *made.values()][-1]):
                made[name] = graph.placeholder(name)
        return fx.Proxy(made[name], tracer)

    for node in graph.find_nodes(op="get_attr"):
        assembly = emitter.assemblies.get(str(node.target))
        names = [str(node.target)] if assembly is None else assembly.names
        for name in names:
            get(name)
        with graph.inserting_before(node):
            # Proxies pass for tensors: what is called on them is written into the graph.
            new: Any = get(names[0]) if assembly is None else assembly.build(get)  # type: ignore[arg-type]
        node.replace_all_uses_with(new.node)
        graph.erase_node(node)
    return [by_name[name] for name in made]


def _in_one_dtype(graph: fx.Graph, dtype: torch.dtype, inputs: dict[fx.Node, fx.Node]) -> None:
    """Types as they are in the model graph: weights in that of x, sizes and types as constants."""
    for node in list(graph.nodes):
        if node.target is getattr and node.args[1] == "dtype":
            node.replace_all_uses_with(None)
            for user in list(graph.nodes):
                if user.kwargs.get("dtype", 0) is None:
                    user.kwargs = {**user.kwargs, "dtype": dtype}
            graph.erase_node(node)
        elif node.op == "call_method" and node.target in _VIEWS and node.args[0] in inputs:
            t = tensor(inputs[node.args[0]])
            if t is not None and _keeps(node, t):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
    final: Any = graph.output_node().args[0]
    if final.target == "view" and len(final.args[1]) == 2:
        final.replace_all_uses_with(final.args[0])
        graph.erase_node(final)
    for node in graph.nodes:
        if node.op == "call_function" and "moefx" in str(node.target):
            at = next(i for i, a in enumerate(node.args) if isinstance(a, list | tuple))
            cast = []
            for w in node.args[at]:
                source = w
                while source.all_input_nodes:
                    source = source.all_input_nodes[0]
                held = tensor(inputs[source])
                if held is not None and held.dtype != dtype:
                    with graph.inserting_before(node):
                        w = graph.call_method("to", (w, dtype))
                cast.append(w)
            node.args = (*node.args[:at], cast, *node.args[at + 1 :])


def _keeps(node: fx.Node, t: Tensor) -> bool:
    """Whether a view has the shape of its input, for all sizes."""
    if node.target == "view":
        return node.args[1] == tuple(t.shape)
    if t.dim() != 2:
        return False
    last = node.args[-1]
    return node.target == "flatten" or (node.args[1:] == (-1, last) and bool(t.shape[-1] == last))


def prove(stretch: Stretch, patch: Patch, fit: Fit) -> dict[str, float]:
    """Run both on values of several kinds, in float32 and in the graph's own precision; the largest differences.

    Runs go on until every expert has had tokens. Raises `NotProvedError`.
    """
    errors: dict[str, float] = {}
    left = set(range(fit.experts)) if fit.choice is None else set()
    idx = [stretch.node_of(s.obj) for s in fit.idx]
    kinds = ("random", "skewed", "alike", "large", "zeros")
    cases = [*((torch.float32, kind) for kind in kinds), *((None, kind) for kind in ("random", "alike"))]
    number = 0
    while cases:
        dtype, kind = cases.pop(0)
        number += 1
        env = _compare(stretch, patch, number, kind, dtype, errors)
        for n in idx if left else ():
            v = env.get(n)
            if v is None:  # the graph cannot run in its own precision here
                continue
            chosen = v.reshape(-1, fit.experts).topk(fit.k).indices if v.is_floating_point() else v
            left -= set(chosen.reshape(-1).tolist())
        if not cases and left:
            if number >= _MOST:
                raise NotProvedError(f"expert {min(left)} was chosen for no token of {number} runs")
            cases.append((torch.float32, "random"))
    return errors


def _compare(
    stretch: Stretch, patch: Patch, seed: int, kind: str, dtype: torch.dtype | None, errors: dict[str, float]
) -> dict[fx.Node, Any]:
    wide = dtype is not None
    values = stretch.values(1000 + seed, kind, dtype)
    leaves = {n: v.requires_grad_() for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
    held = {n: v.view_as(v) if n in leaves else v for n, v in values.items()}
    try:
        env = stretch.run(held, wide=wide, upto=patch.end + 1)
    except Exception as e:
        if wide:
            raise NotProvedError(f"{kind} values: the graph fails: {type(e).__name__}: {first_line(e)}") from e
        return values
    want = env[patch.y]
    with torch.enable_grad():
        try:
            got = patch(env)
        except Exception as e:
            raise NotProvedError(
                f"{kind} values: the rewritten graph fails: {type(e).__name__}: {first_line(e)}"
            ) from e
    if not wide and got.dtype != want.dtype:
        final: Any = patch.graph.output_node().args[0]
        with patch.graph.inserting_before(patch.graph.output_node()):
            cast = patch.graph.call_method("to", (final, want.dtype))
        patch.graph.output_node().args = (cast,)
        got = got.to(want.dtype)
    name = str(want.dtype).removeprefix("torch.")
    for_outputs, for_gradients = LIMITS.get(
        want.dtype, LIMITS[torch.bfloat16] if want.dtype == torch.float16 else LIMITS[torch.float32]
    )
    _close(
        f"{kind} values, {name}: the sum",
        want,
        got,
        want.detach().double().norm(),
        for_outputs,
        errors,
        f"{name} output",
    )
    if not want.requires_grad or not got.requires_grad:
        if want.requires_grad != got.requires_grad:
            raise NotProvedError(f"{kind} values: gradients are switched off on one side")
        return env
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed)).to(want)
    ends = list(leaves.values())
    a: Any = torch.autograd.grad([want], ends, [g], allow_unused=True, retain_graph=True)
    b: Any = torch.autograd.grad([got], ends, [g], allow_unused=True)
    scale = max(x.double().norm() for x in a if x is not None)
    for n, x, y in zip(leaves, a, b, strict=True):
        if x is None and y is None:
            continue
        # Of an expert without tokens a loop leaves no gradient, one product for all a gradient of zeros.
        x, y = (torch.zeros_like(leaves[n]) if v is None else v for v in (x, y))
        what = f"{kind} values, {name}: the gradient of {n.name}"
        _close(what, x, y, scale, for_gradients, errors, f"{name} gradient")
    return env


def _close(what: str, a: Tensor, b: Tensor, scale: Tensor, limit: float, errors: dict[str, float], key: str) -> None:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise NotProvedError(f"{what} is {b.dtype} {tuple(b.shape)}, not {a.dtype} {tuple(a.shape)}")
    noise = 0.1 if a.dtype in (torch.bfloat16, torch.float16) else 1e-3
    error = relative(a.detach(), b.detach(), scale, noise)
    errors[key] = max(errors.get(key, 0.0), error)
    if not error <= limit:
        raise NotProvedError(f"{what} differs by {error:.1e} (limit {limit:.0e})")
