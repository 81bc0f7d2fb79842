"""A pass of your own: registered, inserted into the pipeline, and shown in the report.

The rewrite is a harmless one that stands in for yours: it puts the number of a multiplication second. Run it with
`python examples/custom_pass.py`. From what it prints:

    pass                  level     numerics   matched rejected         nodes      ms  error
    expand_experts        model     exact            1        0     168 > 179    21.5  0.0e+00
    numbers_second        model     exact            1        0     179 > 179    12.0  0.0e+00

    -%mul_15: f32[] = operator.mul(0.001, %to_16)
    +%mul_15: f32[] = operator.mul(%to_16, 0.001)  # [numbers_second]
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx
from transformers import MixtralConfig, MixtralForCausalLM

import moefx
from moefx.graph.edit import find, value


@moefx.register_pass  # known by name from now on: passes=["numbers_second", ...]
@dataclass(frozen=True)
class NumbersSecond(moefx.Pass):
    """`2 * x` becomes `x * 2`, so that later patterns need only one spelling."""

    largest: float = float("inf")  # fields are options

    level = "model"
    requires = frozenset({"experts_expanded"})
    provides = frozenset({"numbers_second"})
    numerics = "exact"

    def run(self, graph: fx.Graph, ctx: moefx.Context) -> None:
        for node in ctx.at(find(graph, operator.mul)):
            a, b = node.args
            if isinstance(a, fx.Node) or not isinstance(b, fx.Node) or not isinstance(value(b), torch.Tensor):
                continue
            if abs(a) > self.largest:
                ctx.rejected(node, f"{a} is larger than {self.largest}")
                continue
            node.args = (b, a)
            ctx.matched(node)


if __name__ == "__main__":
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config).train()
    ids = torch.randint(0, 64, (2, 16))
    pipeline = moefx.pipeline("bf16", codegen="eager").insert(NumbersSecond(), after="expand_experts")
    batch = {"input_ids": ids, "labels": ids}
    opt = moefx.optimize(model, batch, passes=pipeline, codegen="eager", verify=True)
    print(opt.report)
    print(moefx.diff(opt.graphs["expand_experts"], opt.graphs["numbers_second"]))
