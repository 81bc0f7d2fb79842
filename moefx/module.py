"""Stage 7: `OptimizedModule`, the original model with compiled graphs in place of its forward.

It owns no parameter of its own: its registries are the original's, so `state_dict`, `parameters`, optimizers, `to`,
hooks and checkpoints see the same objects under the same names. Graphs are kept per call signature (mode, grad mode,
autocast, shapes, dtypes, constants, which parameters train) and compiled when a signature is first met.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from . import compat
from .delayed import AmaxHistory
from .errors import InputError
from .graph.routed import RoutedLayer
from .holder import HOOKS, REGISTRIES
from .losses import BiasUpdate, sign_update
from .pickled import without_recorders
from .precision_metrics import Meter
from .primals import Inside, assembled, reference
from .program import Program
from .routing import INSIDE, check_choice
from .signature import Signature, Structure, context_key, leaf_key, names_of, warn_of_many
from .weights import KeptCodes

Tensor = torch.Tensor
# What is the original's own. A parent that loads asks for the hooks of loading.
SHARED = (*REGISTRIES, *HOOKS, "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
          "_load_state_dict_post_hooks")  # fmt: skip
_OWN = frozenset({
    "_history", "_indices", "_original", "_options", "_compile", "_variants", "_structure", "_report", "_refs",
    "_extras", "_counts", "_kept", "_signed", "_mixed_in",
})  # fmt: skip


@dataclass
class Variant:
    """A compiled program and the signature it is valid for.

    `guard` is set when some sizes are symbolic, `meter` when the graph has precision casts, `routed` holds the MoE
    layers that are routed by token ids, `chosen_from` the number of experts of each layer if choices are precomputed.
    """

    program: Program
    signature: dict[str, Any]
    guard: Callable[[list[Any]], bool] | None = None
    loose_key: Any = None
    meter: Meter | None = None
    routed: tuple[RoutedLayer, ...] = ()
    chosen_from: tuple[int, ...] = ()


class _Signed:
    """Binds a method so that `inspect.signature` gives the original model's, by which trainers pick their columns."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def __get__(self, opt: OptimizedModule | None, owner: type) -> Callable[..., Any]:
        return self.method if opt is None else types.MethodType(opt.__dict__["_signed"], opt)


