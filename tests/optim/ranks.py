"""Checks on several processes (gloo): started once, each check reports for itself.

`launch` starts `python -m tests.optim.ranks` on every rank; a check is a function of a `Context`, in the `CHECKS` of a
module: `sharded_training.py`, with those of `sharded.py`, unless told otherwise.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARDED = "tests.optim.sharded_training"


def launch(world: int, folder: Path, names: list[str], module: str = SHARDED) -> dict[str, str]:
    """Run checks of a module on `world` processes; name of a check -> what failed on any rank, empty if nothing did."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.optim.ranks", str(world), str(folder), module, *names]
    processes = []
    for rank in range(world):
        with (folder / f"log{rank}").open("w") as log:
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env={**environment, "RANK": str(rank)}, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:
        deadline = time.monotonic() + 600  # ends what hangs; a busy machine takes minutes
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    found: dict[str, str] = {}
    for rank in range(world):
        report = folder / f"report{rank}.json"
        said = json.loads(report.read_text()) if report.exists() else {}
        for name in names:
            text = said.get(name, f"never ended\n{(folder / f'log{rank}').read_text()[-3000:]}")
            found[name] = found.get(name, "") + (f"rank {rank}: {text}\n" if text else "")
    return found


def main(world: int, folder: Path, module: str, names: list[str]) -> None:
    """One rank."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from .sharded_problem import Context

    checks = importlib.import_module(module).CHECKS
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    store, patience = f"file://{folder / 'store'}", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)
    found: dict[str, str] = {}
    for name in names:
        try:
            checks[name](Context(rank, world, folder))
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        (folder / f"report{rank}.json").write_text(json.dumps(found))
        if found[name]:
            os._exit(1)  # the others may be inside a collective that will never be whole again; this ends it
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
