"""Which token of a batch each row of an expert layer is, for losses and for routing by token ids.

A mask of tokens is [B, S], while experts see rows [T, H]: row b*S+s in most models ("batch"), row s*B+b in those that
keep sequences along the first axis ("sequence"). Sizes do not tell the one from the other, nor a mask of tokens from
one of positions [S, S] where B = S. So they are found by trial: the graph runs on the example inputs up to the experts,
as it is and with another first sequence, and the rows that change are those of that sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moefx import compat
from moefx.capture import Captured
from moefx.errors import PassError

from .edit import module_path, same_sizes, value
from .effects import writers
from .trial import values_of

Tensor = torch.Tensor
LAYOUTS = ("batch", "sequence")
CALL = "moefx_call"  # where a captured graph module keeps its `Call` while passes run
IDS, DECODER_IDS = ("input_ids", "inputs_embeds"), ("decoder_input_ids", "decoder_inputs_embeds", "labels")
# Inputs of tokens whose values move no row, or need not.
PASSIVE = ("attention_mask", "position_ids", "labels")


@dataclass(frozen=True)
class Call:
    """The call that a graph was captured from.

    Attributes:
        values: of the graph's placeholders.
        named: tensors of the call by the names of their arguments.
        accepts: names of all arguments that the model's forward has.
    """

    values: list[Any]
    named: dict[str, Tensor]
    accepts: frozenset[str]


@contextmanager
def called(captured: Captured) -> Iterator[None]:
    """Within, passes can try the graph on the call that it was captured from."""
    gm, args, kwargs = captured.gm, captured.args, captured.kwargs
    gm.meta[CALL] = Call(compat.flat_inputs(gm, args, kwargs), captured.tensors, captured.accepts)
    try:
        yield
    finally:
        del gm.meta[CALL]  # it holds the example inputs


@dataclass
class Tokens:
    """What the inputs of a model graph say about the rows of its expert layers.

    Attributes:
        graph: model graph; its module holds a `Call` in `meta`, without which no trial can be made.
        layers: for each expert layer in order the node [T, H] (or [.., H] with T rows in all) that its experts read.
    """

    graph: fx.Graph
    layers: Sequence[fx.Node]
    _layouts: dict[str, str | None] = field(default_factory=dict)
    _usual: dict[fx.Node, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module = self.graph.owning_module
        self.call: Call | None = None if module is None else module.meta.get(CALL)
        placeholders = self.graph.find_nodes(op="placeholder")
        self.at = {n: i for i, n in enumerate(placeholders)}
        given = {id(t): name for name, t in self.call.named.items()} if self.call is not None else {}
        values = self.call.values if self.call is not None else [None] * len(placeholders)
        self.inputs = {given[id(v)]: n for n, v in zip(placeholders, values, strict=True) if id(v) in given}
        # An encoder and a decoder with tokens of its own; one behind an encoder of images has no such arguments.
        parts = {p for n in self.graph.nodes for p in module_path(n).split(".")}
        accepts = self.call.accepts if self.call is not None else ()
        self.two_stacks = {"encoder", "decoder"} <= parts and any(n in accepts for n in DECODER_IDS[:2])

    def chain(self, x: fx.Node) -> str:
        """Layers of one chain see the same tokens in the same order: as many, and of one stack."""
        return f"{self.stack(x)} {_rows(x)}"

    def stack(self, x: fx.Node) -> str:
        """Whose layer it is: that of a module called encoder, or decoder, or ""."""
        return next((p for p in module_path(x).split(".") if p in ("encoder", "decoder")), "")

    def _decodes(self, x: fx.Node) -> bool:
        """Whether a layer sees the tokens of a decoder that has an encoder beside it."""
        return self.two_stacks and self.chain(x).startswith("decoder")

    def sources(self, x: fx.Node) -> list[fx.Node]:
        """Inputs [B, S, ..] with a token for each row of a layer, the one that says most about them first."""
        if self._decodes(x):
            names = list(DECODER_IDS)
        else:
            others = [n for n in self.inputs if n not in (*IDS, *PASSIVE) and not n.startswith("decoder_")]
            names = [*IDS, *others, *([] if self.two_stacks else PASSIVE)]
        nodes = [self.inputs[n] for n in names if n in self.inputs]
        T = _rows(x)
        fit = [n for n in nodes if value(n).dim() > 1 and same_sizes([value(n).shape[0] * value(n).shape[1]], [T])]
        return [n for n in fit if same_sizes(value(n).shape[:2], value(fit[0]).shape[:2])]

    def mask_name(self, x: fx.Node) -> str:
        """The argument that masks the tokens of a layer."""
        return "decoder_attention_mask" if self._decodes(x) else "attention_mask"

    def mask(self, x: fx.Node) -> tuple[fx.Node | None, str | None]:
        """The mask [B, S] of a layer's tokens, and why one that was given does not mask them.

        Raises `PassError` for a mask that may be one of tokens or of positions.
        """
        name = self.mask_name(x)
        node, given = self.inputs.get(name), None if self.call is None else self.call.named.get(name)
        if given is None or given.dim() != 2:
            return None, None
        sources = [n for n in self.sources(x) if n is not node]
        if node is None:
            ids = [t for n, t in (self.call.named if self.call else {}).items() if n != name and t.dim() > 1]
            tokens = any(t.shape[:2] == given.shape for t in ids)
            return None, f"the forward does not read {name}" if tokens else None
        if not sources:
            like = [n for n in self.inputs.values() if n is not node and value(n).dim() > 1]
            tokens = any(same_sizes(value(n).shape[:2], value(node).shape) for n in like)
            return None, f"its experts do not see one row per token of {name}" if tokens else None
        (b, s), tokens = value(node).shape, value(sources[0]).shape[:2]
        if not same_sizes((b, s), tokens):  # of positions, unless it is the other way round than the tokens
            turned = same_sizes((s, b), tokens)
            return None, f"{name} {tuple(given.shape)} has another shape than the tokens" if turned else None
        if given.shape[0] == given.shape[1] > 1 and not self._masks_tokens(x, node):
            return None, None
        if bool((given < 0).any()):
            return None, f"{name} holds negative numbers, where 0 for a masked token is understood"
        return node, None

    def layout(self, x: fx.Node) -> str | None:
        """In which of `LAYOUTS` the rows of a layer are; None where no trial tells.

        Tried on the first layer of a chain: behind experts of a limited capacity sequences change each other's rows.
        """
        chain = self.chain(x)
        if chain not in self._layouts:
            first = next(n for n in self.layers if self.chain(n) == chain)
            self._layouts[chain] = next(filter(None, (self._try(first, n) for n in self.sources(first))), None)
        return self._layouts[chain]

    def _try(self, x: fx.Node, source: fx.Node) -> str | None:
        B, S = (compat.size_hint(n) for n in value(source).shape[:2])
        if B == 1 or S == 1:
            return "batch"  # both are the same
        moved = self._moved([x], {source: _other(self._value(source), slice(None))})[x]
        last = self._moved([x], {source: _other(self._value(source), slice(-1, None))})[x]
        found = []
        for name, mine in zip(LAYOUTS, _first_sequence(B, S), strict=True):
            rows = mine.nonzero().flatten()
            inside = not bool((moved | last)[~mine].any())
            # The order within the sequence: another last token moves its own row, if any.
            if inside and (not bool(last.any()) or bool(last[rows[-1]])):
                found.append(name)
        return found[0] if len(found) == 1 and bool(moved.any()) else None

    def shifted(self, x: fx.Node) -> bool:
        """Whether a token moves rows of a layer, but not the row of its own: the model shifts its tokens inside."""
        source = next((n for n in self.sources(x) if n is not self.inputs.get("labels")), None)
        layout = self.layout(x)
        if source is None or layout is None:
            return False
        B, S = (compat.size_hint(n) for n in value(source).shape[:2])
        s = S // 2
        moved = self._moved([x], {source: _other(self._value(source), slice(s, s + 1))})[x]
        return bool(moved.any()) and not bool(moved[s if layout == "batch" else s * B])

    def _masks_tokens(self, x: fx.Node, mask: fx.Node) -> bool:
        """Whether a square mask [B, B] masks tokens: another first row changes rows of the first sequence alone."""
        layout, given = self.layout(x), self._value(mask)
        chain = [n for n in self.layers if self.chain(n) == self.chain(x)]
        # One token less, and all of them: a model may let neither through everywhere (causal attention).
        less, more = given.clone(), given.clone()
        less[0, 0], more[0] = 0, 1
        trials = [self._moved(chain, {mask: other}, masked=True) for other in (less, more)]
        moved = (trials[0][n] | trials[1][n] for n in chain)
        seen = next((m for m in moved if bool(m.any())), None)
        if seen is None or layout is None:
            raise PassError(
                f"{self.mask_name(x)} {tuple(given.shape)} may be a mask of tokens or one of positions",
                where=module_path(x),
                why="there are as many sequences as tokens in one, and the rows of the experts do not tell",
                todo="call optimize with example inputs of another batch size, or without losses",
            )
        mine = _first_sequence(*given.shape)[LAYOUTS.index(layout)]
        return not bool(seen[~mine.to(seen.device)].any())

    def _value(self, node: fx.Node) -> Tensor:
        assert self.call is not None
        found: Tensor = self.call.values[self.at[node]]
        return found

    def _moved(
        self, wanted: Sequence[fx.Node], changed: dict[fx.Node, Tensor], *, masked: bool = False
    ) -> dict[fx.Node, Tensor]:
        """[T] bool for each wanted node: which rows change with these inputs. Every token counts, unless `masked`."""
        ones = {
            n: torch.ones_like(self._value(n))
            for name, n in self.inputs.items()
            if name.endswith("attention_mask") and not masked
        }
        # Runs without the masks are shared by the trials of a layer, the others are not.
        usual = {} if masked else self._usual
        if missing := [n for n in wanted if n not in usual]:
            usual.update(self._run(missing, ones))
        now = self._run(wanted, ones | changed)
        return {
            n: ((usual[n] != now[n]) & ~(usual[n].isnan() & now[n].isnan())).flatten(0, -2).any(-1).cpu()
            for n in wanted
        }

    def _run(self, wanted: Sequence[fx.Node], changed: dict[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
        """Values of nodes with some inputs replaced. Nothing behind the last one runs, and no tensor is written to."""
        assert self.call is not None
        values = [v.detach() if isinstance(v, Tensor) else v for v in self.call.values]
        written = writers(self.graph)
        for node, i in self.at.items():
            if node in changed:
                values[i] = changed[node]
            elif isinstance(values[i], Tensor) and written(node):
                values[i] = values[i].clone()
        assert self.graph.owning_module is not None
        return values_of(self.graph.owning_module, values, wanted)


def _rows(x: fx.Node) -> Any:
    """Number of rows of a layer; symbolic where the sizes are."""
    return math.prod(value(x).shape[:-1])


def _first_sequence(B: int, S: int) -> tuple[Tensor, Tensor]:
    """[T] bool, the rows of the first sequence in each of `LAYOUTS`."""
    rows = torch.arange(B * S)
    return rows // S == 0, rows % B == 0


def _other(t: Tensor, tokens: slice) -> Tensor:
    """The tensor with other values for these tokens of its first sequence: ids that occur in it, or numbers."""
    new = t.clone()
    part = new[0, tokens]
    if t.is_floating_point():
        noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(0))
        new[0, tokens] = part + noise.to(part)
    else:
        known = t.unique().tolist()
        a, b = (known[0], known[1]) if len(known) > 1 else (known[0], known[0] - 1 if known[0] > 0 else known[0] + 1)
        new[0, tokens] = torch.where(part == a, b, a).to(part.dtype)
    return new
