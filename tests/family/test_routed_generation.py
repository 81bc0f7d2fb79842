"""`generate` of a model that is routed by token ids.

The oracle is the routed graph: at every step of decoding, the logits must be those of `opt` on the whole prefix, and
not those of the original with its own routers.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.models.moe_lm import MoELM

from ..profile import often
from . import loops, zoo

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
Tensor = torch.Tensor

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "hunyuan_v1_moe")
BY_LAYER = ("qwen3_moe", "deepseek_v2", "gpt_oss", "dbrx")  # dbrx: hand-written experts
# Its norms behind the rotary embedding see where a token stands, and not only how far from others. With padding on the
# left, transformers' generate counts from the first token, which a call does when it is given the positions.
ABSOLUTE = "HunYuanMoEV1ForCausalLM"
PAD, PROMPT, STEPS = 0, 7, 4
TOLERANCE = 1e-5


def made_grouter(vocab: int, experts: int, **options: Any) -> moefx.Grouter:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "init_std": 0.5, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        grouter = moefx.Grouter.from_config(vocab_size=vocab, num_experts=experts, **sizes)
        grouter.selection_bias.copy_(torch.randn(experts) / 4)
    return grouter


def built(name: str) -> tuple[nn.Module, moefx.Grouter]:
    if name in loops.NAMES:
        model, experts = loops.build(loops.get(name)), loops.EXPERTS
    else:
        model = zoo.build(zoo.get(name))
        experts = next(m for m in model.modules() if type(m).__name__ == zoo.get(name).experts).gate_up_proj.shape[0]
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    return model.eval(), made_grouter(model.config.vocab_size, int(experts))


def prompt(seed: int = 1) -> dict[str, Tensor]:
    """Two sequences, the second shorter and padded on the left."""
    ids = torch.randint(3, 128, (2, PROMPT), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :3], ids[1, :3] = 0, PAD
    return {"input_ids": ids, "attention_mask": mask}


def optimized(model: nn.Module, routing: Any) -> moefx.OptimizedModule:
    example = placed(model, prompt())
    with torch.no_grad():
        return moefx.optimize(model, example, router=routing, codegen="eager", dynamic=dict.fromkeys(example, (0, 1)))


def placed(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """A call with positions where the model needs them."""
    if type(model).__name__ != ABSOLUTE:
        return given
    mask = given["attention_mask"]
    return {**given, "position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)}


def generated(model: Any, given: dict[str, Tensor] | None = None, **options: Any) -> Any:
    settings = {
        "max_new_tokens": STEPS, "do_sample": False, "use_cache": True, "pad_token_id": PAD, "eos_token_id": None,
        "output_logits": True, "return_dict_in_generate": True, **options,
    }  # fmt: skip
    return model.generate(**(given or prompt()), **settings)


def prefix(sequences: Tensor, mask: Tensor, length: int) -> dict[str, Tensor]:
    more = mask.new_ones(len(mask), length - mask.shape[1])
    return {"input_ids": sequences[:, :length], "attention_mask": torch.cat((mask, more), 1)}


def gap(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@contextmanager
def windows(model: nn.Module, grouter: nn.Module) -> Iterator[tuple[list[int], list[int]]]:
    """How many tokens each forward of the model, and each step of the router, is given."""
    seen: list[int] = []
    read: list[int] = []
    own = type(grouter).step
    handle = model.register_forward_pre_hook(lambda _, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    grouter.step = lambda ids, *rest: (read.append(ids.shape[1]), own(grouter, ids, *rest))[1]
    try:
        yield seen, read
    finally:
        handle.remove()
        del grouter.step


def check_steps(opt: moefx.OptimizedModule, out: Any, given: dict[str, Tensor]) -> None:
    """The logits of every step against the graph on the prefix; and against the original, which must differ."""
    assert len(out.logits) == STEPS
    with torch.no_grad():
        for i, logits in enumerate(out.logits):
            inputs = placed(opt.original, prefix(out.sequences, given["attention_mask"], PROMPT + i))
            assert gap(logits, opt(**inputs).logits[:, -1]) < TOLERANCE, i
            assert gap(logits, opt.original(**inputs).logits[:, -1]) > 1e-2, i


@pytest.mark.parametrize(
    ("name", "gates"),
    often(
        [*((n, "router") for n in FAMILIES), *((n, "layer") for n in BY_LAYER)],
        (("deepseek_v3", "router"),),
    ),
)
def test_every_step_has_the_logits_of_the_routed_graph(name: str, gates: str) -> None:
    model, grouter = built(name)
    opt = optimized(model, moefx.Routing(grouter, gates=gates))
    with windows(model, grouter) as (seen, read):
        out = generated(opt)
    assert seen == read == [PROMPT, *[1] * (STEPS - 1)]  # both caches were in use
    check_steps(opt, out, prompt())
    assert not torch.equal(generated(model).sequences, out.sequences)


# -- one model for what does not depend on the family ----------------------------------------------------------------


@pytest.fixture(scope="module")
def opt() -> moefx.OptimizedModule:
    return optimized(*built("qwen3_moe"))


def test_greedy_tokens_are_those_of_a_loop_over_the_graph(opt: moefx.OptimizedModule) -> None:
    ids, mask = prompt().values()
    with torch.no_grad():
        for i in range(STEPS):
            logits = opt(**prefix(ids, mask, PROMPT + i)).logits[:, -1]
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
        assert torch.equal(generated(opt, **options).sequences, ids), options


def test_sampled_tokens_are_those_of_a_loop_over_the_graph(opt: moefx.OptimizedModule) -> None:
    ids, mask = prompt().values()
    torch.manual_seed(0)
    with torch.no_grad():
        for i in range(STEPS):
            logits = opt(**prefix(ids, mask, PROMPT + i)).logits[:, -1]
            ids = torch.cat((ids, torch.multinomial((logits / 3).softmax(-1), 1)), 1)
    torch.manual_seed(0)
    out = generated(opt, do_sample=True, temperature=3.0, top_k=0, top_p=1.0)
    assert torch.equal(out.sequences, ids)
    check_steps(opt, out, prompt())


def test_beams_that_change_places_keep_their_routing(opt: moefx.OptimizedModule, monkeypatch: Any) -> None:
    """The score of a beam is the mean log-probability that the graph gives its tokens."""
    order: list[list[int]] = []
    select = moefx.grouter.GrouterCache.select
    monkeypatch.setattr(
        moefx.grouter.GrouterCache, "select", lambda self, rows: (order.append(rows.tolist()), select(self, rows))[1]
    )
    out = generated(opt, num_beams=3, num_return_sequences=3, output_scores=True, max_new_tokens=6)
    assert order  # beams did change places
    mask = prompt()["attention_mask"].repeat_interleave(3, 0)
    with torch.no_grad():
        inputs = prefix(out.sequences, mask, PROMPT + 6)
        logs = opt(**inputs).logits.log_softmax(-1)[:, PROMPT - 1 : -1]
        own = opt.original(**inputs).logits.log_softmax(-1)[:, PROMPT - 1 : -1]
    new = out.sequences[:, PROMPT:, None]
    torch.testing.assert_close(out.sequences_scores, logs.gather(-1, new)[..., 0].mean(1), rtol=1e-5, atol=1e-5)
    assert float((own.gather(-1, new)[..., 0].mean(1) - out.sequences_scores).abs().min()) > 1e-3


def test_drafts_that_are_rejected_leave_no_trace(opt: moefx.OptimizedModule) -> None:
    """Prompt lookup proposes several tokens and takes back those that the model would not have chosen."""
    ids = torch.tensor([[5, 9, 5, 9, 5, 9, 5]])
    plain = generated(opt, {"input_ids": ids}, max_new_tokens=6)
    with windows(opt.original, opt.router) as (seen, _):
        drafted = generated(opt, {"input_ids": ids}, max_new_tokens=6, prompt_lookup_num_tokens=3)
    assert max(seen[1:]) > 1
    assert torch.equal(drafted.sequences, plain.sequences)


def test_a_cache_can_be_continued_when_the_whole_sequence_is_given(opt: moefx.OptimizedModule) -> None:
    whole = generated(opt, max_new_tokens=6).sequences
    first = generated(opt, max_new_tokens=3)
    ids, mask = prefix(first.sequences, prompt()["attention_mask"], PROMPT + 3).values()
    given = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
    assert torch.equal(generated(opt, given, max_new_tokens=3).sequences, whole)
    last = {"input_ids": ids[:, -1:], "attention_mask": mask, "past_key_values": first.past_key_values}
    with pytest.raises(moefx.InputError, match=r"cache of .* tokens that are not given"):
        generated(opt, last, max_new_tokens=3)


def test_nothing_is_left_on_the_original(opt: moefx.OptimizedModule) -> None:
    before, compiled = generated(opt.original).sequences, len(opt.variants())
    routed = generated(opt).sequences
    assert torch.equal(generated(opt.original).sequences, before)
    with pytest.raises(RuntimeError, match="on purpose"):
        generated(opt, logits_processor=[_fail])
    assert torch.equal(generated(opt.original).sequences, before)
    assert not any(m._forward_pre_hooks for m in opt.original.modules())
    assert "prepare_inputs_for_generation" not in vars(opt.original)
    with torch.no_grad():
        opt(**prompt())
    assert len(opt.variants()) == compiled
    assert torch.equal(generated(opt).sequences, routed)


def _fail(ids: Tensor, scores: Tensor) -> Tensor:
    raise RuntimeError("on purpose")


@pytest.mark.nightly
def test_copies_and_what_was_saved_generate_the_same(opt: moefx.OptimizedModule, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    want = generated(opt).sequences
    assert torch.equal(generated(copy.deepcopy(opt)).sequences, want)
    again = pickle.loads(pickle.dumps(opt))  # without any graph, which the first generate has to make
    assert again.variants() == []
    assert torch.equal(generated(again).sequences, want)
    opt.save_pretrained(tmp_path / "model")
    opt.router.save_pretrained(tmp_path / "grouter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    mine = optimized(loaded, moefx.Grouter.from_pretrained(tmp_path / "grouter"))
    assert torch.equal(generated(mine).sequences, want)


def test_what_is_not_possible_is_refused(opt: moefx.OptimizedModule) -> None:
    ids, mask = prompt().values()
    embedded = opt.get_input_embeddings()(ids).detach()
    for match, given in {
        "not given token ids": {"inputs_embeds": embedded, "attention_mask": mask},
        "was given position_ids": {"input_ids": ids, "position_ids": torch.arange(PROMPT)[None]},
        "with a paged cache": {"input_ids": ids, "cache_implementation": "paged"},
        "with a custom_generate": {"input_ids": ids, "custom_generate": lambda *_, **__: None},
    }.items():
        with pytest.raises(moefx.InputError, match=match):
            generated(opt, given)
    with pytest.raises(moefx.InputError, match="generate_batch does not decode with the router"):
        opt.generate_batch([[1, 2, 3]])
    assert not any(m._forward_pre_hooks for m in opt.original.modules())


@pytest.mark.filterwarnings("ignore::moefx.grouter.FutureTokensWarning")
def test_routing_that_cannot_be_decoded_is_refused(opt: moefx.OptimizedModule) -> None:
    """Neither needs a graph of its own: the options alone say so."""
    from moefx.optimize import reoptimize

    model, options = opt.original, opt.options
    future = made_grouter(model.config.vocab_size, 8, causal=False)
    for match, routing in {
        "precomputed routing cannot generate": moefx.Routing(moefx.Precomputed()),
        "depends on tokens behind it": moefx.Routing(future, causal=False),
    }.items():
        changed = reoptimize(model, dataclasses.replace(options, routing=routing))
        with pytest.raises(moefx.InputError, match=match):
            generated(changed)


@pytest.mark.nightly
def test_a_choice_that_is_read_besides_the_experts_is_refused() -> None:
    """Experts of LongCat that hand the token on are no experts of the op: their part would keep the old routing."""
    model, grouter = built("longcat_flash")
    opt = optimized(model, grouter)
    with pytest.raises(moefx.InputError, match=r"cannot generate with [\s\S]*by other ways than its experts"):
        generated(opt)


class Table(nn.Module):
    """Any function of token ids can be a router; this one has no cache."""

    def __init__(self, vocab: int, experts: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(vocab, experts, generator=torch.Generator().manual_seed(2)))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


class Speaks(MoELM):
    """A hand-written model with a hand-written loop, which runs the whole sequence for each token."""

    def generate(self, ids: Tensor, new: int) -> Tensor:
        with torch.no_grad():
            for _ in range(new):
                ids = torch.cat((ids, self(ids)["logits"][:, -1].argmax(-1, keepdim=True)), 1)
        return ids


class Remembers(MoELM):
    """The same with a loop that hands single tokens over, as with a cache inside of the model."""

    def generate(self, ids: Tensor, new: int) -> Tensor:
        for _ in range(new):
            window = ids if ids.shape[1] == PROMPT else ids[:, -1:]
            ids = torch.cat((ids, self(window)["logits"][:, -1].argmax(-1, keepdim=True)), 1)
        return ids


def test_a_hand_written_model_with_a_loop_of_its_own() -> None:
    model = Speaks(vocab=64, hidden=32, width=24, layers=2, heads=2, experts=4, k=2, idiom="A3").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)  # so that experts matter
    ids = torch.randint(0, 64, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        opt = moefx.optimize(model, (ids,), router=Table(64, 4), codegen="eager", dynamic={"input_ids": (0, 1)})
        want = ids
        for _ in range(STEPS):
            want = torch.cat((want, opt(want)["logits"][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(opt.generate(ids, STEPS), want)
    assert not torch.equal(model.generate(ids, STEPS), want)
    model.__class__ = Remembers
    with pytest.raises(moefx.InputError, match="windows behind a cache of its own"):
        opt.generate(ids, STEPS)
