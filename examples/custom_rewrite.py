"""A rewrite of your own among the precision passes: a factor that is a power of two moves into the scales.

`quantize(x * 2^j)` has the codes of `quantize(x)` and scales that are 2^j times as large (rule R8, exact for
power-of-two scales without eps): the multiplication of every element becomes one of every 128th. Run it with
`python examples/custom_rewrite.py`; `verify=True` measures that the rewrite is exact.
"""

import math
from dataclasses import dataclass

import torch
from torch import fx
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moefx
from moefx.graph.casts import codes_of, quantize_nodes
from moefx.graph.edit import arguments, inheriting, replace, unpack
from moefx.precision import QuantSpec
from moefx.precision.recipe import get_recipe

ops, mul = torch.ops.moefx, torch.ops.aten.mul.Tensor


@moefx.register_pass
@dataclass(frozen=True)
class ScaleFactors(moefx.Pass):
    """`quantize(x * 2^j)` is `quantize(x)` with scales times 2^j."""

    level = "training"
    requires = frozenset({"quantized"})

    def run(self, graph: fx.Graph, ctx: moefx.Context) -> None:
        for q in ctx.at(quantize_nodes(graph)):
            x, specs = q.args[0], arguments(q)["specs"]
            if x.target is not mul or not isinstance(x.args[1], float) or len(x.users) > 1:
                continue
            if math.frexp(x.args[1])[0] != 0.5 or not all(_scales_freely(s) for s in specs):
                ctx.rejected(q, "the factor is no power of two, or the scales have a floor")
                continue
            with inheriting(graph, q) as call:
                new = call(ops.quantize.default, x.args[0], arguments(q)["offsets"], specs)
                new.meta["moefx_cast"] = q.meta["moefx_cast"]
                items = unpack(call, new, 2 * len(specs))
                for i, (codes, scales) in enumerate(codes_of(q).values()):
                    replace(graph, codes, items[2 * i])
                    replace(graph, scales, call(mul, items[2 * i + 1], x.args[1]))
            graph.erase_node(q)
            graph.erase_node(x)
            ctx.matched(new)


def _scales_freely(text: str) -> bool:
    spec = QuantSpec.parse(text)
    return spec.scale == "po2" and not spec.eps


class Scaled(torch.nn.Module):
    """Experts behind a residual multiplier, as Granite has one."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Qwen3MoeConfig(
            hidden_size=128, moe_intermediate_size=128, num_experts=4, experts_implementation="grouped_mm"
        )
        self.experts = Qwen3MoeExperts(self.config)
        for p in self.parameters():
            torch.nn.init.normal_(p, std=0.05)

    def forward(self, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """x [T, H], idx and w [T, k]."""
        return self.experts(x * 4.0, idx, w).square().mean()


if __name__ == "__main__":
    torch.manual_seed(0)
    w, idx = torch.rand(64, 4).topk(2)
    inputs = {"x": torch.randn(64, 128), "idx": idx, "w": w}
    specs = {k: s.replace(" eps=1e-10", "") for k, s in get_recipe("fp8_flow").specs.items()}
    recipe = moefx.Recipe("flow_without_floor", specs=specs)
    passes = moefx.pipeline(recipe, codegen="eager").insert(ScaleFactors(), after="quantize")
    opt = moefx.optimize(Scaled(), inputs, recipe=recipe, passes=passes, codegen="eager", verify=True)
    print(moefx.diff(opt.graphs["quantize"], opt.graphs["scale_factors"]))
    (row,) = [p for p in opt.report.passes if p.name == "scale_factors"]
    print(f"matched {row.matched}, largest difference {row.error}")
