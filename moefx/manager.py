"""Passes and the manager that runs them: order, checks, provenance, snapshots, timing.

A pass only rewrites. Everything that must hold for any rewrite is checked here, once, for all passes, including a
user's: the graph lints, every new or changed node has a value that agrees with its inputs, inputs and outputs keep
their shapes, no buffer update or random draw is lost, a second run changes nothing, and with `verify=True` outputs and
gradients before and after agree within the pass's numerics class.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

from . import compat
from .errors import CaptureError, InputError, MoefxError, PassError, RecipeError, first_line, nearest
from .graph import edit
from .graph.effects import is_random, name_of, writers
from .holder import attribute
from .report import PassRow, Report
from .verify import Verifier

LEVELS = ("model", "training")
NUMERICS = ("exact", "rounding", "changes")


class Pass:
    """Base of all passes. Subclass it as a frozen dataclass whose fields are the pass's options.

    Class attributes:
        level: "model" (forward graph, autograd comes later) or "training" (forward and backward in one ATen graph).
        requires, provides: tags that order passes; a pass runs after all that provide what it requires.
        conflicts: tags that no other pass of the pipeline may provide.
        numerics: "exact" (bitwise), "rounding" (same mathematics, other rounding) or "changes".
        adds_outputs: whether the pass may append outputs behind those that the graph has.
    """

    level: ClassVar[str] = "model"
    requires: ClassVar[frozenset[str] | set[str]] = frozenset()
    provides: ClassVar[frozenset[str] | set[str]] = frozenset()
    conflicts: ClassVar[frozenset[str] | set[str]] = frozenset()
    numerics: ClassVar[str] = "exact"
    adds_outputs: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Snake-case class name: `FoldCasts` is `fold_casts`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        """Edit `graph` in place; tell `ctx` what was matched and what was rejected and why."""
        raise NotImplementedError(f"pass {self.name} has no run()")


@dataclass
class Context:
    """What a pass is given besides the graph, and where it reports."""

    row: PassRow
    level: str
    node: fx.Node | None = None

    def matched(self, node: fx.Node, note: str | None = None) -> None:
        """Count one rewrite at `node`."""
        self.row.matched += 1
        if note:
            self.row.notes.append(note)

    def rounds(self) -> None:
        """Say of an "exact" pass that what it did to this graph is the same mathematics in other rounding."""
        if self.row.numerics == "exact":
            self.row.numerics = "rounding"

    def fate(self, cast: fx.Node, what: str) -> None:
        """Record what became of a precision cast, for the ledger."""
        self.row.casts[cast.meta["moefx_cast"].key] = what

    def rejected(self, node: fx.Node, why: str) -> None:
        """Record a candidate that was left alone."""
        path = edit.module_path(node)
        self.row.rejected.append({"node": f"{path}:{node.name}" if path else node.name, "why": why})

    def at(self, nodes: Iterable[fx.Node]) -> Iterable[fx.Node]:
        """Iterate while remembering the current node, so that an error can name it."""
        for node in nodes:
            self.node = node
            yield node
        self.node = None


@dataclass
class PassManager:
    """An ordered list of passes. Edited by copies: `pipeline("bf16").insert(p, after="share_plans")`."""

    passes: tuple[Pass, ...] = ()
    given: frozenset[str] = field(default_factory=lambda: frozenset({"captured", "moe_raised"}))

    @property
    def names(self) -> list[str]:
        """Pass names as listed."""
        return [p.name for p in self.passes]

    def insert(self, p: Pass, *, before: str | None = None, after: str | None = None) -> PassManager:
        """A copy with `p` before or after the named pass, or at the end. `PassError` for both, or an unknown name."""
        check_pass(p)
        if before is not None and after is not None:
            raise PassError(
                f"pass {p.name} is to stand before {before} and after {after}",
                todo="name one of them; what a pass has to run behind, its `requires` says",
            )
        if before is None and after is None:
            return PassManager((*self.passes, p), self.given)
        at = self._index(before if before is not None else str(after)) + (before is None)
        return PassManager((*self.passes[:at], p, *self.passes[at:]), self.given)

    def remove(self, name: str) -> PassManager:
        """A copy without the named pass."""
        at = self._index(name)
        return PassManager((*self.passes[:at], *self.passes[at + 1 :]), self.given)

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise PassError(f"no pass named {name!r} in this pipeline", todo=nearest(name, self.names))
        return self.names.index(name)

    def ordered(self) -> list[Pass]:
        """Passes in running order: model level first, each after the providers of what it requires, else as listed.

        Raises `PassError` for a requirement that nothing provides, a conflict, or a cycle.
        """
        for p in self.passes:
            check_pass(p)
            others = {t: q.name for q in self.passes if q is not p for t in q.provides}
            for tag in p.requires:
                if tag not in others and tag not in self.given:
                    known = set(others) | self.given
                    raise PassError(
                        f"pass {p.name} requires {tag!r}, which nothing in the pipeline provides",
                        todo=f"insert a pass that provides it; {nearest(tag, known)}",
                    )
            for tag in p.conflicts:
                if tag in others:
                    raise PassError(
                        f"pass {p.name} conflicts with {others[tag]}, which provides {tag!r}",
                        todo="remove one of the two",
                    )
        pending = sorted(self.passes, key=lambda p: LEVELS.index(p.level))
        done: list[Pass] = []
        while pending:
            open_tags = {id(p): set().union(*(q.provides for q in pending if q is not p)) for p in pending}
            ready = next((p for p in pending if not open_tags[id(p)] & set(p.requires)), None)
            if ready is None or (done and LEVELS.index(ready.level) < LEVELS.index(done[-1].level)):
                stuck = ready or pending[0]
                waits = {q.name for q in pending if q is not stuck and set(q.provides) & set(stuck.requires)}
                raise PassError(
                    f"the order of passes cannot be satisfied: {', '.join(p.name for p in pending)} are stuck",
                    where=stuck.name,
                    why=f"{stuck.name} ({stuck.level} level) requires {sorted(stuck.requires)}, "
                    f"waiting for {', '.join(sorted(waits)) or 'nothing'}",
                    todo="break the cycle in requires/provides; a model-level pass cannot require a training-level one",
                )
            pending.remove(ready)
            done.append(ready)
        return done

    def run(
        self, level: str, gm: fx.GraphModule, report: Report, fake_mode: Any, verifier: Verifier | None = None
    ) -> None:
        """Run this level's passes on `gm` in place; rows and snapshots go to the report."""
        if verifier is not None:
            verifier.start(gm)
        kept = before = Kept(gm.graph, frozenset(gm.parameters()))
        for p in self.ordered():
            if p.level == level:
                kept = _run_one(p, gm, report, fake_mode, verifier, kept)
        if kept is not before:
            gm.recompile()  # once, not after every pass: checks and snapshots need the graph alone


