"""Every kernel compiles to good machine code for GPUs that are not here, and each gate can fail.

Compilation happens in processes of its own: this one interprets kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moefx.kernels.gpu.sass import MODULES

ROOT = Path(__file__).parents[2]


# A process for some of the modules each: it takes as long to import torch and Triton as to look a module's kernels up.
PARTS = [MODULES[i::4] for i in range(4)]


def compiled(*args: str) -> dict[str, Any]:
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "moefx.kernels.gpu.sass", *args, "--json"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == bool(found["complaints"])
    return found


@pytest.mark.parametrize("modules", PARTS, ids="-".join)
def test_machine_code(modules: tuple[str, ...]) -> None:
    found = compiled(*modules)
    assert found["complaints"] == []
    for module in modules:
        assert {row["target"] for row in found["kernels"] if row["module"] == module} >= {"sm_90", "sm_100"}


def test_every_gate_can_fail() -> None:
    found = compiled("tests.kernels.broken")["complaints"]
    by_gate: dict[str, str] = {}
    for text in found:
        by_gate.setdefault(text.split(": ")[1], text)
    assert set(by_gate) == {
        "spills", "registers", "shared", "HGMMA", "HMMA", "LDGSTS", "atomics", "F2FP.SATFINITE",
    }  # fmt: skip
    for gate, text in by_gate.items():
        assert gate in text.partition(" on sm_90")[2] or f"no {gate}" in text, text
