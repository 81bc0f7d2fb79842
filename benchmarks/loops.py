"""CPU time of one training step of hand-written MoE loops: the model as written against `moefx.optimize` of it.

Single thread, process CPU time, arms interleaved; a ratio is taken within each round, and its median and quartiles over
rounds are printed. Layers have H=256, I=128 (and narrower ones of A1, A2 and w[e]), 32 experts, top-4; the model is a
`MoELM` of two layers (4 heads, vocabulary 256). The arm `products` is the six grouped products of a layer alone, on the
same routing: what no other spelling of the loop can save. Raw rows go to benchmarks/results/loops.csv.

    python benchmarks/loops.py                        all idioms as layers in fp32; A2 as a model; two layers in bf16
    python benchmarks/loops.py --only "A2 layer"      cases whose name contains this; no CSV
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import moefx
from moefx.kernels.grouped_mm import grouped_mm_cpu, grouped_wgrad_cpu
from moefx.models.idioms_base import StackedExperts
from moefx.models.moe_lm import IDIOMS, MoELM

RESULTS = Path(__file__).parent / "results" / "loops.csv"
E, K = 32, 4
WIDE, NARROW = (256, 128), ((32, 32), (64, 32), (128, 64))  # H, I
TOKENS = {2048: (8, 256), 256: (2, 128)}


class StackedLoop(StackedExperts):
    """A loop over experts whose weights are slices `w[e]` of parameters [E, out, in]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TH = x.reshape(-1, self.hidden)
        w_TK, idx_TK = self.route(x_TH)
        y_TH = torch.zeros_like(x_TH)
        for e in range(self.num_experts):
            token, nth = torch.where(idx_TK == e)
            own = x_TH[token]
            h = F.silu(F.linear(own, self.w1[e])) * F.linear(own, self.w3[e])
            y_TH.index_add_(0, token, F.linear(h, self.w2[e]) * w_TK[token, nth, None])
        return y_TH.view(x.shape)


FORMS = {name: IDIOMS[name] for name in ("A1", "A2", "A3", "A5")} | {"w[e]": StackedLoop}


