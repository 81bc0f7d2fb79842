"""Which provider runs, how often, and the strings that name activations and expert banks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.dialect import OPS, ExpertsSpec, GluKind
from moefx.errors import InputError
from moefx.kernels import registry

from . import oracles
from .calls import TRAINING, calls
from .oracles import KINDS, Tensor, ops, randn

COMPOSITE = ("experts", "expert_choice", "route")
# The identity needs no kernel; codes and scales have their definition, on any device; on a CPU, a row that is gathered
# for a product is moved first.
REFERENCE_ONLY = (
    "glu_backward_again",
    "token_route",
    "topk_route",
    "topk_route_backward",
    "overlap",
    "overlap_backward",
    "inject",
    "inject_seed",
    "choice_plan",
    *TRAINING,
    "dispatch",
    "combine",
    "permute_grouped_mm",
    "permute_grouped_mm_glu",
    "permute_grouped_wgrad",
)


@pytest.fixture
def toy() -> Iterator[str]:
    """A throw-away op in the registry."""
    name = "toy_op"
    registry.register(name, "narrow", lambda x: x.shape[0] < 3)(lambda x: "narrow")
    registry.register(name, "float", lambda x: x.is_floating_point())(lambda x: "float")
    registry.register(name, "reference", lambda *_: True)(lambda x: "reference")
    yield name
    del registry._TABLE[name]


# -- providers -------------------------------------------------------------------------------------------------------


def test_the_first_provider_that_supports_the_call_runs(toy: str) -> None:
    assert registry.names(toy) == ["narrow", "float", "reference"]
    assert registry.dispatch(toy, torch.zeros(2)) == "narrow"
    assert registry.dispatch(toy, torch.zeros(3)) == "float"
    assert registry.dispatch(toy, torch.zeros(3, dtype=torch.int64)) == "reference"


def test_calls_are_counted_by_provider_device_and_dtype(toy: str) -> None:
    assert toy not in registry.used()
    for x in (torch.zeros(2), torch.zeros(1), torch.zeros(5), torch.zeros(5, dtype=torch.int64)):
        registry.dispatch(toy, x)
    assert registry.used()[toy] == {"narrow/cpu/float32": 2, "float/cpu/float32": 1, "reference/cpu/int64": 1}


def test_preferring_a_provider(toy: str) -> None:
    with registry.preferring("float"):
        assert registry.names(toy) == ["float", "reference"]
        assert registry.dispatch(toy, torch.zeros(2)) == "float"
        assert registry.dispatch(toy, torch.zeros(2, dtype=torch.int64)) == "reference"
    with registry.preferring("reference"):
        assert registry.dispatch(toy, torch.zeros(2)) == "reference"
    with pytest.raises(KeyError), registry.preferring("reference"):
        registry.dispatch("no op", torch.zeros(2))
    assert registry.names(toy) == ["narrow", "float", "reference"]  # undone, also on error


@pytest.mark.parametrize("op", [op for op in OPS if op not in COMPOSITE])
def test_every_op_ends_in_its_reference(op: str) -> None:
    assert registry.names(op)[-1] == "reference"
    assert registry.names(op).count("reference") == 1


@pytest.mark.parametrize("op", [op for op in OPS if op not in (*COMPOSITE, *REFERENCE_ONLY)])
def test_on_a_cpu_a_kernel_comes_before_the_reference(op: str) -> None:
    call = next(c for c in calls(oracles.CASES["balanced"]).values() if c.op == op)
    before = dict(registry.used().get(op, {}))
    call()
    counts = registry.used()[op]
    (ran,) = [key for key in counts if counts[key] != before.get(key, 0)]
    assert counts[ran] == before.get(ran, 0) + 1
    assert ran.split("/")[0] in ("torch", "numpy")
    with registry.preferring("reference"):
        call()
    assert registry.used()[op][f"reference/{ran.partition('/')[2]}"] > before.get(
        f"reference/{ran.partition('/')[2]}", 0
    )


@pytest.mark.parametrize("op", REFERENCE_ONLY)
def test_an_op_without_a_kernel_runs_its_reference(op: str) -> None:
    call = next(c for c in calls(oracles.CASES["balanced"]).values() if c.op == op)
    before = sum(registry.used().get(op, {}).values())
    call()
    assert {key.split("/")[0] for key in registry.used()[op]} == {"reference"}
    assert sum(registry.used()[op].values()) == before + 1


def test_kinds_without_a_kernel_run_the_reference() -> None:
    h = randn(3, 4)
    for kind, provider in (("silu", "torch"), ("gelu", "torch"), ("relu2", "reference"), ("plain silu", "reference")):
        key, before = f"{provider}/cpu/float32", dict(registry.used().get("glu", {}))
        ops.glu(h, None, kind)
        assert registry.used()["glu"][key] == before.get(key, 0) + 1


def test_unknown_names_get_the_nearest_known_one() -> None:
    with pytest.raises(InputError, match="did you mean 'unpermute'"):
        registry.names("unpermut")
    with pytest.raises(InputError, match="did you mean 'reference'"), registry.preferring("referense"):
        pass


def test_importing_the_dialect_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import moefx.dialect, moefx.kernels; print(len(moefx.dialect.OPS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(len(OPS))


# -- strings ---------------------------------------------------------------------------------------------------------

positive = st.floats(min_value=1e-30, max_value=1e30) | st.integers(1, 10**6).map(float)
gated = st.builds(
    GluKind, st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu2"]), st.just(True), st.booleans()
)
plain = st.builds(GluKind, st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu2"]), st.just(False))
clamped = st.builds(
    GluKind, st.just("clamp"), st.just(True), st.booleans(), positive, st.floats(allow_nan=False, allow_infinity=False)
)
kinds = gated | plain | clamped
specs = st.builds(ExpertsSpec, kinds, st.sampled_from(["nk", "kn"]), st.booleans())


@settings(deadline=None)
@given(kind=kinds)
def test_a_kind_reads_back_as_it_was(kind: GluKind) -> None:
    assert GluKind.parse(str(kind)) == kind


@settings(deadline=None)
@given(spec=specs)
def test_a_spec_reads_back_as_it_was(spec: ExpertsSpec) -> None:
    assert ExpertsSpec.parse(str(spec)) == spec


words = st.sampled_from(
    ["plain", "interleaved", "silu", "relu2", "clamp(7,1.702)", "clamp(1e-3,.5)", "|", "nk", "kn", "bias"]
)


@settings(deadline=None)
@given(text=st.text(st.characters(codec="ascii"), max_size=24) | st.lists(words, max_size=6).map(" ".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (GluKind.parse, ExpertsSpec.parse):
        parsed = error = None
        try:
            parsed = parse(text)
        except InputError as e:
            error = e
        if parsed is not None:
            assert parse(str(parsed)) == parsed
        else:
            assert error is not None
            assert repr(text.partition(" | ")[0]) in error.what or repr(text) in error.what
            assert error.todo


def test_what_prints_is_short() -> None:
    assert str(GluKind("clamp", True, True, 7.0, 1.702)) == "interleaved clamp(7,1.702)"
    assert str(ExpertsSpec(GluKind("silu"), "nk")) == "silu | nk"
    assert str(ExpertsSpec(GluKind("relu2", gated=False), "kn", True)) == "plain relu2 | kn bias"
    # Six digits would have made 7 of it, and the op computes with the text.
    assert str(GluKind("clamp", True, False, 7.0000001, 1.0)) == "clamp(7.0000001,1)"


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_computes_with_what_it_reads(kind: str) -> None:
    h: Tensor = randn(3, 4)
    assert torch.equal(ops.glu(h, None, kind), ops.glu(h, None, str(GluKind.parse(kind))))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("sillu", "did you mean 'silu'"),
        ("interleaved gelu_tan", "did you mean 'gelu_tanh'"),
        ("clam(7,1)", "did you mean 'clamp'"),
        ("clamp", "clamp(limit,alpha)"),
        ("clamp(a,b)", "clamp(limit,alpha)"),
        ("clamp(nan,1)", "clamp(limit,alpha)"),
        ("silu(7,1)", "did you mean 'silu'"),
        ("", "known: clamp, gelu"),
        ("SiLU", "known: clamp, gelu"),
        ("plain interleaved silu", "nothing, 'plain' or 'interleaved'"),
        ("plain plain silu", "nothing, 'plain' or 'interleaved'"),
        ("plane silu", "nothing, 'plain' or 'interleaved'"),
        ("plain clamp(7,1)", "clamp is always gated"),
        ("clamp(0,1)", "a limit above zero"),
        ("clamp(-7,1)", "a limit above zero"),
    ],
)
def test_an_unreadable_kind_says_what_would_do(text: str, hint: str) -> None:
    with pytest.raises(InputError) as error:
        GluKind.parse(text)
    assert repr(text) in error.value.what
    assert error.value.todo is not None
    assert hint in error.value.todo
    for call in (
        lambda: ops.glu(randn(2, 4), None, text),
        lambda: ops.glu(torch.empty(2, 4, device="meta"), None, text),
    ):
        with pytest.raises(InputError, match="activation kind"):
            call()


@pytest.mark.parametrize(
    "text",
    ["silu", "silu |nk", "silu | nn", "silu | nk biased", "silu | nk bias bias", "silu | nk ", "silu | nk | kn", ""],
)
def test_an_unreadable_spec_says_how_to_write_one(text: str) -> None:
    with pytest.raises(InputError, match=r"'<glu kind> \| nk'") as error:
        ExpertsSpec.parse(text)
    assert repr(text) in error.value.what


def test_a_spec_with_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'silu'"):
        ExpertsSpec.parse("silo | nk bias")
