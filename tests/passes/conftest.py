"""Real models, captured once."""

from __future__ import annotations

import pytest

from moefx.passes import ExpandExperts, FoldCombine, FusePlanPermute, MergeRouters, SharePlans
from tests.family import zoo
from tests.passes.subject import Subject, as_subject, captured_graph, trained


def build(name: str, **overrides: object) -> Subject:
    """The model graph of a tiny model of a family, copied before it is used."""
    entry = zoo.get(name)
    return as_subject(captured_graph(zoo.build(entry, **overrides), **zoo.batch(entry))).copy()


@pytest.fixture(scope="session")
def qwen() -> Subject:
    """Model graph of a Qwen3-MoE with an auxiliary loss."""
    pytest.importorskip("transformers")
    return build("qwen3_moe", num_hidden_layers=2, mlp_only_layers=[])


@pytest.fixture(scope="session")
def gpt_oss() -> Subject:
    """Model graph of a gpt-oss: biases, weights stored [E, in, out], an interleaved clamped activation."""
    pytest.importorskip("transformers")
    return build("gpt_oss")


@pytest.fixture(scope="session")
def gpt_oss_training() -> Subject:
    """Its training graph."""
    pytest.importorskip("transformers")
    entry = zoo.get("gpt_oss")
    model = zoo.build(entry)
    passes = (MergeRouters(), ExpandExperts(), SharePlans(), FoldCombine(), FusePlanPermute())
    return trained(model, captured_graph(model, **zoo.batch(entry)), passes).copy()


@pytest.fixture(scope="session")
def qwen_training() -> Subject:
    """Training graph of the Qwen3-MoE after the model passes."""
    pytest.importorskip("transformers")
    entry = zoo.get("qwen3_moe")
    model = zoo.build(entry, num_hidden_layers=2, mlp_only_layers=[])
    passes = (MergeRouters(), ExpandExperts(), SharePlans(), FoldCombine(), FusePlanPermute())
    return trained(model, captured_graph(model, **zoo.batch(entry)), passes).copy()
