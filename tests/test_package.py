"""The house rules that no linter knows: who may import whom, what is packaged, what a built wheel holds."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

# Outermost first. A module imports from its own layer or from one further down, never from one further up.
LAYERS = (
    ("moefx", "moefx.cli", "moefx.train", "moefx.grouter", "moefx.plan"),
    ("moefx.models",),
    (
        *(
            "moefx.optimize",
            "moefx.slots",
            "moefx.stages",
            "moefx.backend",
            "moefx.module",
            "moefx.primals",
            "moefx.decoding",
            "moefx.program",
            "moefx.weights",
        ),
        *("moefx.precision_metrics", "moefx.pickled", "moefx.signature"),
    ),
    ("moefx.passes",),
    (
        "moefx.manager",
        "moefx.verify",
        "moefx.graph",
        "moefx.capture",
        "moefx.holder",
        "moefx.joint",
        "moefx.tangents",
        "moefx.routing",
        "moefx.report",
        "moefx.view",
        "moefx.ledger",
        "moefx.delayed",
        "moefx.raising",
    ),
    ("moefx.losses",),
    ("moefx.dialect",),
    ("moefx.optim",),
    ("moefx.kernels",),
    ("moefx.precision",),
    ("moefx.compat", "moefx.packages", "moefx.files"),
    ("moefx.errors",),
)
DEPTH = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}
USES_MODELS = ("moefx", "moefx.models", "moefx.cli", "moefx.train", "moefx.grouter")
PRIVATE_TORCH = ("torch._dynamo", "torch._functorch", "torch._inductor", "torch._guards", "torch._subclasses")
# In extras, or on some platforms only: `import moefx` and every module under it must work without them.
OPTIONAL = (
    *("transformers", "tensorboard", "torch.utils.tensorboard", "safetensors", "triton", "transformer_engine"),
    *("scipy", "sklearn", "matplotlib"),
)
# The rooms that an optional package may be imported in, because they are themselves imported when first needed.
DEFERRED = {"moefx.kernels.gpu": "triton"}


class Import(NamedTuple):
    """`from a import b` is named a.b: whether b is a module does not matter, rooms are found by prefix."""

    name: str
    line: int
    at_import: bool  # runs when the importing module is itself imported


def under(name: str, packages: Sequence[str]) -> str | None:
    """The first of `packages` that `name` is or lies in."""
    return next((p for p in packages if name == p or name.startswith(p + ".")), None)


def room(name: str) -> str:
    """The innermost known room of a moefx module; `moefx` for one that has no place in LAYERS."""
    while name not in DEPTH:
        name = name.rpartition(".")[0]
    return name


class _Collector(ast.NodeVisitor):
    def __init__(self, package: str) -> None:
        self.package, self.deferred, self.found = package, 0, list[Import]()

    def _add(self, name: str, node: ast.stmt | ast.expr) -> None:
        self.found.append(Import(name, node.lineno, not self.deferred))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = importlib.util.resolve_name("." * node.level + (node.module or ""), self.package)
        for alias in node.names:
            self._add(base if alias.name == "*" else f"{base}.{alias.name}", node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        # torch loads some private packages when they are first touched: `torch._dynamo.reset()` is an import.
        name = ast.unparse(node)
        if under(name, PRIVATE_TORCH):
            self._add(name, node)
        else:
            self.generic_visit(node)

    def _visit_deferred(self, body: Sequence[ast.AST]) -> None:
        self.deferred += 1
        for child in body:
            self.visit(child)
        self.deferred -= 1

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_deferred(list(ast.iter_child_nodes(node)))

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self._visit_deferred(node.body)
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)


def imports_of(source: str, module: str, is_package: bool) -> list[Import]:
    """Everything `module` imports, anywhere in its source, with relative names resolved."""
    collector = _Collector(module if is_package else module.rpartition(".")[0])
    collector.visit(ast.parse(source))
    return collector.found


def scan(root: Path, package_dir: Mapping[str, str]) -> dict[str, list[Import]]:
    """Module name -> imports, for every Python file in the mapped directories."""
    found = {}
    for package, directory in package_dir.items():
        for file in sorted((root / directory).rglob("*.py")):
            parts = file.relative_to(root / directory).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join((package, *(parts[:-1] if is_package else parts)))
            found[module] = imports_of(file.read_text(encoding="utf-8"), module, is_package)
    return found


def _is_deferred(module: str, name: str) -> bool:
    return any(under(module, (room,)) and under(name, (package,)) for room, package in DEFERRED.items())


def violations(imports: Mapping[str, Sequence[Import]]) -> list[str]:
    """One line per import that breaks the rules; empty if the house is in order."""
    found = []
    for module, its_imports in imports.items():
        here = room(module)
        if here == "moefx" and module != "moefx":
            found.append(f"{module}: has no place in the import order; add it to LAYERS")
            continue
        for name, line, at_import in its_imports:
            complain = f"{module}:{line}: imports {name}: "
            if under(name, PRIVATE_TORCH) and module != "moefx.compat":
                found.append(complain + "only moefx.compat may import torch's private packages")
            if under(name, OPTIONAL) and at_import and not _is_deferred(module, name):
                found.append(complain + "optional, so only inside the function that needs it")
            if under(name, ("passes", "kernels", "models")):
                found.append(complain + "a second copy of the mapped package; use the name under moefx")
            if under(name, tuple(DEFERRED)) and not under(module, tuple(DEFERRED)) and at_import:
                found.append(complain + "imports an optional package itself, so only inside the function that needs it")
            if not under(name, ("moefx",)) or module == "moefx":
                continue
            there = room(name)
            if there == "moefx.models" and here not in USES_MODELS:
                found.append(complain + "only cli, train and grouter may use the models")
            elif DEPTH[there] < DEPTH[here]:
                found.append(complain + f"{here} lies below {there}")
            elif here == there == "moefx.passes" and module != here and not under(name, (module,)):
                found.append(complain + "a pass imports no other pass")
    return found


def settings(root: Path = ROOT) -> dict[str, Any]:
    tables: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return tables["tool"]["setuptools"]


def found_packages(root: Path, package_dir: Mapping[str, str]) -> list[str]:
    """Every directory with Python files under the mapped roots, as a package name."""
    return sorted(
        ".".join((package, *directory.relative_to(root / mapped).parts))
        for package, mapped in package_dir.items()
        for directory in {file.parent for file in (root / mapped).rglob("*.py")}
    )


# -- import order ----------------------------------------------------------------------------------------------------


def test_imports_point_downwards() -> None:
    imports = scan(ROOT, settings()["package-dir"])
    assert {"moefx", "moefx.errors", "moefx.passes", "moefx.kernels", "moefx.models"} <= set(imports)
    assert violations(imports) == []


def scan_one(tmp_path: Path, file: str, source: str) -> list[str]:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return violations(scan(tmp_path, settings()["package-dir"]))


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("kernels/glu.py", "from moefx.graph import edit", "moefx.kernels lies below moefx.graph"),
        ("kernels/glu.py", "import moefx.graph.edit as e", "moefx.kernels lies below moefx.graph"),
        ("kernels/glu.py", "from ..dialect.glu import glu", "moefx.kernels lies below moefx.dialect"),
        ("kernels/glu.py", "from .. import manager", "moefx.kernels lies below moefx.manager"),
        ("moefx/graph/edit.py", "def f():\n    from moefx import passes", "moefx.graph lies below moefx.passes"),
        ("moefx/graph/__init__.py", "from ..optimize import x", "moefx.graph lies below moefx.optimize"),
        ("moefx/errors.py", "from . import compat", "moefx.errors lies below moefx.compat"),
        ("moefx/joint.py", "import moefx", "moefx.joint lies below moefx"),
        ("moefx/capture.py", "from moefx import Pass", "moefx.capture lies below moefx"),
        ("models/hf.py", "import moefx.train", "moefx.models lies below moefx.train"),
        ("moefx/optimize.py", "from moefx.models import grouter", "only cli, train and grouter"),
        ("passes/raise_experts.py", "from moefx import models", "only cli, train and grouter"),
        ("moefx/plan.py", "from moefx.models.grouter import fold", "only cli, train and grouter"),
        ("passes/fuse.py", "from .expand import Expand", "no other pass"),
        ("passes/fuse.py", "from moefx.passes import expand", "no other pass"),
        ("passes/fuse.py", "import moefx.passes", "no other pass"),
        ("moefx/joint.py", "from torch._functorch import aot_autograd", "only moefx.compat"),
        ("moefx/joint.py", "import torch\ntorch._inductor.config.x = 1", "only moefx.compat"),
        ("moefx/__init__.py", "from torch import _dynamo", "only moefx.compat"),
        ("kernels/glu.py", "try:\n    import triton.language as tl\nexcept ImportError:\n    pass", "optional"),
        ("kernels/gpu/glu.py", "import matplotlib", "optional"),
        ("kernels/glu.py", "from moefx.kernels.gpu import glu", "optional"),
        ("moefx/train/loop.py", "from torch.utils.tensorboard import SummaryWriter", "optional"),
        ("models/hf.py", "class A:\n    from transformers import AutoModel", "optional"),
        ("moefx/__init__.py", "import transformer_engine", "optional"),
        ("passes/fuse.py", "from kernels import glu", "second copy"),
        ("moefx/stray.py", "", "no place in the import order"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    (found,) = scan_one(tmp_path, file, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("moefx/__init__.py", "from moefx.models import grouter\nfrom .cli import main\nfrom .errors import PassError"),
        ("moefx/cli.py", "import moefx\nfrom moefx import models, train\nfrom .optimize import optimize"),
        ("moefx/optimize.py", "from . import module, passes, joint\nfrom .errors import CaptureError"),
        ("moefx/manager.py", "from .graph.edit import insert\nfrom .report import Report"),
        ("moefx/compat.py", "import torch._dynamo\nfrom torch._functorch import aot_autograd\nfrom . import errors"),
        ("passes/__init__.py", "from . import expand, fuse\nfrom .fuse import Fuse"),
        ("passes/fuse.py", "from moefx.manager import Pass\nfrom ..dialect import glu"),
        ("kernels/glu.py", "def launch():\n    import triton\nasync def g():\n    import triton"),
        ("kernels/gpu/glu.py", "import triton\nimport triton.language as tl\nfrom .launch import launch"),
        ("models/hf.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
        ("models/hf.py", "import torch\nimport tritonic\ntorch._dynamos"),
    ],
)
def test_a_right_import_is_left_alone(tmp_path: Path, file: str, source: str) -> None:
    assert scan_one(tmp_path, file, source) == []


# -- packaging -------------------------------------------------------------------------------------------------------


def test_every_package_is_listed_and_every_listed_package_exists() -> None:
    configured = settings()
    found = found_packages(ROOT, configured["package-dir"])
    assert found == sorted(configured["packages"])
    for package in found:
        mapped, directory = max((p, d) for p, d in configured["package-dir"].items() if under(package, (p,)))
        inside = package.removeprefix(mapped).strip(".").split(".")
        assert ROOT.joinpath(directory, *inside, "__init__.py").is_file(), f"{package} has no __init__.py"


def test_an_unlisted_package_and_a_shadowing_one_are_found(tmp_path: Path) -> None:
    for file in ("moefx/__init__.py", "moefx/new/deep/a.py", "moefx/passes/a.py", "passes/__init__.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    found = found_packages(tmp_path, {"moefx": "moefx", "moefx.passes": "passes"})
    assert found == ["moefx", "moefx.new.deep", "moefx.passes", "moefx.passes"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that no old build/ directory can leak into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for directory in settings()["package-dir"].values():
        shutil.copytree(ROOT / directory, source / directory, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", str(out), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_source_file_under_the_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} - {"moefx-0.1.0.dist-info"} == {"moefx"}
    modules = {n.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for n in names if n.endswith(".py")}
    assert modules == set(scan(ROOT, settings()["package-dir"]))
    assert "moefx/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_imports_from_an_empty_directory_without_the_extras(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    packages = settings()["packages"]
    absent = [name for name in OPTIONAL if not name.startswith("torch.")]
    code = f"import sys; sys.path.insert(0, {str(site)!r}); sys.modules.update(dict.fromkeys({absent!r}))\n"
    # The files are printed because an editable install could stand in for what the wheel lacks.
    code += f"import {', '.join(packages)}\nprint({', '.join(f'{p}.__file__' for p in packages)}, sep='\\n')"
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    files = done.stdout.splitlines()
    assert len(files) == len(packages)
    assert all(Path(file).is_relative_to(site) for file in files), files