class Layer(nn.Module):
    """One MoE layer and a scalar output, so that a step is forward and backward of exactly that layer."""

    def __init__(self, form: str, H: int, I: int) -> None:
        super().__init__()
        self.moe = FORMS[form](H, I, E, K)

    def forward(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """x and g [B, T, H]; the inner product with g gives a dense output gradient."""
        out: torch.Tensor = (self.moe(x) * g).sum()
        return out


def layer(
    form: str, T: int, dtype: torch.dtype, sizes: tuple[int, int] = WIDE
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(*TOKENS[T], sizes[0], dtype=dtype, requires_grad=True)
    return Layer(form, *sizes).to(dtype), {"x": x, "g": torch.randn_like(x)}


def language_model(form: str, T: int, dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = MoELM(256, *WIDE, 2, 4, E, K, form).to(dtype)
    ids = torch.randint(0, 256, TOKENS[T], generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "labels": ids}


def step(model: Callable[..., Any], params: list[nn.Parameter], inputs: dict[str, torch.Tensor]) -> None:
    for p in params:
        p.grad = None
    out = model(**inputs)
    (out if isinstance(out, torch.Tensor) else out["loss"]).backward()


def update(params: list[nn.Parameter]) -> None:
    """What an optimizer does to parameters, as little of it as possible: they are other ones at every step."""
    with torch.no_grad():
        torch._foreach_mul_(params, 1.0)


def measure(
    case: str, model: nn.Module, inputs: dict[str, torch.Tensor], rounds: int, codegens: list[str]
) -> list[dict[str, Any]]:
    arms: dict[str, nn.Module] = {"original": model}
    for codegen in codegens:
        arms[f"moefx {codegen}"] = moefx.optimize(copy.deepcopy(model), inputs, codegen=codegen)
    alone = products(model.moe, inputs["x"]) if isinstance(model, Layer) else None
    params = {a: list(m.parameters()) for a, m in arms.items()}
    for a, m in arms.items():  # warm up: compiles the backward, fills caches
        for _ in range(3):
            step(m, params[a], inputs)
    rows = []
    for r in range(rounds):
        for a, m in arms.items():
            update(params[a])
            start = time.process_time()
            step(m, params[a], inputs)
            rows.append({"case": case, "arm": a, "round": r, "cpu_ms": (time.process_time() - start) * 1e3})
        if alone is not None:
            start = time.process_time()
            alone()
            rows.append({"case": case, "arm": "products", "round": r, "cpu_ms": (time.process_time() - start) * 1e3})
    return rows


def products(moe: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """The grouped products of one step, forward and backward, with the numbers of rows that the router gives."""
    assert isinstance(moe.gate, nn.Linear)
    H, I = moe.hidden, moe.width
    with torch.no_grad():
        counts = moe.gate(x.reshape(-1, H)).topk(K).indices.flatten().bincount(minlength=E)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=x.dtype)

    S = int(offsets[-1])
    x_SH, h_SI, a_SI, up, down = random(S, H), random(S, 2 * I), random(S, I), random(E, 2 * I, H), random(E, H, I)

    def run() -> None:
        grouped_mm_cpu(x_SH, up, offsets)
        grouped_mm_cpu(a_SI, down, offsets)
        grouped_mm_cpu(x_SH, down.transpose(1, 2), offsets)
        grouped_mm_cpu(h_SI, up.transpose(1, 2), offsets)
        grouped_wgrad_cpu(x_SH, a_SI, offsets)
        grouped_wgrad_cpu(h_SI, x_SH, offsets)

    run()
    return run


def summarise(rows: list[dict[str, Any]]) -> None:
    for case in dict.fromkeys(r["case"] for r in rows):
        times: dict[str, list[float]] = {}
        for r in rows:
            if r["case"] == case:
                times.setdefault(r["arm"], []).append(r["cpu_ms"])
        print(f"{case}: " + ", ".join(f"{a} {statistics.median(t):.1f} ms" for a, t in times.items()))
        base = times.pop("original")
        for arm, t in times.items():
            q1, q2, q3 = statistics.quantiles([y / x for x, y in zip(t, base, strict=True)], n=4)
            print(f"  {arm}: {q2:.2f}x faster (quartiles {q1:.2f} to {q3:.2f})", flush=True)


def cases() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    fp32, bf16 = torch.float32, torch.bfloat16
    for form in FORMS:
        for T in TOKENS:
            found[f"{form} layer T={T} fp32"] = lambda f=form, T=T: layer(f, T, fp32)
    for T in TOKENS:
        found[f"A2 model T={T} fp32"] = lambda T=T: language_model("A2", T, fp32)
        for form in ("A2", "w[e]"):
            found[f"{form} layer T={T} bf16"] = lambda f=form, T=T: layer(f, T, bf16)
        for form in ("A1", "A2", "w[e]"):
            for H, I in NARROW:
                found[f"{form} layer H={H} I={I} T={T} fp32"] = lambda f=form, T=T, s=(H, I): layer(f, T, fp32, s)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default="", help="run cases whose name contains this")
    parser.add_argument("--codegen", default="inductor,eager")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, make in cases().items():
        if args.only not in name:
            continue
        try:
            rows += (new := measure(name, *make(), args.rounds, args.codegen.split(",")))
        except moefx.CaptureError as e:
            print(f"{name}: {e}", flush=True)
        else:
            summarise(new)
    if not args.only:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as f:
            writer = csv.DictWriter(f, [*rows[0], "torch", "machine"])
            writer.writeheader()
            machine = platform.processor() or platform.machine()
            writer.writerows(
                {**r, "cpu_ms": f"{r['cpu_ms']:.3f}", "torch": torch.__version__, "machine": machine} for r in rows
            )
        print(f"\nraw rows: {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS.name}")


if __name__ == "__main__":
    main()
