"""What Inductor makes of training graphs for a GPU that is not here: its code is generated and compiled, and not run.

The graphs are those of a CPU, with passes told that it has a GPU's kernels; their values become fake tensors on a CUDA
device, and what Inductor asks the device for is answered in its place.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from moefx import compat
from tests import reference as ref

pytest.importorskip("triton")
pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=141 << 30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_multiprocessor=228 << 10, shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10, L2_cache_size=50 << 20, gcnArchName="", is_integrated=False,
    clock_rate=1_755_000, memory_clock_rate=3_201_000, memory_bus_width=6144, uuid="",
)  # fmt: skip


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Within, Inductor finds an H200, compiles Triton kernels for it, and loads none of them."""
    import torch._inductor.config as config
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    from moefx.kernels.gpu import sass

    def nothing(*_: Any, **__: Any) -> None:
        return None

    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "get_device_properties": lambda _=None: H200, "get_device_capability": lambda _=None: (9, 0),
            "get_device_name": lambda _=None: H200.name, "synchronize": nothing, "set_device": nothing,
            "get_rng_state": lambda _=None: torch.zeros(16, dtype=torch.uint8), "set_rng_state": nothing,
            "_lazy_init": nothing, "device": lambda _: contextlib.nullcontext(),
        },
        CudaInterface: {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "get_device_properties": lambda _=None: H200, "get_compute_capability": lambda _=None: 90,
            "synchronize": nothing, "set_device": nothing, "get_raw_stream": lambda _=0: 0,
            "exchange_device": lambda _: 0, "maybe_exchange_device": lambda _: 0,
            "is_triton_capable": lambda _=None: True, "raise_if_triton_unavailable": nothing,
        },
        CudaInterface.Worker: {
            "current_device": lambda: 0, "get_device_properties": lambda _=None: H200, "set_device": nothing
        },
        torch._C: {"_cuda_getCurrentRawStream": lambda _: 0},
        triton_helpers: {"set_driver_to_gpu": nothing, "set_driver_to_cpu": nothing},
        scheduler: {"has_triton": lambda *_: True},
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, names in answers.items():
            for name, answer in names.items():
                new = staticmethod(answer) if isinstance(owner, type) else answer
                stack.enter_context(mock.patch.object(owner, name, new, create=True))
        loaded = mock.patch.object(
            CachingAutotuner, "_make_launchers", lambda self: setattr(self, "launchers", [nothing])
        )
        stack.enter_context(loaded)
        stack.enter_context(config.patch(compile_threads=1, force_disable_caches=True))
        stack.enter_context(sass.targeting("sm_90"))
        yield


def moved(gm: fx.GraphModule) -> tuple[fx.GraphModule, FakeTensorMode]:
    """The graph with fake values on a CUDA device."""
    mode, graph, env = FakeTensorMode(), fx.Graph(), dict[fx.Node, fx.Node]()
    device = torch.device("cuda", 0)

    def on_device(v: Any) -> Any:
        return (
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=device) if isinstance(v, torch.Tensor) else v
        )

    for node in gm.graph.nodes:
        new = env[node] = graph.node_copy(node, env.__getitem__)
        new.args, new.kwargs = pytree.tree_map(
            lambda a: device if isinstance(a, torch.device) else a, (new.args, new.kwargs)
        )
        with mode:
            new.meta = {**node.meta, "val": pytree.tree_map(on_device, node.meta.get("val"))}
    return fx.GraphModule(gm, graph), mode


def generated(recipe: str, without: str = "") -> list[tuple[bool, str]]:
    """The code of each graph of a training step, and whether it is the backward's."""
    from torch._inductor.graph import GraphLowering

    found: list[tuple[bool, str]] = []
    real = compat.inductor_compile

    def compile_for_cuda(gm: fx.GraphModule, *, backward: bool, inference: bool = False) -> Any:
        graph, mode = moved(gm)
        with (
            pretended(),
            mode,
            mock.patch.object(
                GraphLowering, "save_output_code", staticmethod(lambda code: found.append((backward, code)))
            ),
        ):
            real(graph, backward=backward, inference=inference)
        return compat.boxed(gm)

    # A block alone: what is around it needs a torch that was built for CUDA.
    block = ref.Block(hidden_size=256, moe_intermediate_size=128).bfloat16()
    x = torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    chain = ref.as_on_gpu(recipe, without, codegen="inductor")
    with mock.patch.object(compat, "inductor_compile", compile_for_cuda):
        ref.optimize(block, (x,), recipe=recipe, passes=chain, codegen="inductor")(x).backward()
    return found


def calls(code: str, op: str) -> list[list[str]]:
    """The arguments of each call of a dialect op, as they are written."""
    return [re.split(r", (?![^(]*\))", a) for a in re.findall(rf"torch\.ops\.moefx\.{op}\.default\((.*)\)", code)]


@pytest.mark.parametrize("without", ["", "recompute_activations"])
def test_products_of_the_backward_read_one_gradient(without: str) -> None:
    """Inductor writes what it fuses once for each op that reads it: here, the gradient of the pre-activations twice."""
    forward, backward = generated("bf16", without)
    assert [forward[0], backward[0]] == [False, True]
    assert len(calls(forward[1], "permute_grouped_mm_glu")) == 1
    assert len(calls(backward[1], "glu_backward_again")) == (not without)
    (to_x,), to_weights = calls(backward[1], "grouped_mm"), calls(backward[1], "permute_grouped_wgrad")
    assert len(to_weights) == 2
    assert (to_x[0] in [w[0] for w in to_weights]) == (not without)


@pytest.mark.parametrize("recipe", ["fp8_flow", "mxfp4_hopper"])
def test_recipes_compile(recipe: str) -> None:
    codes = generated(recipe)
    assert [backward for backward, _ in codes] == [False, False, True]  # the second casts the weights
    joined = "".join(code for _, code in codes)
    assert len(calls(joined, "scaled_grouped_mm")) == 4
    assert len(calls(joined, "scaled_grouped_wgrad")) == 2
    for reads in calls(joined, "scaled_grouped_wgrad"):
        for codes_of_operand in (reads[0], reads[2]):
            assert re.search(rf"\b{codes_of_operand} = buf\d+\[", joined), "an op's own codes, not a copy of them"
