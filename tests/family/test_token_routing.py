"""`optimize(router=...)`: every MoE layer of a model is routed from its token ids, by one choice for all layers.

The oracle is the unmodified model in eager mode: its experts' own indices and weights are recorded, and handed to the
optimized model as precomputed routing. Outputs and gradients must then be those of the original.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.models.moe_lm import IDIOMS, MoELM
from moefx.routing import FutureTokensWarning

from ..profile import often
from . import zoo

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
Tensor = torch.Tensor

FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe",
            "jamba", "ernie4_5_moe", "nemotron_h")  # fmt: skip


class Table(nn.Module):
    """A router that looks each token up: logits are a function of the id alone."""

    def __init__(self, vocab: int, experts: int, seed: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, experts)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(vocab, experts, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


class Backward(Table):
    """The routing of each token depends on those behind it."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).flip(1).cumsum(1).flip(1)


def plain(name: str, **overrides: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model without the losses that belong to its own routers."""
    entry = zoo.get(name)
    model, inputs = zoo.build(entry, **overrides), zoo.batch(entry)
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    return model.train(), inputs


def experts_of(model: nn.Module, name: str) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == zoo.get(name).experts]


@contextmanager
def recorded(modules: list[nn.Module], *, detach: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What experts are called with: indices and weights, the latter cut off from the router if asked for."""
    found: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, idx, w = args
        found.append((idx, w.detach()))
        return (x, idx, w.detach() if detach else w)

    handles = [m.register_forward_pre_hook(hook) for m in modules]
    try:
        yield found
    finally:
        for h in handles:
            h.remove()


def with_routing(inputs: dict[str, Tensor], found: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    B, S = inputs["input_ids"].shape
    idx, w = (torch.stack([f[i].reshape(B, S, -1) for f in found]) for i in (0, 1))
    return {**inputs, "routing_idx": idx, "routing_gates": w}


def close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, g in got.items():
        error = float((g - want[name]).norm() / want[name].norm().clamp_min(1e-12))
        assert error < tolerance, (name, error)


# -- the rewrite is right, whatever the router is --------------------------------------------------------------------


@pytest.mark.parametrize("name", often(FAMILIES, ("deepseek_v3", "gpt_oss", "granitemoe")))
def test_a_models_own_routing_given_from_outside_changes_nothing(name: str) -> None:
    model, inputs = plain(name)
    with recorded(experts_of(model, name), detach=True) as found:
        loss, grads = zoo.reference_step(model, inputs)
    given = with_routing(inputs, found)
    opt = moefx.optimize(model, given, router=moefx.Routing(moefx.Precomputed(), scale=1.0), codegen="eager")
    got, mine = zoo.reference_step(opt, given)
    assert float((got - loss).abs()) < 1e-5 * float(loss.abs())
    close(mine, grads)
    with torch.no_grad():
        close({"logits": opt(**given).logits}, {"logits": model(**inputs).logits})
    assert not any(p.grad is not None for n, p in model.named_parameters() if n not in grads)
    # The test can fail: another routing is another model.
    other = {**given, "routing_idx": given["routing_idx"].roll(1, 0)}
    assert float((zoo.reference_step(opt, other)[0] - loss).abs()) > 5e-5 * float(loss.abs())


@pytest.mark.parametrize("name", often(("qwen3_moe", "deepseek_v3", "gpt_oss", "deepseek_v2"), ("deepseek_v3",)))
def test_layers_weigh_given_experts_by_their_own_routers(name: str) -> None:
    """With the model's own choice, gates of the layers are the whole model, and its routers train as before."""
    model, inputs = plain(name)
    with recorded(experts_of(model, name), detach=False) as found:
        loss, grads = zoo.reference_step(model, inputs)
    given = with_routing(inputs, found)
    routing = moefx.Routing(moefx.Precomputed(), gates="layer")
    got, mine = zoo.reference_step(moefx.optimize(model, given, router=routing, codegen="eager"), given)
    assert float((got - loss).abs()) < 1e-5 * float(loss.abs())
    close(mine, grads)


def tiny(name: str = "qwen3_moe") -> tuple[nn.Module, dict[str, Tensor], Table]:
    entry = zoo.get(name)
    model, inputs = zoo.build(entry).train(), zoo.batch(entry)
    return model, inputs, Table(model.config.vocab_size, int(experts_of(model, name)[0].gate_up_proj.shape[0]))


@pytest.mark.parametrize(
    ("name", "codegen"),
    often(
        [("qwen3_moe", "inductor"), *((n, "eager") for n in ("qwen3_moe", "granitemoe", "deepseek_v3"))],
        (("deepseek_v3", "eager"),),
    ),
)
def test_one_choice_and_one_plan_serve_all_layers(name: str, codegen: str) -> None:
    model, inputs, table = tiny(name)
    before = set(model.state_dict())
    opt = moefx.optimize(model, inputs, router=table, codegen=codegen)
    row = next(p for p in opt.report.passes if p.name == "route_by_token")
    layers = len(experts_of(model, name))
    assert row.matched == layers > 1
    graph = opt.graphs["forward"].graph
    assert sum("topk" in str(n.target) for n in graph.nodes) == 1
    assert sum(str(n.target).startswith("moefx.plan") for n in graph.nodes) == 1
    # Nothing of the old routers is left, the new one is no part of the model.
    read = {str(s.key) for v in opt._variants.values() for s in v.program.inputs if s.kind == "param"}
    routers = {f"{n}.{p}" for n, m in model.named_modules() if type(m).__name__ == zoo.get(name).router
               for p, t in m.named_parameters() if t.dim() == 2}  # fmt: skip
    assert len(routers) == layers
    assert not routers & read
    assert {n for n in dict(model.named_parameters())} - read == {
        n for n in dict(model.named_parameters()) if any(n.startswith(r.rpartition(".")[0] + ".") for r in routers)
    }
    assert "moefx_router.table.weight" in read
    assert set(opt.state_dict()) == set(model.state_dict()) == before
    out = opt(**inputs)
    out.loss.backward()
    assert table.table.weight.grad is None
    assert not any(p is table.table.weight for p in opt.parameters())
    assert all(dict(model.named_parameters())[r].grad is None for r in routers)


def test_the_auxiliary_loss_of_the_old_routers_is_gone_and_the_logits_are_the_new_ones() -> None:
    model, inputs, table = tiny()
    assert model.config.output_router_logits
    opt = moefx.optimize(model, inputs, router=table, codegen="eager")
    out = opt(**inputs)
    shifted = out.logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten()
    assert torch.allclose(out.loss, nn.functional.cross_entropy(*shifted), rtol=1e-5)
    assert float(out.aux_loss) == 0
    for logits in out.router_logits:
        assert torch.equal(logits, table(inputs["input_ids"]).flatten(0, 1))


def test_gates_are_a_softmax_over_the_k_best_times_the_layers_factor() -> None:
    model, inputs, table = tiny("deepseek_v3")
    opt = moefx.optimize(model, inputs, router=table, codegen="eager")
    logits = table(inputs["input_ids"]).flatten(0, 1)
    best, idx = logits.topk(2, -1)
    w = torch.softmax(best, -1) * model.config.routed_scaling_factor
    hooks = [m.register_forward_pre_hook(lambda _, a: (a[0], idx, w)) for m in experts_of(model, "deepseek_v3")]
    want = model(**inputs).loss
    for h in hooks:
        h.remove()
    assert torch.allclose(opt(**inputs).loss, want, rtol=1e-5)


def test_layers_with_different_k_take_the_first_of_one_choice() -> None:
    entry = zoo.get("hunyuan_v1_moe")
    model, inputs = zoo.build(entry).train(), zoo.batch(entry)
    experts = experts_of(model, "hunyuan_v1_moe")
    table = Table(model.config.vocab_size, int(experts[0].gate_up_proj.shape[0]))
    opt = moefx.optimize(model, inputs, router=table, codegen="eager")
    logits, ks = table(inputs["input_ids"]).flatten(0, 1), iter([2, 3])
    hooks = []
    for m in experts:
        best, idx = logits.topk(next(ks), -1)
        hooks.append(m.register_forward_pre_hook(lambda _, a, i=idx, b=best: (a[0], i, torch.softmax(b, -1))))
    want = model(**inputs).loss
    for h in hooks:
        h.remove()
    assert torch.allclose(opt(**inputs).loss, want, rtol=1e-5)


def test_a_selection_bias_takes_part_in_the_choice_alone() -> None:
    model, inputs, table = tiny()
    table.register_buffer("selection_bias", 3 * torch.arange(table.table.weight.shape[1]).float())
    opt = moefx.optimize(model, inputs, router=table, codegen="eager")
    logits = table(inputs["input_ids"]).flatten(0, 1)
    idx = (logits + table.selection_bias).topk(2, -1).indices
    w = torch.softmax(logits.gather(-1, idx), -1)
    model.config.output_router_logits = False
    hooks = [m.register_forward_pre_hook(lambda _, a: (a[0], idx, w)) for m in experts_of(model, "qwen3_moe")]
    want = model(**inputs).loss
    for h in hooks:
        h.remove()
    model.config.output_router_logits = True
    assert torch.allclose(opt(**inputs).loss, want, rtol=1e-5)


def test_relabelled_experts_are_the_same_model() -> None:
    model, inputs, table = tiny()
    model.config.output_router_logits = False
    want = moefx.optimize(model, inputs, router=table, codegen="eager")(**inputs).logits
    order = torch.randperm(table.table.weight.shape[1], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        table.table.weight.copy_(table.table.weight[:, order])
        for m in experts_of(model, "qwen3_moe"):
            for p in m.parameters():
                p.copy_(p[order])
    got = moefx.optimize(model, inputs, router=table, codegen="eager")(**inputs).logits
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.equal(order, order.sort().values)


class SequenceMajor(nn.Module):
    """A model that works on [S, B, H], as Megatron does: row s * B + b of its experts is token (b, s)."""

    def __init__(self, moe: nn.Module, vocab: int, H: int) -> None:
        super().__init__()
        self.embedding, self.moe, self.head = nn.Embedding(vocab, H), moe, nn.Linear(H, vocab)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embedding(input_ids).transpose(0, 1).contiguous()
        h = h + h.cumsum(0) / 8  # tokens of one sequence meet
        out = self.moe(h)
        out = out[0] if isinstance(out, tuple) else out
        return self.head(h + out).transpose(0, 1)


def test_rows_in_sequence_major_order_are_recognised() -> None:
    """B == S, so that shapes alone cannot tell the two orders apart."""
    model, _, _ = tiny()
    block = next(m for m in model.modules() if type(m).__name__ == "Qwen3MoeSparseMoeBlock")
    H = model.config.hidden_size
    found = {}
    for kind in (SequenceMajor, type("BatchMajor", (SequenceMajor,), {"forward": _batch_major})):
        torch.manual_seed(0)
        net = kind(block, 50, H).train()
        ids = torch.randint(0, 50, (4, 4))
        table = Table(50, int(block.experts.gate_up_proj.shape[0]))
        opt = moefx.optimize(net, (ids,), router=table, codegen="eager")
        found[kind.__name__] = opt(ids)
    torch.testing.assert_close(found["SequenceMajor"], found["BatchMajor"], rtol=1e-5, atol=1e-5)


def _batch_major(self: Any, input_ids: Tensor) -> Tensor:
    h = self.embedding(input_ids)
    h = h + h.cumsum(1) / 8
    out = self.moe(h)
    return self.head(h + (out[0] if isinstance(out, tuple) else out))


class BlockAsModel(IDIOMS["A2"]):  # type: ignore[misc,name-defined]
    """A language model that is its own MoE block: once raised, the instance has a forward of its own."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__(hidden, 8, 4, 2)
        self.embedding, self.head = nn.Embedding(vocab, hidden), nn.Linear(hidden, vocab)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embedding(input_ids)
        return self.head(h + super().forward(h))


def test_a_block_that_is_the_model_is_routed() -> None:
    torch.manual_seed(0)
    model, ids, table = BlockAsModel(30, 16), torch.randint(0, 30, (2, 6)), Table(30, 4)
    opt = moefx.optimize(model, {"input_ids": ids}, router=table, codegen="eager")
    h = model.embedding(ids)
    gates, idx = table(ids).topk(2)
    every = torch.stack([expert(h) for expert in model.experts], -2)
    chosen = every.gather(-2, idx[..., None].expand(*idx.shape, h.shape[-1]))
    want = model.head(h + (gates.softmax(-1)[..., None] * chosen).sum(-2))
    torch.testing.assert_close(opt(input_ids=ids), want, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(ids), want, rtol=1e-2)  # the model itself has its own router still


def test_a_forward_that_was_assigned_is_routed() -> None:
    model, plain_one = (MoELM(30, 16, 8, 1, 2, 4, 2, "A2", seed=0) for _ in range(2))
    ids, table, own = torch.randint(0, 30, (2, 6)), Table(30, 4), model.forward
    model.forward = lambda input_ids: own(input_ids)
    assigned = model.__dict__["forward"]
    opt, want = (moefx.optimize(m, {"input_ids": ids}, router=table, codegen="eager") for m in (model, plain_one))
    assert torch.equal(opt(input_ids=ids)["logits"], want(input_ids=ids)["logits"])
    assert model.__dict__["forward"] is assigned


# -- modes, shapes, errors -------------------------------------------------------------------------------------------


def test_training_evaluation_other_shapes_and_copies() -> None:
    import copy

    model, inputs, table = tiny()
    opt = moefx.optimize(model, inputs, router=table, codegen="eager", dynamic=dict.fromkeys(inputs, (0,)))
    optimizer = torch.optim.AdamW(opt.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = opt(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    twin = copy.deepcopy(opt)
    assert torch.equal(twin(**inputs).loss, opt(**inputs).loss)
    opt.eval()
    with torch.no_grad():
        whole = opt(**inputs).logits
        half = opt(**{k: v[:1] for k, v in inputs.items()}).logits
    torch.testing.assert_close(half, whole[:1], rtol=1e-4, atol=1e-5)


def test_a_router_of_future_tokens_is_refused_or_warned_about() -> None:
    model, inputs, table = tiny()
    backward = Backward(*table.table.weight.shape)
    with pytest.raises(moefx.InputError, match="depends on tokens behind it"):
        moefx.optimize(model, inputs, router=backward, codegen="eager")
    with pytest.warns(FutureTokensWarning):
        moefx.optimize(model, inputs, router=moefx.Routing(backward, causal=False), codegen="eager")


def test_errors_say_what_to_do() -> None:
    model, inputs, table = tiny()
    V, E = table.table.weight.shape
    with pytest.raises(moefx.PassError, match=rf"the router has {E + 1} experts, the layer has {E}"):
        moefx.optimize(model, inputs, router=Table(V, E + 1), codegen="eager")
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach(), "labels": inputs["labels"]}
    with pytest.raises(moefx.InputError, match="the router reads 'input_ids', which the call does not have"):
        moefx.optimize(model, embedded, router=table, codegen="eager")
    with pytest.raises(moefx.InputError, match=r"not an nn\.Module"):
        moefx.optimize(model, inputs, router="grouter", codegen="eager")  # type: ignore[arg-type]
    with pytest.raises(moefx.InputError, match="gates='learned'"):
        moefx.Routing(table, gates="learned")
    B, S = inputs["input_ids"].shape
    one = {**inputs, "routing_idx": torch.zeros(B, S, 1, dtype=torch.int64), "routing_gates": torch.ones(B, S, 1)}
    with pytest.raises(moefx.PassError, match="has 1 experts per token, a layer has 2"):
        moefx.optimize(model, one, router=moefx.Precomputed(), codegen="eager")
    with pytest.raises(moefx.InputError, match="routing_idx"):
        moefx.optimize(model, inputs, router=moefx.Precomputed(), codegen="eager")
    two = {**inputs, "routing_idx": torch.stack([torch.zeros(B, S), torch.full((B, S), E)], -1).long()}
    two["routing_gates"] = torch.ones(B, S, 2) / 2
    with pytest.raises(moefx.InputError, match=f"holds experts 0 to {E}, a layer has {E}"):
        moefx.optimize(model, two, router=moefx.Precomputed(), codegen="eager")
    two["routing_idx"].zero_()
    with pytest.raises(moefx.InputError, match="one expert twice"):
        moefx.optimize(model, two, router=moefx.Precomputed(), codegen="eager")


def test_a_vocabulary_that_does_not_fit_is_noticed() -> None:
    model, inputs, table = tiny()
    few = grouter_of(model.config.vocab_size - 1, table.table.weight.shape[1])
    inputs = {n: t.clamp_max(model.config.vocab_size - 2) for n, t in inputs.items()}  # all of which it knows
    with pytest.raises(moefx.InputError, match="knows 127 token ids, the model has 128"):
        moefx.optimize(model, inputs, router=few, codegen="eager")
    many = grouter_of(model.config.vocab_size + 8, table.table.weight.shape[1])
    with pytest.warns(UserWarning, match="must use one tokenizer"):
        opt = moefx.optimize(model, inputs, router=many, codegen="eager")
    object.__setattr__(many.config, "vocab_size", int(inputs["input_ids"].max()))
    with pytest.raises(moefx.InputError, match="is outside of the Grouter's vocabulary"):
        opt.generate(inputs["input_ids"], max_new_tokens=1)


def test_token_ids_of_every_call_are_those_of_the_router() -> None:
    """Also where the model has no configuration."""
    torch.manual_seed(0)
    model, ids = MoELM(40, 32, 16, 2, 2, 4, 2, "F"), torch.randint(0, 39, (2, 16))
    with pytest.raises(moefx.InputError, match="knows 39 token ids, the model has 40"):
        moefx.optimize(model, {"input_ids": ids}, router=grouter_of(39, 4), codegen="eager")
    with pytest.warns(UserWarning, match="must use one tokenizer"):
        moefx.optimize(model, {"input_ids": ids}, router=grouter_of(41, 4), codegen="eager")
    router = grouter_of(40, 4)
    opt = moefx.optimize(model, {"input_ids": ids}, router=router, codegen="eager")
    want = opt(input_ids=ids)["logits"]
    object.__setattr__(router.config, "vocab_size", 39)  # as of a router whose rows are padded
    for wrong in (39, 44, -1):
        other = ids.clone()
        other[1, 3] = wrong
        for given in (other, other[:, :9]):
            for call in (lambda given=given: opt(given), lambda given=given: opt(input_ids=given)):
                with pytest.raises(moefx.InputError, match=f"token id {wrong} is outside of the Grouter's vocabulary"):
                    call()
    torch.testing.assert_close(opt(ids)["logits"], want)


def grouter_of(vocab_size: int, experts: int) -> moefx.Grouter:
    return moefx.Grouter.from_config(
        vocab_size=vocab_size, num_experts=experts, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16
    )


def test_a_router_outside_the_normal_form_is_replaced_but_cannot_weigh() -> None:
    entry = zoo.get("phimoe")
    model, inputs = zoo.build(entry).train(), zoo.batch(entry)
    table = Table(model.config.vocab_size, int(experts_of(model, "phimoe")[0].gate_up_proj.shape[0]))
    opt = moefx.optimize(model, inputs, router=table, codegen="eager")
    logits = table(inputs["input_ids"]).flatten(0, 1)
    best, idx = logits.topk(2, -1)
    hooks = [
        m.register_forward_pre_hook(lambda _, a: (a[0], idx, torch.softmax(best, -1)))
        for m in experts_of(model, "phimoe")
    ]
    model.config.output_router_logits = False
    want = model(**inputs).loss
    for h in hooks:
        h.remove()
    assert torch.allclose(opt(**inputs).loss, want, rtol=1e-5)
    with pytest.raises(moefx.PassError, match="no normal form"):
        moefx.optimize(model, inputs, router=moefx.Routing(table, gates="layer"), codegen="eager")


def test_a_capacity_goes_with_the_router_that_had_it_and_the_report_says_so() -> None:
    torch.manual_seed(0)
    model, ids = MoELM(40, 32, 16, 2, 2, 4, 2, "F", capacity=3), torch.randint(0, 40, (2, 16))
    inputs, table = {"input_ids": ids, "labels": ids}, Table(40, 4)
    roomy = MoELM(40, 32, 16, 2, 2, 4, 2, "F")
    roomy.load_state_dict(model.state_dict())
    opts = [moefx.optimize(m, inputs, router=table, codegen="eager") for m in (model, roomy)]
    torch.testing.assert_close(opts[0](**inputs)["logits"], opts[1](**inputs)["logits"])
    assert not torch.allclose(model(**inputs)["logits"], roomy(**inputs)["logits"])  # there, it drops choices
    notes = [p["notes"] for p in opts[0].report.to_dict()["passes"] if p["name"] == "route_by_token"]
    assert [n.split(":")[0] for n in notes[0]] == ["layers.0.moe", "layers.1.moe"]
