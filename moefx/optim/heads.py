"""Which projections of attention hold several matrices, told from shapes and counts of heads, never from a name's part.

The output projection reads what all heads wrote, so it tells their number times their width; an attribute of the module
or of its config tells one of the two. The order of rows cannot be told from shapes: "qkv" assumes queries, then keys,
then values. Where heads take turns (GPT-NeoX, BLOOM, Falcon), "heads" is right and "qkv" is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .roles import Block, Tree

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
_WIDTHS = ("head_dim", "head_size")
Split = int | tuple[int, ...]
KINDS = ("qkv", "heads")


def splits_of(root: nn.Module, kind: str) -> dict[str, Split]:
    """Path of a weight -> its `split`, for every projection in which `kind` ("qkv" or "heads") finds several blocks.

    "qkv" cuts fused queries, keys and values (and fused keys and values) apart; "heads" cuts the projections into heads
    of queries, keys and values, fused or not. Left whole: output projections, attention with projections inside
    (latent attention), and modules whose counts of heads do not fit their shapes.
    """
    tree = Tree.of(root)
    found: dict[str, Split] = {}
    for path, module in tree.modules.items():
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            found.update({prefix + name: split for name, split in _of_torch(module, kind)})
    for path, block in tree.attention.items():
        for layer, split in _of_block(tree, path, block, kind):
            found[f"{layer}.weight" if layer else "weight"] = split
    return found


def _of_torch(module: nn.MultiheadAttention, kind: str) -> Iterator[tuple[str, Split]]:
    width, head = module.embed_dim, module.head_dim
    if module.in_proj_weight is not None:
        yield "in_proj_weight", head if kind == "heads" else (width,) * 3
    elif kind == "heads" and module.num_heads > 1:
        yield from ((name, head) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"))


def _of_block(tree: Tree, path: str, block: Block, kind: str) -> Iterator[tuple[str, Split]]:
    queries = tree.linears[block.layers[block.last]][0]  # what the output projection reads
    readers = [p for i, p in enumerate(block.layers) if i != block.last]
    inside = [tree.modules[p] for p in tree.below(path)]
    heads, head = _count(inside, _HEADS), _count(inside, _WIDTHS)
    if head is None and heads:
        head = queries // heads
    if not head or queries % head or (heads and heads * head != queries):
        return
    if any(tree.linears[p][0] != block.width for p in readers):
        return  # latent attention: low-rank projections in between have other heads
    outs = {p: tree.linears[p][1] for p in readers if getattr(tree.modules[p], "out_features", None) is not None}
    if kind == "heads":
        yield from ((p, head) for p, out in outs.items() if out % head == 0 and out > head)
        return
    known = _count(inside, _KEY_HEADS)
    for p, out in outs.items():
        others = [tree.linears[x][1] for x in readers if x != p]
        if others not in ([], [queries]):
            continue
        keys, odd = divmod(out - (0 if others else queries), 2)  # width of the keys, if this holds them and the values
        fits = keys > 0 and not odd and keys % head == 0 and queries % keys == 0 and out != queries
        if fits and known in (None, keys // head):
            yield p, (keys, keys) if others else (queries, keys, keys)


def _count(modules: list[nn.Module], names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a number, of the modules before their configs."""
    holders: list[Any] = [*modules, *(getattr(m, "config", None) for m in modules)]
    for holder in holders:
        for name in names:
            if type(value := getattr(holder, name, None)) is int and value > 0:
                return value
    return None