class OptimizedModule(nn.Module):
    """What `moefx.optimize` returns. Calls run the compiled graphs; everything else is the original's.

    Attributes that are not found here are looked up on the original (`generate`, `config`, `save_pretrained`, ...),
    which runs its own, unoptimized code for them; `generate` of a model that is routed by token ids does so with that
    routing (`moefx.decoding`). `original` is the model itself, `report` says what was done, `graphs`
    maps stage and pass names to graphs.

    It passes for the original where code asks `isinstance(opt, PreTrainedModel)` or reads the signature of `forward`,
    as transformers' Trainer does; `type(opt)` is this class. A method that is assigned (`opt.forward = ...`, as
    accelerate does for autocast) takes the place of this module's, not of the original's.
    """

    def __init__(self, original: nn.Module, compile_variant: Callable[..., Variant], options: Any, report: Any) -> None:
        own = self.__dict__
        own["_original"] = original
        own["_compile"], own["_options"], own["_report"] = compile_variant, options, report
        own["_variants"], own["_structure"], own["_refs"] = {}, None, {}
        own["_extras"], own["_counts"], own["_kept"], own["_mixed_in"] = {}, {}, None, frozenset()
        own["_history"], own["_indices"] = AmaxHistory(options.recipe.amax_history), {}
        own["_signed"] = _with_signature(OptimizedModule.forward, original.forward)
        super().__init__()
        del own["_is_full_backward_hook"]
        for registry in SHARED:
            own[registry] = original.__dict__[registry]

    # --- the original shows through
    # ---------------------------------------------------------------------------------------------

    @property
    def original(self) -> nn.Module:
        """The model that was optimized; it shares all parameters and buffers with this module."""
        model: nn.Module = self.__dict__["_original"]
        return model

    @property
    def report(self) -> Any:
        """What every stage and pass did (`moefx.Report`)."""
        return self.__dict__["_report"]

    @property
    def graphs(self) -> Mapping[str, fx.GraphModule]:
        """Stage and pass names -> graph after it, in order; of the first signature that was compiled."""
        graphs: Mapping[str, fx.GraphModule] = self.report.graphs
        return graphs

    @property
    def router(self) -> nn.Module | None:
        """The frozen router of token ids that `optimize(router=...)` was given. It is no submodule."""
        routing = self._options.routing
        return None if routing is None else routing.router

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by the names that graphs know them by: the original's, and those of the router."""
        found: dict[str, Tensor] = {}
        for prefix, module in (("", self.original), (f"{INSIDE}.", self.router)):
            for tensors in (module.named_parameters, module.named_buffers) if module is not None else ():
                found |= {prefix + name: t for name, t in tensors(remove_duplicate=False)}
        return found

    def _owner(self, slot: compat.Slot) -> nn.Module:
        """The module under which a graph's parameter or buffer is found by its name."""
        inside = str(slot.key).startswith(f"{INSIDE}.")
        return Inside(self.router) if inside else self.original

    @property
    def training(self) -> bool:
        """The original's mode."""
        return self.original.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_modules" in self.__dict__ and self.__dict__["_modules"] is self.original._modules:
            self.original.training = mode

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in self.__dict__:
                raise
            found = getattr(self.__dict__["_original"], name)
        if name in self.__dict__["_mixed_in"] and isinstance(found, types.MethodType):
            return types.MethodType(found.__func__, self)
        if name.startswith("generate") and self._options.routing is not None:
            from .decoding import routed_method

            return routed_method(self, name, found)
        return found

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["_original"]) if "_original" in self.__dict__ else OptimizedModule

    def _get_name(self) -> str:
        return OptimizedModule.__name__

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN or _is_method(name):
            self.__dict__[name] = value
        elif name == "training" or isinstance(value, nn.Module | nn.Parameter) or name in self._buffers:
            super().__setattr__(name, value)
        elif "_modules" in self.__dict__ and hasattr(self.original, name):
            if name == "__class__":  # by FSDP2, say, whose methods find what belongs to them by this module
                added = [c for c in value.__mro__ if not isinstance(self.original, c)]
                self.__dict__["_mixed_in"] = frozenset().union(*map(vars, added))
            setattr(self.original, name, value)
        else:
            super().__setattr__(name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state dict: same keys, same order, same tensors."""
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the original."""
        return self.original.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What a module around this one calls: the original's own way, with its hooks and its extra state."""
        self.original._load_from_state_dict(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise InputError(
            "an optimized module cannot be replicated by nn.DataParallel",
            why="its graphs read the parameters of the one model that they were compiled for",
            todo="one process per device: DistributedDataParallel(moefx.optimize(model, ...))",
        )

    def train(self, mode: bool = True) -> OptimizedModule:
        """Set the original's mode; train and eval have graphs of their own."""
        self.original.train(mode)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> OptimizedModule:
        """`fn` on the original and its submodules."""
        self.original.apply(fn)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> OptimizedModule:
        self.original._apply(fn, recurse)
        if self.router is not None:
            self.router._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        """A copy with its own parameters and router. Compiled programs are shared: they hold no tensor of either."""
        options = self._options
        if self.router is not None:  # else `copy.to(...)` would move the router of this module
            options = replace(options, routing=copy.deepcopy(options.routing, memo))
        report = copy.deepcopy(self.report, memo)
        new = OptimizedModule(copy.deepcopy(self.original, memo), self.__dict__["_compile"], options, report)
        if self._structure is not None and self._structure.holds():
            new.__dict__["_structure"] = new._present_structure()
            new.__dict__["_structure"].watch_as(self._structure)
            new.__dict__["_variants"] = dict(self._variants)
        new.load_precision_state(self.precision_state())
        new._counts.update(copy.deepcopy(self._counts, memo))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self._assigned(), memo))
        return new

    def __copy__(self) -> nn.Module:
        """Another module over the same original."""
        return _rebuild(self.original, self._options, self.precision_state())

    def __reduce__(self) -> Any:
        """Pickle the original and the options; graphs are compiled again when next called."""
        rebuilt = (without_recorders(self.original), self._options, self.precision_state(), self._counts)
        return (_rebuild, rebuilt, *([assigned] if (assigned := self._assigned()) else []))

    def _assigned(self) -> dict[str, Any]:
        """Methods that were put in the place of this module's."""
        return {name: v for name, v in self.__dict__.items() if _is_method(name)}

    def extra_repr(self) -> str:
        """One line for `print(module)`."""
        return f"moefx: {len(self._variants)} compiled signature(s) of {type(self.original).__name__}"

    @property
    def options(self) -> Any:
        """What this module is compiled with (`moefx.optimize.Options`)."""
        return self.__dict__["_options"]

    # --- calls
    # ------------------------------------------------------------------------------------------------------------------

    @_Signed
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the variant of this call's signature, compiling it when it is new."""
        variant, leaves = self.prepare(args, kwargs)
        program = variant.program
        primals, index = self._primals(program, leaves)
        push = None if index is None else functools.partial(self._history.push, index)
        outs = program(primals, push, self._kept)

        def target(slot: compat.Slot) -> Tensor:
            kind = slot.kind.split(":")[1]
            where = reference(self._owner(slot), compat.Slot(kind, slot.key))
            found: Tensor = leaves[where] if isinstance(where, int) else where[0][where[1]]
            return found

        # Also of a call that returns none (evaluation without metrics), or the last values would pass for its own.
        self._keep(program.returned_extras(outs) if program.extras else {})
        return program.finish(outs, primals, target)

    @contextlib.contextmanager
    def microbatches(self) -> Iterator[None]:
        """Within, casts of weights are made once and shared by all calls, until a parameter changes.

            with opt.microbatches():
                for ids in microbatches:
                    opt(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        For gradient accumulation and for activation checkpointing around the model. After the step of any optimizer,
        and when a parameter was written in place or replaced (`load_state_dict`), weights are cast again at the next
        call; writing through `p.data` leaves no trace and is not seen. The codes are freed at the end.
        """
        before: KeptCodes | None = self.__dict__["_kept"]
        try:
            with KeptCodes(self.original) as self.__dict__["_kept"]:
                yield
        finally:
            self.__dict__["_kept"] = before

    def _keep(self, extras: dict[tuple[str, str], Tensor]) -> None:
        """Remember what a call returned beside the model's outputs; choices are added up until biases are updated."""
        self.__dict__["_extras"] = extras
        for (kind, name), counts in extras.items():
            if kind == "count":
                before = self._counts.get(name)
                self._counts[name] = counts if before is None else before + counts

    @property
    def losses(self) -> dict[str, Tensor]:
        """Unweighted losses of the last call by short name, and `total`, the weighted sum that was added. Detached."""
        return {name: v for (kind, name), v in self._extras.items() if kind == "loss"}

    @property
    def routing(self) -> dict[str, Tensor]:
        """Routing metrics of the last call by name (`moefx.losses.metrics.SHAPES`). Detached."""
        return {name: v for (kind, name), v in self._extras.items() if kind == "routing"}

    def update_router_bias(self, rate: float | None = None) -> None:
        """Move every router's correction bias by `rate` towards balance, by the choices since the last update.

        To be called after an optimizer step, on all ranks together. `rate` is that of `BiasUpdate` if not given.

        Raises:
            InputError: `losses=` had no `BiasUpdate`, or no training step was run since the last update.
        """
        item = next((i for i in self.options.losses if isinstance(i, BiasUpdate)), None)
        if item is None:
            raise InputError("nothing counts the choices of this model's routers", todo='add "bias" to losses')
        if not self._counts:
            raise InputError("no choices were counted since the last update", todo="run a training step first")
        for name, counts in self._counts.items():
            path, _, leaf = name.rpartition(".")
            sign_update(getattr(self.original.get_submodule(path), leaf), counts, item.rate if rate is None else rate)
        self._counts.clear()

    def precision_metrics(self, *args: Any, tangents: Any = None, **kwargs: Any) -> list[dict[str, Any]]:
        """What the precision casts of one training step of this call lose, on the present weights.

        Runs forward and backward once, as a plain graph whatever the codegen, and waits for the device. Gradients,
        buffers and random states stay as they are; hooks of the model do not run. A new signature is compiled.

        Args:
            tangents: gradients of the model's outputs, one for each in the order in which they are returned, None for
                no gradient. Left out, it is 1 for the output called `loss` (without one, for every scalar
                floating-point output) and none for all others.

        Returns:
            A row for each cast and each spec it writes, in graph order; none under a recipe without casts:
            `layer` (module path), `tensor` (its name in docs/precision.md: X, Xp, A, H, dY, dO, dH, W1, W2), `role`
            (input, weight, grad, hidden), `direction` (fwd, bwd), `spec`, and of `moefx.precision.quantize.quality`
            `underflow` and `saturation` (shares of elements), `sqnr_db` (infinity for no error), `scale_spread`
            (binades). Each is what this cast adds: one that reads codes, to turn or convert them or dequantized, is
            measured against the numbers those codes mean.

        Raises:
            InputError: in eval mode, without gradients, or tangents that do not fit or are missing.
        """
        if not (self.training and torch.is_grad_enabled()):
            raise InputError(
                "precision metrics are those of a training step",
                why="gradients are switched off" if self.training else "the model is in eval mode",
                todo="call them in train mode, outside torch.no_grad() and torch.inference_mode()",
            )
        variant, leaves = self.prepare(args, kwargs)
        if variant.meter is None:
            return []
        return variant.meter.measure(self._primals(variant.program, leaves)[0], tangents)

    def _primals(self, program: Program, leaves: list[Any]) -> tuple[list[Any], Tensor | None]:
        """Values of a program's inputs, and the rows of the history among them."""
        refs = self._refs.get(id(program))
        if refs is None:
            refs = self._refs[id(program)] = [
                assembled(self.original, *program.assemblies[str(s.key)])
                if s.kind == "param" and s.key in program.assemblies
                else reference(self._owner(s), s)
                for s in program.inputs
            ]
        index = None if program.history_input is None else self._index(program)

        def read(r: Any) -> Any:
            if isinstance(r, int):
                return leaves[r]
            if r is None:
                return self._history.read(index)
            return r() if callable(r) else r[0][r[1]]

        return [read(r) for r in refs], index

    def _index(self, program: Program) -> Tensor:
        """Rows of the history that a program reads, on the device where it runs."""
        found: Tensor | None = self._indices.get(id(program))
        if found is None:
            device = next(iter(self.original.parameters())).device
            found = self._indices[id(program)] = self._history.index(program.history_keys, device)
        return found

    def precision_state(self) -> dict[str, Any]:
        """What delayed scaling remembers between steps, for checkpoints; without casts for other recipes."""
        state: dict[str, Any] = self._history.state_dict()
        return state

    def load_precision_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `precision_state` gave."""
        self._history.load_state_dict(state)
        self._indices.clear()

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Variant, list[Any]]:
        """The variant of a call's signature, compiled if it is new, and the call's flat arguments. Runs nothing."""
        kwargs = dict(sorted(kwargs.items()))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        self._check_ids(args, kwargs)
        if self._structure is None or not self._structure.holds():
            self.__dict__["_structure"] = self._present_structure()
            self.__dict__.update(_variants={}, _refs={}, _indices={})  # by the ids of programs, which may come again
        variant = self._variants.get(self._key(leaves, spec, exact=True))
        if variant is None:
            with compat.compiling:
                variant = self._new_variant(args, kwargs, leaves, spec)
        if variant.chosen_from:  # a graph looks at no values, and another call holds others than the example
            check_choice(kwargs["routing_idx"], variant.chosen_from)
        return variant, leaves

    def _check_ids(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See that the router of token ids knows those of this call: a graph would read beyond its embedding."""
        routing = self._options.routing
        if routing is not None and hasattr(routing.router, "check_ids"):
            positional = () if routing.ids in kwargs else inspect.signature(self.original.forward).parameters
            routing.check_ids({**kwargs, **dict(zip(positional, args, strict=False))}.get(routing.ids))

    def _present_structure(self) -> Structure:
        return Structure(self.original, *([self.router] if self.router is not None else []))

    def _new_variant(self, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], spec: Any) -> Variant:
        # Another thread may have made it meanwhile.
        variant: Variant | None = self._variants.get(self._key(leaves, spec, exact=True))
        if variant is None:
            variant, found = self._find_dynamic(leaves, spec), None
            if variant is None:
                before = self._structure.plain_values()
                variant = found = self._compile(self, args, kwargs)
                self._structure.leave_out_changed(before)
                found.loose_key = self._key(leaves, spec, exact=False)
            # The key is taken after compiling: a first forward may install hooks (transformers' recorders).
            key = self._key(leaves, spec, exact=True)
            self._variants[key] = variant
            if found is not None:
                each = {id(v): k for k, v in self._variants.items()}.values()
                warn_of_many(key, each, self._structure, names_of(self.original, args, kwargs))
        return variant

    def variants(self) -> list[Variant]:
        """What was compiled for the present modules, each once."""
        valid = self._structure is not None and self._structure.holds()
        return list({id(v): v for v in self._variants.values()}.values()) if valid else []

    def _key(self, leaves: list[Any], spec: Any, *, exact: bool) -> Signature:
        """The signature of a call; not `exact` leaves sizes out, for variants with symbolic sizes."""
        inputs = tuple([leaf_key(v, exact=exact) for v in leaves])
        return Signature(spec, inputs, self._structure.mode(), context_key(self._options.over_ranks))

    def _find_dynamic(self, leaves: list[Any], spec: Any) -> Variant | None:
        dynamic = {id(v): v for v in self._variants.values() if v.guard is not None}
        if not dynamic:
            return None
        loose = self._key(leaves, spec, exact=False)
        return next(
            (v for v in dynamic.values() if v.loose_key == loose and v.guard is not None and v.guard(leaves)), None
        )


def _is_method(name: str) -> bool:
    return isinstance(OptimizedModule.__dict__.get(name), types.FunctionType | _Signed)


def _with_signature(method: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """The method as a function of its own, with the signature of a bound one."""
    assert isinstance(method, types.FunctionType)
    new = types.FunctionType(method.__code__, method.__globals__, method.__name__, None, method.__closure__)
    new.__doc__, new.__kwdefaults__ = method.__doc__, method.__kwdefaults__
    signature = inspect.signature(like)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    with contextlib.suppress(ValueError):  # a parameter of its own that is called self
        new.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])  # type: ignore[attr-defined]
    return new


def _rebuild(
    original: nn.Module, options: Any, state: Mapping[str, Any], counts: Mapping[str, Tensor] | None = None
) -> nn.Module:
    from .optimize import reoptimize

    opt = reoptimize(original, options)
    opt.load_precision_state(state)
    opt._counts.update(counts or {})
    return opt
