"""Every class of transformers' experts interface, raised, against its own loop; and what `raised` leaves behind."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.passes.raise_experts import NAME, Block, find_blocks, raised

from . import zoo
from .compare import relative

transformers = pytest.importorskip("transformers")

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402  after the check that it is there

E, H, I, T, K = 6, 16, 12, 24, 3

# Sizes that stand in for the defaults of a config, where it has them.
SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), H),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), I),
}
# What a constructor takes besides the config.
ARGUMENTS = {"Ernie4_5_VLMoeMoeExperts": (I,)}
# Decorated classes that cannot be built alone, with the reason. The test fails when one is missing here, and when one
# that is here can be built.
NOT_BUILT: dict[str, str] = {}
# Activation in the idiom of a class at its config's defaults, where it is not SiLU.
ACTIVATIONS = {
    "DiffusionGemmaTextExperts": "gelu_tanh",
    "Gemma4TextExperts": "gelu_tanh",
    "GptOssExperts": "clamp(7,1.702)",
    "MiniMaxM3VLExperts": "clamp(7,1.702)",
    "NemotronHExperts": "relu2",
    "OpenAIPrivacyFilterExperts": "clamp(7,1.702)",
}
# Classes whose middle part stays their own code, and why: a SwiGLU with clamps, one with soft caps, a norm after the
# experts.
OPAQUE = {
    "DeepseekV4Experts": "an activation of its own",
    "Glm5NextTextExperts": "an activation of its own",
    "HYV4Experts": "an activation of its own",
    "Inkling2Experts": "an activation of its own",
    "MuseSparkExperts": "a norm after the experts",
}

DECORATED = re.compile(
    r"^@use_experts_implementation\b(?:\((?:[^()]|\([^()]*\))*\))?\s*\n(?:@.*\n)*class (\w+)", re.MULTILINE
)


def decorated() -> dict[str, str]:
    """Class name -> module name of all experts classes under the decorator, from the installed library's source."""
    found = {}
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        names = DECORATED.findall(source)
        assert len(names) == len(re.findall(r"^@use_experts_implementation\b", source, re.MULTILINE)), file
        found.update(dict.fromkeys(names, f"transformers.models.{file.parent.name}.{file.stem}"))
    return found


CLASSES = decorated()


@cache
def build(name: str) -> nn.Module:
    """The class with the config class of its own file that has what its constructor reads, at tiny sizes."""
    module = importlib.import_module(CLASSES[name])
    base = transformers.PreTrainedConfig
    configs = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, base) and c is not base]
    if not configs:  # some files leave the config to the caller
        sibling = importlib.import_module(CLASSES[name].replace(".modeling_", ".configuration_"))
        configs = [c for c in vars(sibling).values() if isinstance(c, type) and issubclass(c, base) and c is not base]
    errors = []
    for config_class in configs:
        config = config_class()
        shrink(config, SIZES)
        try:
            experts = getattr(module, name)(config, *ARGUMENTS.get(name, ()))
        except AttributeError as e:
            errors.append(str(e))
            continue
        return fill(experts)
    raise LookupError(f"{name}: no config fits: {errors}")


def shrink(config: Any, sizes: dict[str, int]) -> None:
    for key in sizes.keys() & set(dir(config)):
        setattr(config, key, [sizes[key]] * 2 if isinstance(getattr(config, key), list) else sizes[key])


