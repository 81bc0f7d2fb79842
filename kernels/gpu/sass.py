"""What the compiler made of a kernel, for machines that are not here: registers, spills, shared memory, instructions.

    python -m moefx.kernels.gpu.sass [permute glu ...] [--target sm_90 sm_100 gfx950] [--json]

Each kernel module has `specimens()`: launcher calls on tensors without data, at sizes of real models, with what their
machine code must and must not hold. A driver that names a target and owns no device stands in for the real one, so
that specialisation, options and constants are those of production. A compile check proves neither speed nor results;
it catches spills, scalar loads and lost tensor-core instructions before any time on a GPU is spent.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from .launch import Compiled, recording

MODULES = tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "\ndef specimens(" in p.read_text()))
TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
SHARED_LIMIT = {"sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024, "gfx950": 160 * 1024}
# Atomics on global memory, on AMD by the beginnings of their names; those on shared memory (ATOMS, ds_add: histograms)
# are fine. BUFFER and FLAT are other ways to the same memory.
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")
AMD_ATOMICS = ("GLOBAL_ATOMIC_", "BUFFER_ATOMIC_", "FLAT_ATOMIC_")
# What does on sm_100 what an instruction of sm_90 does there: the fifth generation's tensor cores, pairs of fp32.
ON_SM_100 = {"HGMMA": "UTCHMMA", "QGMMA": "UTCQMMA", "FFMA": "FFMA|FFMA2", "FADD": "FADD|FADD2"}
# Asked on sm_90 alone: sums over blocks of FP8 products outside the tensor cores, which sum in about 14 bits there.
ON_SM_90 = ("FFMA|FADD",)
SPILLS = ("LDL", "STL")
TOOLS = Path(nvidia.__file__).parent / "bin"


@dataclass(frozen=True)
class Specimen:
    """One launcher call to be compiled.

    Attributes:
        name: unique within its module, as "bf16 H=2048".
        call: calls the launcher on tensors of the device "meta".
        has: SASS opcodes of sm_90 of which at least one kernel of the call must hold some; "A|B" accepts either. On
            sm_100 those of `ON_SM_100` stand for them, and those of `ON_SM_90` are not asked for.
        lacks: opcodes that no kernel of the call may hold, nor those that stand for them.
        registers: the most that a thread may use.
        targets: the targets that the call is for.
    """

    name: str
    call: Callable[[], Any]
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    registers: int = 255
    targets: tuple[str, ...] = ("sm_90", "sm_100")


@dataclass(frozen=True)
class Code:
    """One kernel's machine code in figures. `instructions` are counted by their full names, modifiers included."""

    kernel: str
    target: str
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int] = field(repr=False)

    def count(self, name: str) -> int:
        """Instructions called `name`: an opcode as HGMMA, or with modifiers as F2FP.SATFINITE."""
        head, *more = name.split(".")
        parts = ((full.split("."), n) for full, n in self.instructions.items())
        return sum(n for part, n in parts if part[0] == head and set(more) <= set(part))

    def any_of(self, names: str) -> int:
        """Instructions called any of "A|B", or what stands for them on this target."""
        spelled = "|".join(ON_SM_100.get(n, n) for n in names.split("|")) if self.target == "sm_100" else names
        return sum(map(self.count, spelled.split("|")))

    def atomics(self) -> int:
        """Atomics on global memory."""
        amd = sum(n for name, n in self.instructions.items() if name.startswith(AMD_ATOMICS))
        return amd + sum(map(self.count, ATOMICS))


@dataclass(frozen=True)
class Exemption:
    """Specimens that a target's gates are not asked about, by the name under which docs/kernels.md speaks of it.

    Attributes:
        name: what is left out, in the words of the documentation.
        module: the kernel module of the specimens.
        pattern: matches the beginning of their names.
        target: where they are left out.
        why: what fails there.
    """

    name: str
    module: str
    pattern: str
    target: str
    why: str


EXEMPTIONS = (
    Exemption(
        "the backward of some gated activations with casts in both orientations", "glu_quantize",
        r"backward (both, act .* by columns|of codes, .* by columns|mx by columns .*|clamp I=2880)$", "sm_100",
        "spills 8 to 24 bytes: gradients of gate and up are live at once",
    ),
)  # fmt: skip


class _Nowhere:
    """A driver for a target without a device."""

    def __init__(self, name: str) -> None:
        self.target, self.number = TARGETS[name], list(TARGETS).index(name)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        raise RuntimeError("there is no device behind this target")


