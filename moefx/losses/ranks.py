"""Sums over ranks, in eager code and in graphs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def all_reduce(values: Any) -> Any:
    """The sum over all ranks of the default process group, without gradient; the values themselves on one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    group = dist.group.WORLD
    assert group is not None
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_reduce(values, "sum", group.group_name))
