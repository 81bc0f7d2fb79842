"""A pass of your own, inserted into the pipeline and shown in the report.

It counts what each expert layer moves, and swaps the two operands of multiplications by a Python number, a harmless
rewrite that stands in for a real one. Run it: python examples/custom_pass.py
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx
from transformers import MixtralConfig, MixtralForCausalLM

import moefx
from moefx.graph.edit import find, value


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
    opt = moefx.optimize(model, {"input_ids": ids, "labels": ids}, passes=pipeline, codegen="eager", verify=True)
    print(opt.report)
    print(moefx.diff(opt.graphs["expand_experts"], opt.graphs["numbers_second"]))