def check_pass(p: object) -> None:
    """Raise `PassError` when an object does not keep the pass contract's outward form."""
    if not isinstance(p, Pass):
        what = f"{p!r} is the class, not an instance" if isinstance(p, type) else f"{p!r} is not a moefx.Pass"
        raise PassError(what, todo="pass instances of frozen dataclasses derived from moefx.Pass")
    for attr, allowed in (("level", LEVELS), ("numerics", NUMERICS)):
        if getattr(p, attr) not in allowed:
            raise PassError(f"pass {p.name} has {attr} {getattr(p, attr)!r}", todo=f"use one of {', '.join(allowed)}")
    for attr in ("requires", "provides", "conflicts"):
        if not isinstance(tags := getattr(p, attr), set | frozenset):
            raise PassError(
                f"pass {p.name} has {attr} {tags!r}", todo="give a set of tags, such as {'experts_expanded'}"
            )


def _run_one(
    p: Pass, gm: fx.GraphModule, report: Report, fake_mode: Any, verifier: Verifier | None, kept: Kept
) -> Kept:
    """Run one pass and all checks; what the next pass has to keep."""
    graph = gm.graph
    row = PassRow(p.name, p.level, p.numerics, nodes_before=len(graph.nodes))
    report.passes.append(row)
    start = time.perf_counter()
    try:
        changed = _apply(p, graph, Context(row, p.level))
        if changed:
            _lint(graph)
            _refuse_modules(changed, kept.parameters)
            refresh(graph, changed, p.level, fake_mode)
            kept = kept.check(p, graph)
            again = _apply(p, graph, Context(PassRow(p.name, p.level, p.numerics), p.level), mark=False)
            if again:
                raise PassError(
                    "a second run changed the graph again",
                    where=_where(again[0]),
                    todo="make the rewrite skip its own result",
                )
    except PassError as e:
        raise PassError(f"pass {p.name}: {e.what}", e.where, e.why, e.todo) from e
    except MoefxError:
        raise
    except Exception as e:
        raise PassError(
            f"pass {p.name} broke the graph",
            why=f"{type(e).__name__}: {first_line(e)}",
            todo=f"mend the pass or leave it out (moefx.pipeline(...).remove({p.name!r})); the model is unchanged",
        ) from e
    row.seconds, row.nodes_after = time.perf_counter() - start, len(graph.nodes)
    if changed:
        report.graphs.keep(p.name, gm, edit.copy_plain(graph))
        if verifier is not None:
            row.error = verifier.compare(p.name, row.numerics, gm, _where(changed[0]))
    return kept


