"""A program as a forward for the block: an FX graph, and the Python function that it prints.

The function takes the arguments of the block's own forward, reads parameters where they are, calls the submodules that
were kept whole, and runs `moefx.experts` in the place of the experts' code.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from moefx.dialect.experts import ExpertsSpec

from .bank import Stack
from .capacity import CapacityRule, Dropping, evaluated
from .numbers import InputDtype, Ruled, Size
from .reading import Reading, Role, swap_halves
from .record import function_name
from .slice import Op, Program, Ref

Tensor = torch.Tensor
ops = torch.ops.moefx
_NAMES = """add sub mul truediv floordiv mod pow matmul neg eq ne lt le gt ge iadd isub imul itruediv ifloordiv
getitem setitem invert lshift rshift iand ior ixor"""
_OPERATORS = {f"__{name}__": getattr(operator, name) for name in _NAMES.split()} | {
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
}
_REFLECTED = {
    "__radd__": operator.add,
    "__rsub__": operator.sub,
    "__rmul__": operator.mul,
    "__rtruediv__": operator.truediv,
    "__rdiv__": operator.truediv,
    "__rpow__": operator.pow,
    "__rfloordiv__": operator.floordiv,
    "__rmatmul__": operator.matmul,
}


@dataclass(frozen=True)
class Assembly:
    """A canonical expert tensor, weights [E, out, in] or biases [E, out], made of parameters as they are stored."""

    roles: tuple[Role, ...]
    part: str  # weight | bias
    swapped: bool
    interleaved: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the order in which `build` reads them."""
        return tuple(n for r in self.roles if (s := self._stack(r)) is not None for n in s.names)

    def _stack(self, role: Role) -> Stack | None:
        return role.stack if self.part == "weight" else role.bias

    def _whole(self, role: Role, get: Callable[[str], Tensor]) -> Tensor:
        """One role [E, out, in] or [E, out]; a bias that is missing beside one that is there is zero."""
        stack = self._stack(role)
        if stack is None:
            known = next(s for r in self.roles if (s := self._stack(r)) is not None)
            return get(known.names[0]).new_zeros(role.stack.shape[0], role.out)
        whole = stack.gather(get)
        return whole.transpose(1, 2) if self.part == "weight" and role.turned else whole

    def build(self, get: Callable[[str], Tensor]) -> Tensor:
        """The tensor, differentiable with respect to the parameters that `get` finds by name."""
        turned = self.part == "weight" and any(r.turned for r in self.roles)
        stacks = [s for r in self.roles if (s := self._stack(r)) is not None and len(s.names) > 1]
        if len(stacks) == 2 and not turned and not self.swapped:
            # One copy instead of two: experts side by side, each with its gate and its up.
            pairs = itertools.chain.from_iterable(zip(*(s.names for s in stacks), strict=True))
            joined: Tensor = torch.stack([get(n) for n in pairs])
            return joined.view(stacks[0].shape[0], 2 * stacks[0].shape[1], *stacks[0].shape[2:])
        parts = [self._whole(r, get) for r in self.roles]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return swap_halves(whole, 1, self.interleaved) if self.swapped else whole


@dataclass
class Replay:
    """A block's program as a graph. `assemblies` are attributes that the graph reads besides the block's own."""

    graph: fx.Graph
    assemblies: dict[str, Assembly]
    spec: str

    def forward(
        self, block: nn.Module, *, live: bool, experts: Callable[..., Tensor] | None = None
    ) -> Callable[..., Any]:
        """The forward for `block`.

        Args:
            live: assemble expert tensors at every call. Otherwise they are read from the block as attributes, which
                the caller has to put there (`capture` makes them inputs of the graph).
            experts: is called in the place of `moefx.experts`, with its arguments.
        """
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if live and node.op == "get_attr" and node.target in self.assemblies:
                build = _builder(self.assemblies[str(node.target)], block)
                copied[node] = graph.call_function(build, ())
            else:
                copied[node] = graph.node_copy(node, lambda n: copied[n])
                if experts is not None and node.target is ops.experts:
                    copied[node].target = experts
        code = graph.python_code("self")
        scope = dict(code.globals)
        name = f"<moefx forward of {type(block).__name__} {next(_count)}>"
        linecache.cache[name] = (len(code.src), None, code.src.splitlines(True), name)
        exec(compile(code.src, name, "exec"), scope)  # what fx.GraphModule does, without a module of its own
        # A method: a capture of the block takes parameters for constants that it does not reach through `self`.
        return types.MethodType(scope["forward"], block)


