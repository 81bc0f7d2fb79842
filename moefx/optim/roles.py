"""What every parameter of a model is for, read from module types and shapes, never from a name in its path.

The head is what the model says its output embedding is. Experts are stacked tensors, or isomorphic modules with a
router beside them; the router is the matrix with one row per expert. What is left of the linear layers is cut into
blocks: the nearest module that holds two of them. A block that reads a width and writes it back is attention or an MLP
(feed-forward or another mixer, as in Mamba); which one is told by how many layers read that width and how wide they
are. Anything that no rule covers is "other". Where an attribute counts, its whole name does: `eps`, `bias` beside
`weight`, `num_heads`, `num_experts` and the like, as torch and transformers call them.

Shapes cannot tell a stack of E plain MLPs with a linear layer of E outputs behind it from experts with a router, nor
grouped queries fused into twice the output's width from a fused gate. The first is read as experts, the second as an
MLP unless the module counts its heads.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

# What the released code gives LITE: hidden matrices, embeddings and norms. Not the router, not the head.
LITE_ROLES = ("embedding", "norm", "expert", "attention", "mlp")
ROLES = ("router", "embedding", "head", "norm", "bias", "expert", "attention", "mlp", "other")

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
_EPS = re.compile(r"(^|_)(eps|epsilon)$")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "head_dim", "head_size")
_EXPERT_COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CLIMB = 3  # how many modules above an expert bank its router is looked for, itself not counted

Dims = tuple[int, int]  # width read, width written


class Block(NamedTuple):
    """Linear layers that read a width and write it back."""

    layers: list[str]  # their paths
    width: int
    last: int  # index of the layer that writes the width last


def roles_of(root: nn.Module) -> dict[str, str]:
    """Path -> role of every parameter, once for each path that leads to it."""
    tree = Tree.of(root)
    return {
        f"{path}.{name}" if path else name: tree.role(path, name)
        for path, module in tree.modules.items()
        for name in own_parameters(module)
    }


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters registered on a module itself."""
    return {n: p for n, p in module._parameters.items() if p is not None}


def is_norm(module: nn.Module) -> bool:
    """A normalisation of torch, or a leaf with one vector (and a bias of its size) and a small number called eps."""
    if isinstance(module, _NORMS):
        return True
    own = own_parameters(module)
    shapes = [tuple(p.shape) for p in module.parameters()]
    if not 1 <= len(own) == len(shapes) <= 2 or len(set(shapes)) > 1 or len(shapes[0]) != 1:
        return False
    return any(isinstance(v, float) and 0 < v <= 1e-2 and _EPS.search(k) for k, v in vars(module).items())


def is_embedding(module: nn.Module) -> bool:
    """An embedding of torch, or a table with the attributes of one."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return True
    weight = module._parameters.get("weight")
    sizes = (getattr(module, "num_embeddings", None), getattr(module, "embedding_dim", None))
    return weight is not None and tuple(weight.shape) == sizes


def linear(module: nn.Module) -> Dims | None:
    """Widths that a linear layer reads and writes; None for any other module. Weights may be [out, in] or [in, out]."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or is_embedding(module):
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    shape = tuple(weight.shape)
    if shape == (getattr(module, "out_features", None), getattr(module, "in_features", None)):
        return shape[1], shape[0]
    if shape == (getattr(module, "nx", None), getattr(module, "nf", None)):  # transformers' Conv1D
        return shape[0], shape[1]
    return None


def is_bias(module: nn.Module, name: str) -> bool:
    """A vector registered as `bias` beside a matrix `weight`, or as `x_bias` beside a matrix `x`; torch's own too."""
    if isinstance(module, nn.MultiheadAttention):
        return name in ("in_proj_bias", "bias_k", "bias_v")
    own = own_parameters(module)
    return own[name].dim() == 1 and (isinstance(module, nn.RNNBase) or is_bias_of(own, name))


