"""What the optimizers share: groups and their algorithms, checks, the step counter, and resuming."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from .. import compat
from ..errors import InputError, nearest
from .distributed import Place, agreed, as_laid_out, check_placements, grad_of, is_dtensor, local, place_of
from .lite import LiteConfig
from .options import check_options
from .polar import largest
from .resume import HOST_COUNTERS, checked, describe_lite
from .roles import LITE_ROLES, ROLES
from .rounding import Noise, check_rounding, follow, noise_of, rounds, working_dtype
from .split import blocks, check_split

Tensor = torch.Tensor
Group = dict[str, Any]
State = dict[str, Any]

# Roles that run AdamW unless the group names another algorithm.
DIAGONAL_ROLES = ("embedding", "head", "norm", "bias")

# Inputs below this count as no gradient: the polar factor has no scale and would make a full-size step of them.
NO_GRADIENT = 1e-20


class Item(NamedTuple):
    """One parameter in one step: this rank's part of everything."""

    weights: Tensor  # the parameter, or its float32 master
    grad: Tensor
    state: State
    place: Place
    noise: Noise | None = None  # of stochastic rounding; `rounding.store` takes it


class Algorithm(NamedTuple):
    """How parameters of a group are updated."""

    check: Callable[[Tensor, str, Group], None]  # raises InputError for a parameter it cannot update
    state: Callable[[Tensor, Group], State]  # everything it will ever keep, made at once
    update: Callable[[list[Item], Group, int], None]  # one step of all parameters that have a gradient
    # How many matrices of a gradient are finite but count as not finite, because their squares overflow.
    overflowing: Callable[[Tensor], Tensor] | None = None


