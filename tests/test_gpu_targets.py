"""`make test-gpu SYSTEM=1` on a machine without a network: what it would run, and what its tests import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A machine with a GPU has these; moefx needs more, but not what a training step does.
ALLOWED = {"torch", "triton", "numpy", "pytest", "transformers", "moefx"}


def commands(*args: str) -> str:
    done = subprocess.run(["make", "-n", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_nothing_is_downloaded_on_top_of_the_systems_packages(target: str) -> None:
    found = commands(target, "SYSTEM=1", "VENV=not-made-yet", "PYTHON=python-of-the-machine")
    installs = [line for line in found.splitlines() if " install " in line]
    assert len(installs) == 1
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(installs[0].split())
    assert "python-of-the-machine -m venv --without-pip" in found
    assert re.search(r"not-made-yet/bin/python -m (pytest -m gpu|benchmarks.gpu)", found)
    assert "install -c constraints.txt torch==" in commands(target, "VENV=not-made-yet")


def test_the_oldest_triton_is_that_of_the_project_file() -> None:
    found = commands("sass-oldest", "VENV=not-made-yet", "ARGS=permute")
    oldest = re.search(r'"triton>=([\d.]+);', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    version = ".".join((oldest[1] + ".0").split(".")[:3])
    assert f"triton=={version}\n" in found
    assert re.search(rf"PYTHONPATH=\S+/triton-{version} \S+python -m moefx.kernels.gpu.sass permute --target", found)


@pytest.mark.parametrize("file", sorted((ROOT / "tests/gpu").glob("*.py")), ids=lambda f: f.stem)
def test_tests_on_a_gpu_import_what_such_machines_have(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            assert name.partition(".")[0] in ALLOWED | sys.stdlib_module_names, f"{file.name} imports {name}"


@pytest.mark.nightly
def test_moefx_is_imported_without_what_draws_and_trains() -> None:
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"rich", "typer", "hypothesis", "safetensors", "accelerate", "matplotlib", "xdist"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import moefx, tests.gpu.cases, tests.gpu.checks, tests.gpu.test_ops, tests.gpu.test_training_step
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