def fill(experts: nn.Module) -> nn.Module:
    """Random weights, large enough that the clamps of clamped activations act."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return experts


def routed(tokens: int, *, empty: int | None = E - 1, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, distinct experts for each (never `empty`), and weights, the last two as a router would make them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=generator) * 2
    scores = torch.randn(tokens, E, generator=generator)
    if empty is not None:
        scores[:, empty] = -torch.inf
    w, index = scores.softmax(-1).topk(K)
    return x, index, w


def run(
    experts: nn.Module, call: tuple[torch.Tensor, ...], implementation: str | None = None
) -> dict[str, torch.Tensor]:
    """Output and all gradients of one call, by name."""
    x, index, w = call
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    before = experts.config._experts_implementation
    if implementation:
        experts.config._experts_implementation = implementation
    try:
        y = experts(x, index, w)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
        names = [n for n, _ in experts.named_parameters()]
        grads = torch.autograd.grad(y, [x, w, *experts.parameters()], upstream)
    finally:
        if implementation:
            experts.config._experts_implementation = before
    return dict(zip(["y", "x", "w", *names], [y.detach(), *grads], strict=True))


def faults(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-5) -> dict[str, float]:
    assert got.keys() == want.keys()
    assert all((got[k].dtype, got[k].shape) == (want[k].dtype, want[k].shape) for k in want)
    return {k: r for k in want if not (r := relative(got[k], want[k])) <= tolerance}


def spec_of(experts: Any) -> str:
    """The idiom that the flags of a module ask for."""
    name = type(experts).__name__
    layout = ("kn" if experts.is_transposed else "nk") + (" bias" if experts.has_bias else "")
    if name in OPAQUE:
        return f"opaque | {layout}"
    shape = "" if experts.has_gate and experts.is_concatenated else "interleaved " if experts.has_gate else "plain "
    return f"{shape}{ACTIVATIONS.get(name, 'silu')} | {layout}"


# -- every class -----------------------------------------------------------------------------------------------------


def test_the_classes_that_cannot_be_built_are_listed() -> None:
    missing = set()
    for name in CLASSES:
        try:
            build(name)
        except Exception:
            missing.add(name)
    assert missing == NOT_BUILT.keys()
    assert len(CLASSES) >= 60
    assert CLASSES.keys() >= ACTIVATIONS.keys() | OPAQUE.keys()


@pytest.mark.parametrize("name", [n for n in CLASSES if n not in NOT_BUILT])
def test_raised_equals_the_loop_of_the_class(name: str) -> None:
    experts = build(name)
    (block,) = find_blocks(nn.ModuleDict({"bank": experts}))
    assert (block.path, block.cls, block.raised, block.idiom) == ("bank", name, True, spec_of(experts))
    if name in OPAQUE:
        assert block.reason == f"experts with {OPAQUE[name]}"
    else:
        assert block.reason is None
        assert block.error is not None
        assert block.error < 1e-6

    for tokens in (T, 1):
        call = routed(tokens)
        want = run(experts, call, "eager")
        with raised(experts):
            got = run(experts, call)
        assert faults(got, want) == {}
        for key in ("gate_up_proj", "up_proj", "down_proj"):
            if key in got:  # the expert without a token has a gradient of zero, not of whatever was in memory
                assert not got[key][E - 1].any()
    assert experts.config._experts_implementation is None


def test_a_wrong_idiom_would_be_noticed() -> None:
    """The control: a module that runs another activation than its own is far outside the tolerance."""
    experts = build("GptOssExperts")
    call = routed(T)
    want = run(experts, call, "eager")
    with raised(experts):
        assert faults(run(experts, call), want) == {}
        experts.__dict__["_moefx_spec"] = "interleaved silu | kn bias"
        assert faults(run(experts, call), want).keys() >= {"y", "x", "gate_up_proj"}
        experts.__dict__["_moefx_spec"] = "interleaved clamp(1000,1.702) | kn bias"  # also tells that the clamp acts
        assert faults(run(experts, call), want).keys() >= {"y", "x", "gate_up_proj"}


def test_indices_of_other_ranks_are_dropped() -> None:
    """Under expert parallelism transformers marks what another rank owns with the index E."""
    experts = build("MixtralExperts")
    x, index, w = routed(T)
    index[::2, 1] = E
    want = run(experts, (x, index, w), "eager")
    with raised(experts):
        assert faults(run(experts, (x, index, w)), want) == {}


# -- the probe of the activation -------------------------------------------------------------------------------------


def probed(gate: Any) -> Block:
    """What becomes of Mixtral experts with another activation."""
    experts = build("MixtralExperts")
    before = experts.act_fn
    try:
        experts.act_fn = gate
        (block,) = find_blocks(experts)
    finally:
        experts.act_fn = before
    return block


class Lambda(nn.Module):
    """A function as a module, since the activation of an experts class is one."""

    def __init__(self, f: Any) -> None:
        super().__init__()
        self.forward = f


@pytest.mark.parametrize(
    ("f", "idiom"),
    [
        (nn.functional.silu, "silu | nk"),
        (nn.functional.gelu, "gelu | nk"),
        (lambda g: nn.functional.gelu(g, approximate="tanh"), "gelu_tanh | nk"),
        (torch.relu, "relu | nk"),
        (lambda g: torch.relu(g).square(), "relu2 | nk"),
    ],
)
def test_the_probe_recognises(f: Any, idiom: str) -> None:
    block = probed(Lambda(f))
    assert (block.raised, block.idiom) == (True, idiom)


@pytest.mark.parametrize(
    "f",
    [
        lambda g: g * torch.sigmoid(1.702 * g),  # quick GELU
        lambda g: nn.functional.silu(g.clamp(max=7)),
        lambda g: nn.functional.silu(g.clamp(max=1000)),  # a clamp that ordinary inputs never reach
        lambda g: nn.functional.silu(g) + 1e-3,
        lambda g: nn.functional.silu(g.bfloat16()).to(g.dtype),
        torch.tanh,
    ],
)
def test_the_probe_does_not_take_a_likeness(f: Any) -> None:
    block = probed(Lambda(f))
    assert (block.raised, block.idiom, block.reason) == (True, "opaque | nk", "experts with an activation of its own")


def test_a_gate_that_fails_on_the_probe_stays_its_own_code() -> None:
    def gate(g: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("only for tensors of one shape")

    assert probed(Lambda(gate)).idiom == "opaque | nk"


# -- what is left alone ----------------------------------------------------------------------------------------------

LEFT_ALONE = {
    "Llama4TextExperts": ("llama4", "Llama4TextConfig", "gate_up_proj, down_proj"),
    "LongcatFlashExperts": ("longcat_flash", "LongcatFlashConfig", "gate_up_proj, down_proj"),
    "DbrxExperts": ("dbrx", "DbrxConfig", "w1, v1, w2"),
    "JetMoeMoE": ("jetmoe", "JetMoeConfig", "weight"),
    "NllbMoeSparseMLP": ("nllb_moe", "NllbMoeConfig", "hand-written loop"),
    "SwitchTransformersSparseMLP": ("switch_transformers", "SwitchTransformersConfig", "hand-written loop"),
    "Step3p7Experts": ("step3p7", "Step3p7TextConfig", "gate_up_proj, down_proj"),
}
OTHER_SIZES = {
    **dict.fromkeys(("expert_ffn_hidden_size", "ffn_hidden_size", "encoder_ffn_dim", "d_ff"), I),
    "d_model": H,
    "zero_expert_num": 2,
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_experts_are_reported_and_left_alone(name: str) -> None:
    folder, config_name, why = LEFT_ALONE[name]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = getattr(transformers, config_name)()
    config = getattr(config, "ffn_config", config)
    shrink(config, SIZES | OTHER_SIZES)
    blocks = find_blocks(getattr(module, name)(config, *([I] if name == "NllbMoeSparseMLP" else [])))
    assert blocks
    assert not any(b.raised for b in blocks)
    assert all(why in str(b.reason) for b in blocks)


def test_quantized_experts_are_left_alone() -> None:
    """transformers' FP8 experts look alike but carry scales, and an interface of their own."""
    experts = fill(type(build("MixtralExperts"))(build("MixtralExperts").config))
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    (block,) = find_blocks(experts)
    assert not block.raised
    assert "gate_up_proj is torch.float8_e4m3fn" in str(block.reason)


