"""A value of a model graph as a function of rows, for use outside of the graph, with any number of rows.

A router's logits are made of its input one row at a time. The nodes between the two are copied into a function of rows
[T, H]: what only changes the shape is left out, for shapes were fixed when the graph was captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from .edit import same_sizes, value
from .effects import modes, name_of
from .router import MOVES

Tensor = torch.Tensor
SHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "contiguous", "squeeze", "unsqueeze", "detach", "clone"})
CASTS = frozenset({"to", "type", "float", "double", "half", "bfloat16"})
# Of a row and of parameters, with a row of the same or of another width as the result.
ROWWISE = CASTS | {"linear", "matmul", "add", "sub", "mul", "div", "truediv", "neg", "tanh", "sigmoid", "rms_norm"}
LIMIT = 40


class NotRowwise(Exception):  # noqa: N818  control flow: the reason, for an error that says where
    """The value is no function of rows and parameters; the message says why."""


@dataclass(frozen=True)
class Rows:
    """A function of rows.

    Attributes:
        gm: takes rows [T, H] and the tensors of `names`; gives [T, ..], or what has no rows.
        names: parameters and buffers by their dotted names.
        regions: autocast regions that are in force where the value is made.
    """

    gm: fx.GraphModule
    names: tuple[str, ...]
    regions: tuple[tuple[str, tuple[object, ...]], ...]

    def __call__(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The value for rows x [T, H]."""
        with contextlib.ExitStack() as stack:
            for name, args in self.regions:
                if "autocast" in name:
                    stack.enter_context(torch.autocast(*args))  # type: ignore[arg-type]
            out: Tensor = self.gm(x, *(tensors[n].to(x.device) for n in self.names))
        return out


def rows_of(target: fx.Node, x: fx.Node, name_of_input: Callable[[fx.Node], str | None]) -> Rows:
    """`target` as a function of the rows of `x` (both of one model graph, which is left as it is).

    Args:
        name_of_input: the dotted name of a placeholder that is a parameter or a buffer, else None.

    Raises:
        NotRowwise: something else lies in between.
    """
    stem, new, names = _stem(x), fx.Graph(), list[str]()
    made: dict[fx.Node, tuple[fx.Node, bool]] = {stem: (new.placeholder("x"), True)}
    body, seen = list[fx.Node](), set[fx.Node]()

    def order(n: fx.Node) -> None:
        if n in seen or n is stem:
            return
        seen.add(n)
        for a in n.all_input_nodes:
            order(a)
        body.append(n)
        if len(body) > LIMIT:
            raise NotRowwise("it is made of more than the experts' input and parameters")

    order(target)
    for n in (n for n in body if n.op == "placeholder"):
        name = name_of_input(n)
        if name is None:
            raise NotRowwise(f"it reads {n.name}, which is no parameter and not the experts' input")
        made[n] = (new.placeholder(f"p{len(names)}"), False)
        names.append(name)
    for n in (n for n in body if n.op != "placeholder"):
        made[n] = _copied(new, n, made)
    new.output(made[target][0])
    _, *regions = modes(target.graph)[target]
    return Rows(fx.GraphModule({}, new), tuple(names), tuple(regions))


def _copied(new: fx.Graph, n: fx.Node, made: Mapping[fx.Node, tuple[fx.Node, bool]]) -> tuple[fx.Node, bool]:
    """A node's copy, and whether it has rows."""
    name, read = name_of(n), n.all_input_nodes
    if n.op not in ("call_function", "call_method"):
        raise NotRowwise(f"it reads {n.format_node()}")
    if not any(made[a][1] for a in read):
        return new.node_copy(n, lambda a: made[a][0]), False
    first = n.args[0] if n.args else None
    if name in SHAPES and isinstance(first, fx.Node) and made[first][1]:
        if not same_sizes(value(n).shape[-1:], value(first).shape[-1:]):
            raise NotRowwise(f"{name} ({n.name}) changes what a row is")
        return made[first][0], True
    product = name in ("linear", "matmul")
    if name not in ROWWISE or (product and (first is not read[0] or any(made[a][1] for a in read[1:]))):
        raise NotRowwise(f"{name} ({n.name}) lies between them")
    fixed = [value(a) for a in read if not made[a][1] and not product]
    if any(isinstance(v, Tensor) and v.dim() and v.shape[:-1].numel() != 1 for v in fixed):
        raise NotRowwise(f"{name} ({n.name}) gives each row something else")
    return new.node_copy(n, lambda a: made[a][0]), True


def _stem(x: fx.Node) -> fx.Node:
    """What `x` was before its shape and type were changed."""
    while name_of(x) in (*MOVES, *SHAPES) and x.args and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x