def is_bias_of(own: dict[str, nn.Parameter], name: str) -> bool:
    """Whether a parameter is registered as the bias of one with more dimensions, by torch's two conventions."""
    partner = "weight" if name == "bias" else name.removesuffix("_bias")
    return partner != name and partner in own and own[partner].dim() > own[name].dim()


def chain(dims: list[Dims]) -> tuple[int, int] | None:
    """The width that a block reads and writes back, and the index of the layer that writes it last.

    The width of a block is what its first layer reads, provided that another one writes it.
    """
    for i, (width, _) in enumerate(dims):
        writers = [j for j, (_, out) in enumerate(dims) if out == width and j != i]
        if writers:
            return width, writers[-1]
    return None


def reads(dims: list[Dims], width: int, last: int) -> list[int]:
    """What the layers that read `width` write, without the one that writes the block's output."""
    return [out for i, (read, out) in enumerate(dims) if read == width and i != last]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


class Tree:
    """A module tree, every path to a module, and the roles that have been given to parameters so far."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.paths = list(self.modules)
        self.roles: dict[str, str] = {}
        self.attention: dict[str, Block] = {}  # of linear layers, by path; torch's own holds its matrices itself
        # named_modules goes depth first, so that what lies under a module follows it without a gap.
        self.span: dict[str, tuple[int, int]] = {}
        open_: list[str] = []
        for i, path in enumerate([*self.paths, None]):
            while open_ and (path is None or not _under(path, open_[-1])):
                done = open_.pop()
                self.span[done] = (self.span[done][0], i)
            if path is not None:
                self.span[path] = (i, i)
                open_.append(path)
        linears = ((path, linear(m)) for path, m in self.modules.items())
        self.linears = {path: dims for path, dims in linears if dims is not None}

    @classmethod
    def of(cls, root: nn.Module) -> Tree:
        """With all claims made."""
        tree = cls(root)
        tree.claim_heads()
        tree.claim_torch_attention()
        tree.claim_experts()
        tree.claim_blocks()
        return tree

    def below(self, path: str) -> list[str]:
        """Paths of a module and everything under it, in the order of registration."""
        start, end = self.span[path]
        return self.paths[start:end]

    def role(self, path: str, name: str) -> str:
        """The role of one parameter, after all claims."""
        module = self.modules[path]
        if is_norm(module):
            return "norm"
        if is_embedding(module):
            return "embedding"
        claimed = self.roles.get(f"{path}.{name}" if path else name)
        return claimed or ("bias" if is_bias(module, name) else "other")

    def claim(self, path: str, role: str, names: Iterable[str] = ("weight",)) -> None:
        """Give a role to parameters of one module."""
        for name in names:
            self.roles.setdefault(f"{path}.{name}" if path else name, role)

    def free(self, path: str) -> list[str]:
        """Linear layers under a module that have no role yet. One with a single row or column is no matrix."""
        found = (p for p in self.below(path) if p in self.linears and min(self.linears[p]) > 1)
        return [p for p in found if (f"{p}.weight" if p else "weight") not in self.roles]

    def block(self, path: str) -> str:
        """The nearest module around a linear layer that holds another free one."""
        while path:
            path = _parent(path)
            if len(self.free(path)) > 1:
                return path
        return path

    # --- heads, torch's attention
    # -----------------------------------------------------------------------------------------------------------------

    def claim_heads(self) -> None:
        """Output embeddings that models name, or the last linear layer if it is as wide as a vocabulary."""
        named: set[int] = set()
        for module in self.modules.values():
            try:
                head = getattr(module, "get_output_embeddings", lambda: None)()
            except (AttributeError, NotImplementedError):  # a model that has none may say so this way
                continue
            if isinstance(head, nn.Module):
                named |= {id(m) for m in head.modules()}
        last = next(reversed(self.linears), None)
        vocabularies = {m.weight.shape[0] for m in self.modules.values() if is_embedding(m)}
        for path, (_, out) in self.linears.items():
            if id(self.modules[path]) in named or (not named and path == last and out in vocabularies):
                self.claim(path, "head")

    def claim_torch_attention(self) -> None:
        """`nn.MultiheadAttention` holds its input projections itself."""
        for path, module in self.modules.items():
            if isinstance(module, nn.MultiheadAttention):
                self.claim(path, "attention", [n for n, p in own_parameters(module).items() if p.dim() == 2])
                self.claim(f"{path}.out_proj" if path else "out_proj", "attention")

    # --- experts and routers
    # -----------------------------------------------------------------------------------------------------------------

    def claim_experts(self) -> None:
        """Expert banks and the routers beside them."""
        for path in self.paths:
            self._claim_stacks(path)
            self._claim_members(path)

    def _claim_stacks(self, path: str) -> None:
        module = self.modules[path]
        own = {} if isinstance(module, _ConvNd) else own_parameters(module)
        stacks = {n: p for n, p in own.items() if p.dim() == 3 and min(p.shape) > 1}
        for E in sorted({p.shape[0] for p in stacks.values()}):
            names = [n for n, p in stacks.items() if p.shape[0] == E]
            dims: list[Dims] = [(stacks[n].shape[2], stacks[n].shape[1]) for n in names]
            widths = {width for pair in dims for width in pair}
            beside = [n for n, p in own.items() if p.dim() == 2 and E in p.shape]
            routers = list(self._routers(path, {path}, E, widths))
            if not routers:  # on the bank itself: one matrix over the experts, where biases would be several
                alone = [n for n in beside if not is_bias_of(own, n) and set(own[n].shape) <= {E, *widths}]
                routers = [(path, n) for n in alone if len(alone) == 1]
            counted = any(getattr(module, n, None) == E for n in _EXPERT_COUNTS)
            # Without a router or a count: two ways up and one down at most; three and one are heads of attention.
            paired = chain(dims) is not None and max(Counter(dims).values()) <= 2
            if routers or counted or paired:
                self.claim(path, "expert", names)
                for router, name in routers:
                    self.claim(router, "router", [name])
                self.claim(path, "bias", [n for n in beside if own[n].shape[0] == E])

    def _claim_members(self, path: str) -> None:
        """Children with the same class and the same parameters, if a router has one row for each of them."""
        if isinstance(self.modules[path], nn.Sequential):
            return
        kinds: dict[tuple[object, ...], list[str]] = {}
        for name, child in self.modules[path]._modules.items():
            if child is not None:
                shapes = tuple((n, tuple(p.shape)) for n, p in child.named_parameters())
                kinds.setdefault((type(child), *shapes), []).append(f"{path}.{name}" if path else name)
        for members in kinds.values():
            matrices = self._expert_matrices(members[0]) if len(members) > 1 else []
            if not matrices:
                continue
            widths = {d for p, n in matrices for d in self.modules[p]._parameters[n].shape}
            inside = {p for member in members for p in self.below(member)}
            routers = list(self._routers(path, inside, len(members), widths))
            if routers:
                for member in members:
                    for p, n in matrices:
                        self.claim(member + p.removeprefix(members[0]), "expert", [n])
                for router, name in routers:
                    self.claim(router, "router", [name])

    def _expert_matrices(self, path: str) -> list[tuple[str, str]]:
        """The matrices of a module that could be an expert: one MLP and nothing that mixes tokens. Else none."""
        found, dims = [], list[Dims]()
        for p in self.below(path):
            module = self.modules[p]
            own = own_parameters(module)
            if isinstance(module, _ConvNd) or is_embedding(module) or any(w.dim() > 2 for w in own.values()):
                return []
            for n, w in own.items():
                if w.dim() == 2:
                    found.append((p, n))
                    dims.append(self.linears.get(p, (w.shape[1], w.shape[0])))
        ring = chain(dims)
        return [] if ring is None or len(reads(dims, *ring)) > 2 else found

    def _routers(self, around: str, skipped: set[str], E: int, widths: set[int]) -> Iterator[tuple[str, str]]:
        """Matrices [E, H] near a bank, outside of it and of any other block; of the nearest module that has any."""
        for level in range(1 + _CLIMB):
            found = []
            inside = self.below(around)
            if level > 1 and any(is_embedding(self.modules[p]) for p in inside):
                return  # the whole model
            for path in inside:
                module = self.modules[path]
                if path in skipped or is_norm(module) or is_embedding(module):
                    continue
                if path in self.linears:
                    read, out = self.linears[path]
                    taken = self.roles.get(f"{path}.weight" if path else "weight", "router") != "router"
                    home = self._home(path)
                    inner = home != around and _under(home, around)
                    if out == E and read in widths and not taken and not inner:
                        found.append((path, "weight"))
                else:
                    fits = {(E, w) for w in widths} | {(w, E) for w in widths}
                    found += [(path, n) for n, p in own_parameters(module).items() if tuple(p.shape) in fits]
            yield from found
            if found or not around:
                return
            around = _parent(around)

    def _home(self, path: str) -> str:
        while path:
            path = _parent(path)
            if sum(p in self.linears for p in self.below(path)) > 1:
                break
        return path

    # --- attention and MLPs
    # -----------------------------------------------------------------------------------------------------------------

    def claim_blocks(self) -> None:
        """Blocks of linear layers, innermost first."""
        blocks: dict[str, list[str]] = {}
        for path in self.free(""):
            blocks.setdefault(self.block(path), []).append(path)
        kinds = {p: (m.embed_dim, "attention") for p, m in self.modules.items() if isinstance(m, nn.MultiheadAttention)}
        decided: dict[str, str] = {}
        for path in sorted(blocks, key=lambda p: -self.span[p][0]):
            layers = blocks[path]
            nested = [p for p in kinds if p != path and _under(p, path)]
            within = [p for p in blocks if p != path and _under(p, path)]
            if len(layers) == 1 and len(within) == 1:  # queries, keys and values lie deeper than the output
                joined = blocks[within[0]] + layers
                ring, role = self._kind(path, joined, [])
                if role == "attention" and ring is not None and ring[1] == len(joined) - 1:
                    decided.update(dict.fromkeys(joined, "attention"))
                    kinds[path] = (ring[0], "attention")
                    self.attention[path] = Block(joined, *ring)
                    continue
            ring, role = self._kind(path, layers, [kinds[p] for p in nested])
            if ring is not None and role is not None:
                decided.update(dict.fromkeys(layers, role))
                kinds[path] = (ring[0], role)
                if role == "attention":
                    self.attention[path] = Block(layers, *ring)
        for path, role in decided.items():
            self.claim(path, role)

    def _kind(
        self, path: str, layers: list[str], nested: list[tuple[int, str]]
    ) -> tuple[tuple[int, int] | None, str | None]:
        module, dims = self.modules[path], [self.linears[p] for p in layers]
        ring = chain(dims)
        # Layers around blocks of another width lead into a model and out of it; they are no block.
        if ring is None or (nested and ring[0] not in {width for width, _ in nested}):
            return None, None
        chained = isinstance(module, nn.ModuleList | nn.Sequential) or any(role == "attention" for _, role in nested)
        return ring, "attention" if not chained and self._attends(path, dims, ring) else "mlp"

    def _attends(self, path: str, dims: list[Dims], ring: tuple[int, int]) -> bool:
        width, last = ring
        outs, q = reads(dims, width, last), dims[last][0]
        if len(outs) >= 3:
            return True
        if any(isinstance(self.modules[p], _ConvNd) for p in self.below(path)):
            return False  # a state-space or convolution mixer
        if any(type(getattr(self.modules[path], n, None)) is int for n in _HEAD_COUNTS):
            return True
        if len(outs) + 1 < len(dims):
            return False
        # Fused: F = q + 2 kv. F = q is a plain MLP and F = 2 q a gated one. Half fused: q and 2 kv apart.
        fused = any(out != 2 * q and out > q and (out - q) % 2 == 0 and q % ((out - q) // 2) == 0 for out in outs)
        half = len(outs) == 2 and q in outs and outs[0] != outs[1] and 2 * q % (outs[0] + outs[1] - q) == 0
        return fused or half


def _under(path: str, top: str) -> bool:
    return not top or path == top or path.startswith(top + ".")