def _apply(p: Pass, graph: fx.Graph, ctx: Context, *, mark: bool = True) -> list[fx.Node]:
    """Run a pass; the nodes that are new or read something else than before, in graph order."""
    before = {n: (n.target, n.args, n.kwargs) for n in graph.nodes}
    output = graph.output_node()
    try:
        p.run(graph, ctx)
    except (PassError, RecipeError, CaptureError):  # graph, recipe or model do not allow the pass
        raise
    except Exception as e:
        if isinstance(e, InputError) and ctx.node is None:
            raise  # nor do the example inputs. At a node, it is about what stands there.
        raise PassError(
            "its code failed",
            where=_where(ctx.node) if ctx.node is not None else None,
            why=f"{type(e).__name__}: {e}",
            todo="the model itself is unchanged; mend the pass or leave it out",
        ) from e
    if len(outputs := graph.find_nodes(op="output")) != 1:
        raise PassError(
            f"it left {len(outputs)} output nodes" if outputs else "it erased the output node",
            where=_where(outputs[-1] if outputs else output),
            why="a graph returns through exactly one output node",
            todo="keep that one, and change what it returns by its arguments (graph.output_node().args = ...)",
        )
    if (now := outputs[0]) is not output:  # notes on the outputs hold for the node that a pass made anew
        now.meta = {**output.meta, **now.meta}
    changed = [n for n in graph.nodes if n not in before or _differs((n.target, n.args, n.kwargs), before[n])]
    if mark:
        for n in changed:
            if n.op != "output":
                passes = n.meta.get("moefx_passes", ())
                n.meta["moefx_passes"] = (*passes, p.name) if p.name not in passes else passes
    # Without new or changed nodes, some may be gone, or stand in another order.
    return changed or ([] if list(before) == list(graph.nodes) else [graph.output_node()])


def _differs(now: tuple[Any, ...], was: tuple[Any, ...]) -> bool:
    """Whether a node calls or reads something else. To Python 2, 2.0 and True are equal; to a graph they are not."""
    if all(a is b for a, b in zip(now, was, strict=True)):
        return False
    return now != was or repr(now[1:]) != repr(was[1:])


def _flat_outputs(graph: fx.Graph) -> list[Any]:
    out: Any = graph.output_node().args[0]
    return list(out) if isinstance(out, tuple | list) else [out]


class Kept:
    """What of a graph no pass may change: inputs, types of outputs, and (unless its class is "changes") its effects."""

    def __init__(self, graph: fx.Graph, parameters: frozenset[nn.Parameter]) -> None:
        self.inputs = graph.find_nodes(op="placeholder")
        self.outputs = edit.map_values(_flat_outputs(graph))
        self.draws = [n for n in graph.nodes if is_random(n)]
        written = writers(graph)
        self.updates = {n: written(n) for n in self.inputs if written(n)}
        # Parameters of the model: what a graph's module has before the first pass.
        self.parameters = parameters

    def check(self, p: Pass, graph: fx.Graph) -> Kept:
        """The same of the graph after pass `p`; raises `PassError` for what is not as it was."""
        now = Kept(graph, self.parameters)
        if now.inputs != self.inputs:
            raise PassError("the graph's inputs changed", todo="add, remove and move no placeholder")
        if len(now.outputs) != len(self.outputs) and not (p.adds_outputs and len(now.outputs) > len(self.outputs)):
            what = f"the graph had {len(self.outputs)} outputs and now has {len(now.outputs)}"
            raise PassError(what, todo="a pass keeps the graph's outputs")
        for i, (node, val, was) in enumerate(zip(_flat_outputs(graph), now.outputs, self.outputs, strict=False)):
            if not edit.same_value(val, was):
                raise PassError(
                    f"output {i} changed from {_typed(was)} to {_typed(val)}",
                    where=_where(node) if isinstance(node, fx.Node) else None,
                    todo="cast or reshape back before the output",
                )
        if p.numerics == "changes":
            return now
        for lost in [n for n in self.updates if n not in now.updates]:
            raise PassError(
                f"the update of {lost.meta.get('moefx_name', lost.name)} is lost",
                where=_where(self.updates[lost][0]),
                todo="keep nodes that write in place although nobody reads them (moefx.graph.effects.is_effect)",
            )
        if [name_of(n) for n in now.draws] != [name_of(n) for n in self.draws]:
            odd = [n for n in (*self.draws, *now.draws) if n not in now.draws or n not in self.draws] or now.draws
            raise PassError(
                "the graph's random draws changed, so that all behind them draw other numbers",
                where=_where(odd[0]),
                todo="keep random nodes and their order, also unread ones, or declare numerics = 'changes'",
            )
        return now


