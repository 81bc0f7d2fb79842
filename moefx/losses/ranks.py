"""Sums over ranks, in eager code and in graphs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def process_group() -> tuple[str, int] | None:
    """Name and size of the default process group; None before `init_process_group` and after its end.

    A graph that sums over ranks holds both, so that it is part of the signature of calls that run one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD
    assert group is not None
    return group.group_name, group.size()


def all_reduce(values: Any) -> Any:
    """The sum over all ranks of the default process group, without gradient; the values themselves on one process."""
    if (group := process_group()) is None:
        return values
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_reduce(values, "sum", group[0]))