@contextmanager
def targeting(name: str) -> Iterator[None]:
    """Within, kernels are compiled for the target of that name."""
    before = driver._active  # the public reset would look for a device
    driver.set_active(_Nowhere(name))
    try:
        yield
    finally:
        driver._active = before


def compile_call(call: Callable[[], Any], target: str) -> list[Code]:
    """The code of each kernel that `call` launches."""
    with targeting(target), recording() as made:
        call()
        if not made:
            raise RuntimeError("the call launched no kernel: give it sizes above zero")
        return [_read(c, target) for c in made]


def _read(c: Compiled, target: str) -> Code:
    shared = int(c.kernel.metadata.shared)
    if target.startswith("sm_"):
        return Code(c.name, target, shared=shared, **_disassembled(c.kernel.asm["cubin"]))
    text = c.kernel.asm["amdgcn"]
    names = [m.upper() for m in re.findall(r"^\s+([a-z][a-z0-9_]+)", text, re.M)]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
    stack = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])  # type: ignore[index]
    return Code(c.name, target, registers, stack, shared, dict(Counter(names)))


def _disassembled(cubin: bytes) -> dict[str, Any]:
    """Registers, stack and instructions of a kernel. Kept in Triton's cache: the tools take longer than its lookup."""
    reader = inspect.getsource(_disassembled) + triton.__version__  # what else changes in this file changes no count
    key = hashlib.sha256(cubin + reader.encode()).hexdigest()
    cache = get_cache_manager(key)
    kept = cache.get_file("sass.json")
    if kept is not None:
        known: dict[str, Any] = json.loads(Path(kept).read_text())
        return known
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", file)
        text = _tool("nvdisasm", "-c", "-ndf", file)  # without its dataflow analysis, a third faster
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]+)", text, re.M)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    made = {"registers": int(found[1]), "stack": int(found[2]), "instructions": dict(Counter(names))}
    cache.put(json.dumps(made), "sass.json", binary=False)
    return made


def _tool(name: str, *args: Any) -> str:
    return subprocess.run([TOOLS / name, *map(str, args)], check=True, capture_output=True, text=True).stdout


def complaints(specimen: Specimen, codes: Sequence[Code]) -> list[str]:
    """What is wrong with the code of a specimen; nothing if all is well."""
    found, target = [], codes[0].target
    for c in codes:
        where = f"{specimen.name}: {c.kernel} on {c.target}"
        spilled = sum(map(c.count, SPILLS))
        if c.stack or spilled:
            found.append(f"{where} spills: {c.stack} bytes of stack, {spilled} local loads and stores")
        if c.registers > specimen.registers:
            found.append(f"{where} uses {c.registers} registers, more than {specimen.registers}")
        if c.shared > SHARED_LIMIT[c.target]:
            found.append(f"{where} needs {c.shared} bytes of shared memory, more than {SHARED_LIMIT[c.target]}")
        if c.atomics():
            found.append(f"{where} has {c.atomics()} atomics on global memory")
        found += [f"{where} has {c.any_of(name)} {name}" for name in specimen.lacks if c.any_of(name)]
    if target.startswith("sm_"):
        for wanted in specimen.has:
            asked = target == "sm_90" or wanted not in ON_SM_90
            if asked and not any(c.any_of(wanted) for c in codes):
                found.append(f"{specimen.name}: no {wanted} in {', '.join(c.kernel for c in codes)} on {target}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Compile specimens, print a line for each kernel, and return 1 if a gate fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "modules", nargs="*", default=list(MODULES), help="kernel modules here, or dotted names; all here by default"
    )
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    args = parser.parse_args(argv)
    rows, wrong = [], []
    for module in args.modules:
        for s in import_module(module if "." in module else f"{__package__}.{module}").specimens():
            for target in (t for t in args.target if t in s.targets):
                codes = compile_call(s.call, target)
                wrong += [f"{module}: {text}" for text in complaints(s, codes)]
                rows += [{"module": module, "specimen": s.name, **asdict(c)} for c in codes]
                if not args.json:
                    for c in codes:
                        sizes = f"{c.registers:4} registers {c.shared:7} B shared"
                        print(f"{module:18} {s.name:36} {c.kernel:28} {target:7} {sizes}")
    if args.json:
        print(json.dumps({"kernels": rows, "complaints": wrong}))
    else:
        for e in EXEMPTIONS:
            if e.module in args.modules and e.target in args.target:
                print(f"not gated on {e.target}: {e.name} ({e.module}), which {e.why}")
        print("\n".join(wrong) or "all gates hold")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