def _typed(val: Any) -> str:
    return f"{val.dtype} {tuple(val.shape)}" if isinstance(val, torch.Tensor) else repr(val)


def _where(node: fx.Node) -> str:
    parts = [f"node {node.name}", edit.module_path(node), edit.source_line(node)]
    return ", ".join(p for p in parts if p)


def _lint(graph: fx.Graph) -> None:
    try:
        graph.lint()
    except Exception as e:
        at = {n: i for i, n in enumerate(graph.nodes)}
        bad = [n for n in at if any(at.get(i, len(at)) >= at[n] for i in n.all_input_nodes)]
        raise PassError(
            "the graph is malformed",
            where=_where(bad[0]) if bad else None,
            why=first_line(e),  # behind it, torch writes the whole graph
            todo="insert a node before its readers (graph.inserting_before), and erase only what nobody reads",
        ) from e


def _refuse_modules(changed: Iterable[fx.Node], parameters: frozenset[nn.Parameter]) -> None:
    """Raise `PassError` for modules that a pass calls, and for parameters that it brings."""
    for node in changed:
        if node.op == "call_module":
            raise PassError(
                f"it calls the module {node.target}",
                where=_where(node),
                why="graphs call functions; what a module computes, no other pass would see",
                todo="call the functions instead (graph.call_function), and register its tensors as buffers that "
                "graph.get_attr reads",
            )
        found = attribute(node.graph.owning_module, node.target) if node.op == "get_attr" else None
        if isinstance(found, torch.Tensor) and found.requires_grad and found not in parameters:
            raise PassError(
                f"it adds {node.target}, which requires a gradient",
                where=_where(node),
                why="what a pass adds to a graph is a constant and would never be trained",
                todo="register a parameter on the model before moefx.optimize, or a buffer in the pass",
            )


@contextlib.contextmanager
def _autocast_regions() -> Iterator[Callable[[fx.Node], None]]:
    """Follow the autocast regions of a model graph, so that values inside them get the dtypes that they will have."""
    entered: dict[fx.Node, Any] = {}

    def follow(node: fx.Node) -> None:
        target: Any = node.target
        name = name_of(node) if node.op == "call_function" else ""
        if name == "_enter_autocast":
            entered[node] = target(*node.args)
        elif name == "_exit_autocast":
            target(*[entered.pop(region) for region in node.all_input_nodes])

    try:
        yield follow
    finally:
        for region in reversed(list(entered.values())):
            region.__exit__(None, None, None)


def refresh(graph: fx.Graph, changed: Iterable[fx.Node], level: str, fake_mode: Any) -> None:
    """Recompute the fake values of `changed` nodes, then of their users for as long as values change.

    Raises `PassError` naming the node whose operands no longer fit its op.
    """
    stale = set(changed)
    with compat.propagating(fake_mode), _autocast_regions() as follow:
        for node in graph.nodes:
            follow(node)
            if node not in stale or node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                _set_constant(node, level, fake_mode)
                continue
            was = edit.value(node)
            args = fx.map_arg(node.args, edit.value)
            kwargs = fx.map_arg(node.kwargs, edit.value)
            try:
                val = _call(node, args, kwargs)
            except Exception as e:
                inputs = ", ".join(f"{i.name} {_typed(edit.value(i))}" for i in node.all_input_nodes)
                raise PassError(
                    f"node {node.name} cannot be computed from its inputs",
                    where=_where(node),
                    why=f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''} (inputs: {inputs})",
                    todo="check shapes and dtypes of what the pass put in",
                ) from e
            edit.set_value(node, val, level)
            if was is None or not edit.same_value(was, val, strides=True):
                stale.update(node.users)


def _set_constant(node: fx.Node, level: str, fake_mode: Any) -> None:
    val = attribute(node.graph.owning_module, node.target)
    if isinstance(val, torch.Tensor) and fake_mode is not None:
        with compat.no_fake():
            val = fake_mode.from_tensor(val, static_shapes=True)
    edit.set_value(node, val, level)


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    target: Any = node.target
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    run: Callable[..., Any] = target
    return run(*args, **kwargs)