_count = itertools.count()


def _builder(assembly: Assembly, block: nn.Module) -> Callable[[], Tensor]:
    def build_experts() -> Tensor:
        return assembly.build(block.get_parameter)

    return build_experts


class Emitter:
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> None:
        self.graph = fx.Graph()
        self.leaves: list[fx.Node] = []
        self.assemblies: dict[str, Assembly] = {}
        self.spec = ""
        self.sizes: dict[Size | Ruled, Any] = {}
        self.values: list[Any] = []
        self.floating: fx.Node | None = None
        self.parameter = ""
        for name, v in zip(names, args, strict=True):
            self._leaf(v, self.graph.placeholder(name))
        for name, v in kwargs.items():
            self._leaf(v, self.graph.placeholder(name, default_value=None))

    def _leaf(self, value: Any, node: fx.Node) -> None:
        if isinstance(value, Tensor):
            self.leaves.append(node)
            if value.is_floating_point() and self.floating is None:
                self.floating = node
        elif isinstance(value, tuple | list):
            for i, v in enumerate(value):
                self._leaf(v, self.graph.call_function(operator.getitem, (node, i)))
        elif isinstance(value, dict):
            for k, v in value.items():
                self._leaf(v, self.graph.call_function(operator.getitem, (node, k)))

    def number(self, number: Any) -> Any:
        """A number that follows sizes as a node."""
        if not isinstance(number, Size | Ruled):
            return number
        if number not in self.sizes:
            self.sizes[number] = self._size(number) if isinstance(number, Size) else self._ruled(*number.options[0])
        return self.sizes[number]

    def _size(self, size: Size) -> Any:
        out: Any = None
        for leaf, axis in size.factors:
            n = self.graph.call_method("size", (self.leaves[leaf], axis))
            out = n if out is None else self.graph.call_function(operator.mul, (out, n))
        if size.ratio.numerator != 1:
            out = self.graph.call_function(operator.mul, (out, size.ratio.numerator))
        if size.ratio.denominator != 1:
            out = self.graph.call_function(operator.floordiv, (out, size.ratio.denominator))
        if size.offset:
            out = self.graph.call_function(operator.add, (out, size.offset))
        return self.graph.call_function(max, (1, out)) if size.guarded else out

    def _ruled(self, size: Size, rule: CapacityRule) -> Any:
        if rule.fixed is not None:
            return rule.fixed
        call, tokens = self.graph.call_function, self.number(size)
        rows = evaluated(rule.expr, tokens, lambda op, a, b: call(op, (a, b)))
        rows = call(torch.sym_int, (rows,)) if rule.rounding == "floor" else call(_ceil, (rows,))
        if rule.least:
            rows = call(max, (rows, rule.least))
        return call(min, (tokens, rows)) if rule.within else rows

    def read(self, tree: Any) -> Any:
        """Arguments with references and sizes replaced by nodes."""
        if isinstance(tree, Ref):
            node = self.values[tree.op]
            for key in tree.path:
                node = self.graph.call_function(operator.getitem, (node, key))
            return node
        if isinstance(tree, Size | Ruled):
            return self.number(tree)
        if isinstance(tree, InputDtype):
            return self.graph.call_function(getattr, (self.dtype_of(), "dtype"))
        if isinstance(tree, tuple | list):
            return type(tree)(map(self.read, tree))
        if isinstance(tree, dict):
            return {k: self.read(v) for k, v in tree.items()}
        if isinstance(tree, slice):
            return slice(self.read(tree.start), self.read(tree.stop), self.read(tree.step))
        return tree

    def call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        """A recorded function call as a node that prints as Python."""
        name = function_name(func)
        if getattr(func, "__name__", "") == "__get__":
            return self.graph.call_function(getattr, (args[0], name))
        if name in _OPERATORS and not kwargs:
            return self.graph.call_function(_OPERATORS[name], args)
        if name in _REFLECTED:
            return self.graph.call_function(_REFLECTED[name], (args[1], args[0]))
        if func == "view" or getattr(Tensor, name, None) is func:
            return self.graph.call_method(func if isinstance(func, str) else name, args, kwargs)
        return self.graph.call_function(func, args, kwargs)

    def dtype_of(self) -> fx.Node:
        """A tensor that has the dtype in which the block is run: its first floating input, or one of its parameters."""
        return self.floating if self.floating is not None else self.graph.get_attr(self.parameter)

    def op(self, op: Op) -> Any:
        if op.kind == "input":
            return self.leaves[op.target]
        if op.kind == "state":
            return self.graph.get_attr(op.target)
        if op.kind == "experts":
            return self.experts(op.target, self.read(op.kwargs), op.kwargs["capacity"])
        args, kwargs = self.read(op.args), self.read(op.kwargs)
        before = None
        if not op.grad:
            before = self.graph.call_function(torch.is_grad_enabled, ())
            self.graph.call_function(torch._C._set_grad_enabled, (False,))
        node = (
            self.graph.call_module(op.target, args, kwargs)
            if op.kind == "module"
            else self.call(op.target, args, kwargs)
        )
        if before is not None:
            self.graph.call_function(torch._C._set_grad_enabled, (before,))
        return node

    def weights(self, reading: Reading) -> list[fx.Node]:
        """Nodes of the canonical tensors, [E, out, in] and [E, out]; a stack that is stored so is read as it is."""
        self.spec = str(ExpertsSpec(reading.kind, "nk", reading.bias))
        nodes: list[fx.Node] = []
        interleaved = reading.kind.interleaved
        for label, roles, swapped in (("up", reading.up, reading.swapped), ("down", (reading.down,), False)):
            for part in ("weight", "bias") if reading.bias else ("weight",):
                stacks = [r.stack if part == "weight" else r.bias for r in roles]
                first = stacks[0]
                if not any(stacks):
                    rows = sum(r.out for r in roles)
                    node = self.graph.call_method("new_zeros", (nodes[-1], (roles[0].stack.shape[0], rows)))
                elif len(stacks) == 1 and first is not None and len(first.names) == 1 and not swapped:
                    node = self.graph.get_attr(first.names[0])
                    if first.spare:
                        node = self.graph.call_method("narrow", (node, 0, 0, first.shape[0]))
                    elif part == "weight" and self.dims(first.names[0]) == 2:
                        node = self.graph.call_method("view", (node, *first.shape))
                    if part == "weight" and roles[0].turned:
                        node = self.graph.call_method("transpose", (node, 1, 2))
                else:
                    name = f"moefx_{label}_{part}"
                    self.assemblies[name] = Assembly(roles, part, swapped, interleaved)
                    node = self.graph.get_attr(name)
                nodes.append(node)
        return nodes

    dims: Callable[[str], int]

    def experts(self, reading: Reading, d: dict[str, Any], drop: Dropping | None) -> fx.Node:
        call, method = self.graph.call_function, self.graph.call_method
        k, E = d["k"], d["experts"]
        x = method("flatten", (d["x"], 0, -2))
        if d["expert_choice"]:
            y = call(ops.expert_choice, (x, d["idx"][0], d["w"], self.weights(reading), self.spec))
            return method("view", (y, d["shape"]))
        if d["gate_matrix"]:
            rows = method("reshape", (d["idx"][0], -1, E))
            idx = call(getattr, (method("topk", (rows, k)), "indices"))
        elif d["mask"]:
            top = method("topk", (method("int", (method("reshape", (d["idx"][0], -1, E)),)), k))
            kept, idx = call(operator.getitem, (top, 0)), call(operator.getitem, (top, 1))
            idx = call(torch.where, (call(operator.gt, (kept, 0)), idx, E))
        elif len(d["idx"]) == 1:
            idx = method("reshape", (d["idx"][0], -1, k))
        else:
            idx = call(torch.stack, ([method("reshape", (i, -1)) for i in d["idx"]],), {"dim": 1})
        real = method("clamp_max", (idx, E - 1)) if d["rest"] else idx
        if d["w"] is None:
            w = call(torch.ones_like, (idx,), {"dtype": call(getattr, (x, "dtype"))})
        elif d["gates"]:
            w = method("gather", (method("reshape", (d["w"], -1, E)), 1, real))
        else:
            w = method("reshape", (d["w"], -1, k))
        if d["factor"] != 1:
            w = call(operator.mul, (w, d["factor"]))
        if drop is not None:
            idx = self.dropped(idx, drop, E, k)
        if d["scaled"] is not None:
            s = d["scaled"]
            if d["scaled_gates"]:
                s = method("gather", (method("reshape", (s, -1, E)), 1, real))
            x, idx, w = self.scale(x, idx, w, s, k)
        y = call(ops.experts, (x, idx, w, self.weights(reading), self.spec))
        if d["rest"] == "identity":
            alone = method("sum", (method("masked_fill", (w, call(operator.lt, (idx, E)), 0)), -1, True))
            y = call(operator.add, (y, method("to", (call(operator.mul, (x, alone)), call(getattr, (x, "dtype"))))))
        if d["scaled"] is not None:
            y = method("sum", (method("unflatten", (y, 0, (-1, k))), 1))
        return method("view", (y, d["shape"]))

    def scale(self, x: Any, idx: Any, w: Any, s: Any, k: int) -> tuple[Any, Any, Any]:
        """Weights on the experts' inputs: every choice is a token of its own."""
        call, method = self.graph.call_function, self.graph.call_method
        s = method("reshape", (s, -1, k, 1))
        x = method("flatten", (call(operator.mul, (method("unsqueeze", (x, 1)), s)), 0, 1))
        return x, method("reshape", (idx, -1, 1)), method("reshape", (w, -1, 1))

    def dropped(self, idx: Any, drop: Dropping, E: int, k: int) -> Any:
        """Indices with E in the place of choices beyond the capacity."""
        call, method = self.graph.call_function, self.graph.call_method
        parts = method("reshape", (idx, self.number(drop.groups), -1, k))
        if drop.order.endswith("choice"):
            parts = method("transpose", (parts, 1, 2))
        flat = method("flatten", (parts, 1))
        counts = method("cumsum", (call(F.one_hot, (flat, E)), 1))
        rank = method("squeeze", (method("gather", (counts, 2, method("unsqueeze", (flat, -1)))), -1))
        keep = call(operator.le, (rank, self.number(drop.rows)))
        if drop.order.endswith("choice"):
            keep = method("transpose", (method("unflatten", (keep, 1, (k, -1))), 1, 2))
        return call(torch.where, (method("reshape", (keep, -1, k)), idx, E))


def _ceil(x: float) -> int:
    return int(-(-x // 1))


def emit(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], block: nn.Module, out_type: type | None
) -> Replay:
    """The graph of a program; `args` and `kwargs` show how the block is called."""
    emitter = Emitter(args, kwargs, _names(block, args, kwargs))
    params = dict(block.named_parameters(remove_duplicate=False))
    emitter.parameter = next(iter(params))
    emitter.dims = lambda name: params[name].dim()
    for op in program.ops:
        emitter.values.append(emitter.op(op))
    out = emitter.read(program.out)
    if out_type is not None:
        out = emitter.graph.call_function(out_type, (), out)
    emitter.graph.output(out)
    return Replay(emitter.graph, emitter.assemblies, emitter.spec)


def _names(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """What the block's own forward calls its positional arguments: graphs show them under these names."""
    names = [n for n, p in inspect.signature(block.forward).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    known = len(names) >= len(args) and not set(names[: len(args)]) & set(kwargs)
    return names[: len(args)] if known else [f"arg{i}" for i in range(len(args))]
