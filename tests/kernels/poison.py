"""Memory that shows what a kernel forgot to write."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on `torch.empty` gives NaN, or -77 (77 where unsigned) in integers."""
    real = torch.empty

    def empty(*args: Any, **kw: Any) -> torch.Tensor:
        t = real(*args, **kw)
        return t.fill_(float("nan") if t.is_floating_point() else 77 if t.dtype is torch.uint8 else -77)

    monkeypatch.setattr(torch, "empty", empty)
