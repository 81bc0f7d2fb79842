"""The expert products of a training graph: which is fprop, dgrad or wgrad, and what its operands are.

fprop  grouped_mm(input [S, K], weight [E, N, K])          up: reads routed rows;  down: reads the activation
dgrad  grouped_mm(grad [S, N], weight [E, K, N])           the weight of an fprop, transposed
wgrad  grouped_wgrad(grad [S, N], input [S, K])            either order
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

import moefx.dialect  # noqa: F401  registers the ops
from moefx import compat
from moefx.errors import PassError

from .edit import arguments, find, is_backward, module_path, place, targets

ops = torch.ops.moefx
aten = torch.ops.aten
KEPT = "moefx_gemm"  # meta of a product that a recipe leaves wide beside others that it does not: up or down
_ROUTED = targets(ops.permute, ops.plan_permute)


@dataclass(frozen=True)
class Operand:
    """One factor of a product: its node, its role, and for a weight the parameter and whether it is read transposed."""

    node: fx.Node
    role: str
    source: fx.Node
    transposed: bool = False


@dataclass(frozen=True)
class Product:
    """One grouped product with both operands in the order in which the node reads them."""

    node: fx.Node
    kind: str
    gemm: str
    path: str
    operands: tuple[Operand, Operand]


def source(w: fx.Node) -> tuple[fx.Node, bool]:
    """The node behind transposes of the last two axes, and whether an odd number of them was peeled off."""
    flipped = False
    while _swaps_last_two(w):
        w, flipped = w.args[0], not flipped  # type: ignore[assignment]
    return w, flipped


def _swaps_last_two(node: fx.Node) -> bool:
    if node.target is aten.transpose.int:
        return {int(d) % 3 for d in node.args[1:3]} == {1, 2}  # type: ignore[arg-type]
    return node.target is aten.permute.default and list(node.args[1]) == [0, 2, 1]  # type: ignore[arg-type]


def products(graph: fx.Graph) -> list[Product]:
    """All grouped products in graph order.

    Raises `PassError` for one that is neither fprop, dgrad nor wgrad (of a second derivative, say).
    """
    found: list[Product] = []
    of_weight: dict[fx.Node, str] = {}
    of_input: dict[fx.Node, str] = {}
    for node in find(graph, ops.grouped_mm, ops.grouped_wgrad):
        a = arguments(node)
        path = module_path(node)
        if "w" in a:
            weight, flipped = source(a["w"])
            if not is_backward(node):
                gemm = "up" if _is_routed(a["x"]) else "down"
                of_weight[weight], of_input[a["x"]] = gemm, gemm
                kind, role = "fprop", "input"
            elif weight in of_weight or KEPT in node.meta:
                gemm, kind, role = of_weight.get(weight) or node.meta[KEPT], "dgrad", "grad"
            else:
                raise _unknown(node, "its weight is that of no product of the forward")
            rows, w = Operand(a["x"], role, a["x"]), Operand(a["w"], "weight", weight, flipped)
            found.append(Product(node, kind, gemm, path, (rows, w)))
        else:
            pair = [a["a"], a["b"]]
            inputs = [n for n in pair if n in of_input]
            if KEPT in node.meta:
                inputs = [n for n in pair if not is_backward(n)]
            if len(inputs) != 1:
                raise _unknown(node, f"{len(inputs)} of its operands are inputs of a product of the forward")
            first, second = (Operand(n, "input" if n is inputs[0] else "grad", n) for n in pair)
            gemm = of_input.get(inputs[0]) or node.meta[KEPT]
            found.append(Product(node, "wgrad", gemm, path, (first, second)))
    return found


def _unknown(node: fx.Node, why: str) -> PassError:
    return PassError(
        f"product {node.name} is neither a forward product nor a gradient of one",
        where=place(node),
        why=why,
        todo="keep the module wide by a rule of the recipe, or leave out the pass that changed its products",
    )


def _is_routed(x: fx.Node) -> bool:
    return x.target in _ROUTED or (x.target is compat.getitem and x.args[0].target in _ROUTED)  # type: ignore[union-attr]