class GroupedOptimizer(Optimizer):
    """An optimizer whose groups say which algorithm they run, by name or role; the others run the class's own.

    Each group counts its steps in the tensor `group["step"]`, which schedules are called with. All state exists from
    the start, and `state_dict` holds tensors, numbers, strings and containers of them only.
    """

    algorithms: ClassVar[dict[str, Algorithm]]
    own: ClassVar[str]

    def __init__(self, params: Any, defaults: Group, lite: LiteConfig | None, nonfinite: str) -> None:
        if lite is not None and not isinstance(lite, LiteConfig):
            raise InputError(f"lite is a {type(lite).__name__}", todo="pass a LiteConfig or None")
        if isinstance(params, (Tensor, set, frozenset, dict)):
            kind = f"params is a {type(params).__name__}"
            raise InputError(kind, todo="pass a list of parameters, or of groups (dicts)")
        params = list(params)
        if not params:
            raise InputError("there are no parameters to optimize", todo="pass model.parameters(), or groups")
        # Among the defaults, because copies and pickles of an optimizer keep nothing else.
        super().__init__(params, {**defaults, "lite": lite, "nonfinite": nonfinite})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group: `params`, and optionally `algorithm`, `role`, `names`, `lite`, `layout`, `split`, any default.

        Raises:
            InputError: an unknown algorithm, role or layout; a parameter that is in another group, complex, or of a
                shape that the algorithm cannot update or split; an option that is out of range or not there.

        Whatever is raised, the group is not added.
        """
        group = self._completed(param_group)
        try:
            super().add_param_group(group)
        except (TypeError, ValueError) as error:
            todo = "give leaf tensors, for example model.parameters()"
            raise InputError("a group cannot be optimized", why=str(error), todo=todo) from error
        # torch fills in the defaults and splits (name, parameter) pairs, so the rest is checked on its group.
        group = self.param_groups[-1]
        try:
            self._check(group)
            for p in group["params"]:
                self.state[p] = self._initial(p, group)
        except BaseException:  # memory may run out, too; half a group would fail in the next step
            del self.param_groups[-1]
            for p in group["params"]:
                self.state.pop(p, None)
            raise

    def _initial(self, p: Tensor, group: Group) -> State:
        """The state of a parameter before its first step."""
        algorithm, state = self.algorithms[group["algorithm"]], {}
        for suffix, block in parts(p.detach(), group):
            made = {"skipped": torch.zeros((), dtype=torch.int64, device=p.device), **algorithm.state(block, group)}
            state.update({key + suffix: value for key, value in made.items()})
        if group["rounding"] == "master" and rounds(p):
            state["master"] = p.detach().to(torch.float32)
        return state

    def _completed(self, given: Group) -> Group:
        """The group with its algorithm and LITE settled, after the checks that torch would answer in other words."""
        group, here = dict(given), len(self.param_groups)
        params = group.get("params")
        if params is None or isinstance(params, (set, frozenset)):
            raise InputError(f"params of group {here} is no list", todo="an order is needed to resume: give a list")
        group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
        plain = [p[1] if isinstance(p, tuple) else p for p in params]
        # An embedding would train with Muon too, only badly, so its role decides before the class does.
        name = group.setdefault("algorithm", "adamw" if group.get("role") in DIAGONAL_ROLES else self.own)
        if name not in self.algorithms:
            todo = nearest(str(name), self.algorithms)
            if name in ("muon", "soap"):
                todo = f'make groups for it: param_groups(model, algorithm="{self.own}"); {todo}'
            raise InputError(f"{type(self).__name__} has no algorithm {name!r}", where=f"group {here}", todo=todo)
        role = group.get("role")
        if role is not None and role not in ROLES:
            raise InputError(f"there is no role {role!r}", where=f"group {here}", todo=nearest(str(role), ROLES))
        seen = {id(p): i for i, g in enumerate(self.param_groups) for p in g["params"]}
        for p in plain:
            if id(p) in seen:
                why = f"it is in group {seen[id(p)]} and again in group {here}"
                raise InputError(
                    f"a parameter {list(p.shape)} is given twice", why=why, todo="tied weights belong to one group"
                )
            seen[id(p)] = here
        lite = group.get("lite", role is None or role in LITE_ROLES)
        if not isinstance(lite, (bool, LiteConfig, type(None))):
            raise InputError(f"lite={lite!r} of group {here}", todo="give True, False or a LiteConfig")
        config = lite if isinstance(lite, LiteConfig) else (self.defaults["lite"] if lite else None)
        group["lite"] = config if config is not None and config.acts_on(name) else None
        split = group.setdefault("split", None)
        if split is not None and name == "adamw":
            raise InputError(f"split={split!r} of group {here}", todo="leave it out: AdamW goes element by element")
        return group

    def _check(self, group: Group) -> None:
        check_options(group, f"group {len(self.param_groups) - 1}")
        names = group.get("names")
        if names is not None and len(names) != len(group["params"]):
            raise InputError(
                f"a group has {len(group['params'])} parameters and {len(names)} names", todo="give one name for each"
            )
        for index, p in enumerate(group["params"]):
            where = self._name(group, index)
            if p.is_complex() or not p.is_floating_point():
                raise InputError(f"a parameter is {p.dtype}", where=where, todo="optimize real floating parameters")
            check_placements(p, where, matrices=False)
            check_rounding(p, where, group["rounding"])
            if group["split"] is not None:
                check_split(p, where, group["split"], group["layout"])
            for _, block in parts(p.detach(), group):
                self.algorithms[group["algorithm"]].check(block, where, group)
        # Not torch's `step` for parameters: LITE's schedules belong to the group. On the CPU, where reading is free.
        group.setdefault("step", torch.zeros((), dtype=torch.int64, device="cpu"))

    def _name(self, group: Group, index: int) -> str:
        names = group.get("names") or group.get("param_names")
        return str(names[index]) if names else f"parameter {index} {list(group['params'][index].shape)}"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        A gradient with NaN or infinity either is skipped and counted (`nonfinite="skip"`; per matrix for Muon and
        SOAP, so that one expert does not stop the others), without waiting for the device, or raises. For SOAP, whose
        state is made of squares, a matrix is not finite either if the square of its norm overflows.

        Inside of `torch.autocast` the closure runs under it, and the update as it does outside.

        Raises:
            InputError: a sparse gradient, or with `nonfinite="raise"` one that is not finite; a parameter that was
                converted from or to float64 since its state was made. Nothing was changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # With some factors of a product in autocast's dtype, an update would lose digits, or fail.
        with compat.disable_autocast():
            for group in self.param_groups:
                for index, p in enumerate(group["params"]):
                    if p.grad is not None:
                        self._check_dtype(p, group, index)
                        self._check_gradient(p, group, index)
            for number, group in enumerate(self.param_groups):
                step = int(group["step"])
                items = [x for index, p in self._graded(group) for x in self._items(p, group, number, index, step)]
                self.algorithms[group["algorithm"]].update(items, group, step)
                for _, p in self._graded(group):
                    if "master" in self.state[p]:
                        local(p).copy_(local(self.state[p]["master"]))
                group["step"] += 1
        return loss

    def _graded(self, group: Group) -> list[tuple[int, Tensor]]:
        """Index and parameter, of those with a gradient."""
        return [(index, p) for index, p in enumerate(group["params"]) if p.grad is not None]

    def _items(self, p: Tensor, group: Group, number: int, index: int, step: int) -> list[Item]:
        weights, replicas = p.detach(), group.get("replicas", "repeat")
        if "master" in self.state[p]:
            weights = self.state[p]["master"]
            follow(local(weights), local(p))
        found = []
        for (suffix, block), (_, grad) in zip(parts(weights, group), parts(grad_of(p), group), strict=True):
            state = {key: local(value) for key, value in self._state_of(p, suffix).items()}
            stochastic = group["rounding"] == "stochastic" and rounds(block)
            noise = noise_of(block, number, index, suffix, step) if stochastic else None
            found.append(Item(local(block), local(grad), state, place_of(block, replicas), noise))
        return found

    def _state_of(self, p: Tensor, suffix: str) -> State:
        """Of one of its blocks."""
        state = self.state[p]
        return {k.removesuffix(suffix): v for k, v in state.items() if k.endswith(suffix)} if suffix else dict(state)

    def _check_dtype(self, p: Tensor, group: Group, index: int) -> None:
        """State is float64 for float64 parameters alone; a mix of the two would fail in some op, or lose digits."""
        wanted = working_dtype(p)
        state = self.state.get(p, {})  # none is made: nothing changes before all gradients are checked
        kept = next((v.dtype for v in state.values() if v.is_floating_point() and v.dtype != wanted), None)
        if kept is not None:
            raise InputError(
                f"a parameter is {p.dtype}, and its optimizer state {kept}",
                where=self._name(group, index),
                why=f"it was converted since the optimizer was built; updates of {p.dtype} are computed in {wanted}",
                todo="build the optimizer after the conversion (model.double(), model.to(dtype)): state begins anew",
            )

    def _check_gradient(self, p: Any, group: Group, index: int) -> None:
        where, grad = self._name(group, index), p.grad
        if grad.layout != torch.strided:
            raise InputError("a gradient is sparse", where=where, todo="build the embedding with sparse=False")
        if group["nonfinite"] != "raise":
            return
        (count,) = agreed([(~torch.isfinite(local(grad))).sum()], [place_of(grad)])
        if int(count):
            raise InputError(
                "a gradient is not finite",
                where=where,
                why=f"{int(count)} of {grad.numel()} entries are NaN or infinite",
                todo='lower the learning rate, clip, or pass nonfinite="skip" to leave such updates out',
            )
        overflowing = self.algorithms[group["algorithm"]].overflowing
        if overflowing is None:
            return
        for _, block in parts(grad_of(p), group):
            (count,) = agreed([overflowing(local(block))], [place_of(block)])
            if int(count):
                raise InputError(
                    "a gradient is too large",
                    where=where,
                    why=f"the squares of {int(count)} of its matrices overflow",
                    todo='scale the loss, clip, or pass nonfinite="skip" to leave such updates out',
                )

    def skipped(self) -> dict[str, int]:
        """How many updates of which parameter were left out because the gradient was not finite (waits for them).

        To be called on all ranks, if parameters are sharded.
        """
        found = {}
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                counts = [v for k, v in self.state[p].items() if k.partition(".")[0] == "skipped"]
                if count := sum(int((v.full_tensor() if is_dtensor(v) else v).sum()) for v in counts):
                    found[f"group {number}: {self._name(group, index)}"] = count
        return found

    # -- saving and resuming ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's own form, with LITE's settings as plain numbers and strings."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group["lite"] = describe_lite(group["lite"])
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`: every tensor keeps its own dtype, so that the next step is the one that it was.

        A state that was saved with other ranks, or one, is laid out as the parameters are here. `rounding` may be
        another: float32 masters begin as the parameters, or are dropped. Hooks run as torch's documentation says: what
        the ones before make of the state is what is checked and loaded.

        Raises:
            InputError: groups, parameters, their names or shapes, algorithms, layouts or LITE settings are others than
                here; nothing was changed then.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            adapted = before(self, state_dict)
            state_dict = state_dict if adapted is None else adapted
        # Not by torch's own method, which casts state to the parameter's dtype and moves counters, and runs the hooks
        # between: the saved bits are wanted, in the layout here.
        state: defaultdict[Tensor, State] = defaultdict(dict)
        groups: list[Group] = []
        for saved, here in zip(checked(state_dict, self.param_groups, self.state), self.param_groups, strict=True):
            for index, p in zip(saved["params"], here["params"], strict=True):
                found = state_dict["state"][index]
                for key, kept in self.state[p].items():
                    device = "cpu" if key.partition(".")[0] in HOST_COUNTERS else p.device
                    value = found.get(key, p)  # a master that the saved run did not keep begins as the parameter
                    state[p][key] = as_laid_out(value, kept).to(device, kept.dtype)
            group = {key: copy.deepcopy(value) for key, value in saved.items() if key != "params"}
            group.update({key: group[key].to("cpu") for key in ("step", "projected") if key in group})
            groups.append({**group, "params": here["params"]})
        self.__setstate__({"state": state, "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def parts(x: Tensor, group: Group) -> list[tuple[str, Tensor]]:
    """The parts of a parameter, or of something like it, that are updated by themselves; and what their state's keys
    end in."""
    if group["split"] is None:
        return [("", x)]
    return [(f".{i}", block) for i, block in enumerate(blocks(x, group["split"], group["layout"]))]


def usable(grad_EMN: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """(active, finite) [E] of a stack of gradients: has one at all and all finite; finite. Without a host sync."""
    top = largest(grad_EMN) if grad_EMN.shape[-2:].numel() else grad_EMN.new_zeros(len(grad_EMN))
    if place.gather is not None:
        top = top.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a maximum over ranks may lose a NaN
        dist.all_reduce(top, dist.ReduceOp.MAX, place.gather)
    finite = torch.isfinite(top)
    return finite & (top > NO_GRADIENT), finite


def need_matrices(p: Tensor, where: str, _: Group) -> None:
    """Raise unless `p` is a matrix or a stack of them, with something in it."""
    if p.ndim < 2 or p.numel() == 0:
        raise InputError(
            f"a parameter {list(p.shape)} is no matrix [..., m, n]",
            where=where,
            todo='put norms, biases and scalars into a group with algorithm="adamw"',
        )
    if p.ndim > 3 and not p.is_contiguous():
        # Its leading dimensions have no view as one, and the update would go to a copy.
        raise InputError(f"a parameter {list(p.shape)} is not contiguous", where=where, todo="store it contiguously")