def test_a_list_of_moe_layers_is_no_bank_of_experts() -> None:
    config = build("MixtralExperts").config
    model = nn.Module()
    model.moe_layers = nn.ModuleList(type(build("MixtralExperts"))(config) for _ in range(2))
    assert [(b.path, b.raised) for b in find_blocks(model)] == [("moe_layers.0", True), ("moe_layers.1", True)]


# -- undoing ---------------------------------------------------------------------------------------------------------


def state(*models: nn.Module) -> Any:
    """All that `raised` touches: the registry, which config a module reads, what it says, the modules' attributes."""
    banks = [m for model in models for m in model.modules() if hasattr(m, "_is_expert_parallel")]
    configs = [m.config for model in models for m in model.modules() if hasattr(m, "config")]
    return (
        dict(ALL_EXPERTS_FUNCTIONS._global_mapping),
        dict(ALL_EXPERTS_FUNCTIONS._local_mapping),
        [id(c) for c in configs],
        [c._experts_implementation for c in configs],
        [sorted(m.__dict__) for m in banks],
    )


@pytest.fixture(params=[None, "eager", "batched_mm"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    made = zoo.build(zoo.get("mixtral"), experts_implementation=request.param)
    if request.param:
        assert made.config._experts_implementation == request.param
    return made


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=zoo.batch(zoo.get("mixtral"))["input_ids"]).logits


def test_everything_is_put_back(model: nn.Module) -> None:
    before = state(model)
    with raised(model) as blocks:
        assert sum(b.raised for b in blocks) == 2
        assert NAME in ALL_EXPERTS_FUNCTIONS
        assert state(model) != before
    assert state(model) == before


def test_everything_is_put_back_after_an_error(model: nn.Module) -> None:
    before = state(model)
    with pytest.raises(ZeroDivisionError), raised(model):
        raise ZeroDivisionError
    assert state(model) == before


def test_optimize_leaves_the_model_as_it_was(model: nn.Module) -> None:
    before, want = state(model), logits(model)
    moefx.optimize(model, zoo.batch(zoo.get("mixtral")), codegen="eager")
    assert state(model) == before
    assert torch.equal(logits(model), want)


def test_a_failed_capture_leaves_the_model_as_it_was(model: nn.Module) -> None:
    before, forward = state(model), model.forward

    def loop(input_ids: torch.Tensor) -> Any:
        if float(forward(input_ids=input_ids).logits.sum()) > 0:
            return input_ids
        return input_ids + 1

    model.forward = loop
    with pytest.raises(moefx.CaptureError):
        moefx.optimize(model, {"input_ids": zoo.batch(zoo.get("mixtral"))["input_ids"]}, codegen="eager")
    assert state(model) == before


def test_nested(model: nn.Module) -> None:
    before, want = state(model), logits(model)
    with raised(model):
        outer, ours = state(model), logits(model)
        with raised(model):
            assert torch.equal(logits(model), ours)
        assert state(model) == outer
        assert torch.equal(logits(model), ours)
    assert state(model) == before
    assert relative(ours, want) < 1e-5


def test_a_part_of_a_model_inside_the_whole(model: nn.Module) -> None:
    before = state(model)
    with raised(model):
        outer = state(model)
        with raised(model.model.layers[0]):
            logits(model)
        assert state(model) == outer
    assert state(model) == before


def test_two_models_with_one_config_object() -> None:
    entry = zoo.get("mixtral")
    first, second = zoo.build(entry), zoo.build(entry, seed=1)
    for module in second.modules():
        if hasattr(module, "config"):
            module.config = first.config
    before, want = state(first, second), logits(second)
    with raised(first):
        assert torch.equal(logits(second), want)  # runs its own code, to the bit
        with raised(second):
            assert relative(logits(second), want) < 1e-5
        assert torch.equal(logits(second), want)
    assert state(first, second) == before


def test_left_alone_banks_keep_working_beside_raised_ones() -> None:
    """Both read the same config, and one of the two cannot be raised."""
    model = zoo.build(zoo.get("mixtral"), experts_implementation="eager")
    want = logits(model)
    odd = model.model.layers[1].mlp.experts
    matrices = list(odd.down_proj.detach())
    del odd.down_proj
    odd.down_proj = nn.ParameterList(matrices)
    with raised(model) as blocks:
        assert [(b.raised, b.reason) for b in blocks if b.raised] == [(True, None)]
        (left,) = (b for b in blocks if not b.raised)
        assert "down_proj is no stacked tensor" in str(left.reason)
        assert relative(logits(model), want) < 1e-5


def test_sub_configs_keep_their_own_choice() -> None:
    """Writing the choice of a composite config writes to its parts; ours must not, on the way in or out."""
    config = transformers.Qwen3VLMoeConfig()
    bank = type(build("Qwen3VLMoeTextExperts"))(build("Qwen3VLMoeTextExperts").config)
    config._experts_implementation = "eager"
    config.text_config._experts_implementation = "batched_mm"
    bank.config = config
    with raised(bank):
        assert config.text_config._experts_implementation == "batched_mm"
    assert config._experts_implementation == "eager"
    assert config.text_config._experts_implementation == "batched_mm"
