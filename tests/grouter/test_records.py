"""Records against online routing: ids, gates, pairs, sizes; resuming, and data that does not match."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from moefx.errors import InputError
from moefx.grouter import RoutingRecords, affinity, precompute, routed

from .small import Grouter, small

TOKENS = np.random.default_rng(0).integers(0, 64, 50 * 16 + 7).astype(np.uint16)
WINDOWS = torch.from_numpy(TOKENS[:800].astype(np.int64).reshape(50, 16))


def online(router: Grouter, k: int = 3, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return router.route(WINDOWS, k, **options)  # type: ignore[arg-type]


def paired(idx: torch.Tensor, gates: torch.Tensor, experts: int) -> torch.Tensor:
    """Dense gates [..., E]: equal only where each gate belongs to its expert, whatever the order of the pairs."""
    return torch.zeros(*idx.shape[:-1], experts).scatter_(-1, idx, gates)


@pytest.mark.parametrize(("experts", "bytes_per_id"), [(8, 1), (256, 1), (257, 2), (300, 2)])
def test_records_are_the_online_routing_and_no_larger_than_said(
    tmp_path: Path, experts: int, bytes_per_id: int
) -> None:
    router = small(num_experts=experts)
    records = precompute(router, TOKENS, 3, tmp_path, window=16, batch=7)
    idx, gates = online(router)
    tokens, got_idx, got_gates = records[:]
    assert torch.equal(tokens, WINDOWS)
    assert torch.equal(got_idx, idx)
    assert experts <= 256 or idx.max() > 255
    assert ((got_gates - gates).abs() <= 2**-8 * gates).all()
    assert (got_gates != gates).any()  # they were rounded
    n, k = WINDOWS.numel(), 3
    size = {f.name: f.stat().st_size for f in tmp_path.iterdir()}
    assert size["ids.bin"] + size["gates.bin"] == n * k * (bytes_per_id + 2)
    assert size["tokens.bin"] == 2 * n
    assert size["digests.bin"] == 8 * len(records)


def test_fp32_gates_scale_and_normalisation(tmp_path: Path) -> None:
    router = small()
    options = {"scale": 2.5, "normalise": "sigmoid"}
    records = precompute(router, TOKENS, 3, tmp_path, window=16, gates="fp32", **options)  # type: ignore[arg-type]
    assert torch.equal(records[:][2], online(router, **options)[1])
    assert (tmp_path / "gates.bin").stat().st_size == WINDOWS.numel() * 3 * 4
    assert records[:][2].sum(-1).sub(2.5).abs().max() < 1e-6


def test_pairs_stay_together_when_windows_are_shuffled_and_read_by_workers(tmp_path: Path) -> None:
    router = small()
    records = precompute(router, TOKENS, 3, tmp_path, window=16)
    want = paired(*online(router), 8)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    seen = []
    for at, (tokens, idx, gates) in zip(order.split(10), DataLoader(records, batch_size=10, sampler=order.tolist())):  # type: ignore[arg-type, var-annotated]  # noqa: B905
        assert torch.equal(tokens, WINDOWS[at])
        np.testing.assert_allclose(paired(idx, gates, 8), want[at], rtol=2**-8)
        assert (gates.diff(dim=-1) <= 0).all()
        seen.append(tokens)
    assert len(torch.cat(seen)) == 50
    # The negative control: ids sorted, gates left where they were.
    tokens, idx, gates = records[order]
    assert (paired(idx.sort(-1).values, gates, 8) - want[order]).abs().max() > 0.1


def test_access_by_number_slice_and_list(tmp_path: Path) -> None:
    records = precompute(small(), TOKENS, 3, tmp_path, window=16)
    assert len(records) == 50
    for i in (0, 7, -1, np.int64(3)):
        for a, b in zip(records[int(i)], records.window(int(i)), strict=True):
            assert torch.equal(a, b)
    tokens, idx, gates = records[[4, 2, 4]]
    assert (tokens.dtype, idx.dtype, gates.dtype) == (torch.int64, torch.int64, torch.float32)
    assert (tokens.shape, idx.shape, gates.shape) == ((3, 16), (3, 16, 3), (3, 16, 3))
    assert torch.equal(idx[1], records[2][1])
    for i in (50, -51):
        with pytest.raises(IndexError):
            records[i]
    assert sum(1 for _ in records) == 50


def test_records_pickle_as_their_directory(tmp_path: Path) -> None:
    records = precompute(small(), TOKENS, 3, tmp_path, window=16)
    data = pickle.dumps(records)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data)[:][1], records[:][1])


def test_every_kind_of_tokens_gives_the_same_files(tmp_path: Path) -> None:
    router = small()
    parts = [WINDOWS[:11], WINDOWS[11:12].numpy(), WINDOWS[12:]]
    made = []
    for name, tokens, window in (("a", TOKENS, 16), ("b", WINDOWS, None), ("c", iter(parts), None)):
        precompute(router, tokens, 3, tmp_path / name, window=window, batch=4)
        made.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert made[0] == made[1] == made[2]


def test_documents_are_kept_apart_by_their_end_token(tmp_path: Path) -> None:
    router = small()
    apart = precompute(router, TOKENS, 3, tmp_path / "a", window=16, eod_id=5)
    ends = (WINDOWS == 5).long()
    idx, _ = online(router, document_ids=ends.cumsum(1) - ends)
    assert torch.equal(apart[:][1], idx)
    assert not torch.equal(idx, online(router)[0])
    assert torch.equal(torch.from_numpy(np.concatenate(list(routed(router, WINDOWS, 3, eod_id=5)))), idx)


def test_records_feed_the_affinity(tmp_path: Path) -> None:
    router = small()
    records = precompute(router, TOKENS, 3, tmp_path, window=16)
    np.testing.assert_array_equal(affinity(records.idx, 8).pairs, affinity(online(router)[0], 8).pairs)


# -- resuming --------------------------------------------------------------------------------------------------------


class CutError(Exception):
    pass


def interrupt(router: Grouter, directory: Path, after: int, tokens: object = TOKENS, batch: int = 4) -> None:
    def progress(done: int, total: int | None) -> None:
        if done >= after:
            raise CutError

    with pytest.raises(CutError):
        precompute(router, tokens, 3, directory, window=16, batch=batch, progress=progress)  # type: ignore[arg-type]


def contents(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


@pytest.mark.parametrize("flush", [1, 64])
def test_an_interrupted_run_goes_on_to_the_same_files(
    tmp_path: Path, flush: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(precompute.__globals__, "FLUSH", flush)
    router = small()
    precompute(router, TOKENS, 3, tmp_path / "whole", window=16)
    interrupt(router, tmp_path / "cut", 20)
    with pytest.raises(InputError, match="ended after 20 windows"):
        RoutingRecords.open(tmp_path / "cut")
    for name in ("ids.bin", "gates.bin"):  # as a torn write leaves them
        with (tmp_path / "cut" / name).open("ab") as f:
            f.write(b"torn")
    calls = []
    route = router.route
    router.route = lambda ids, *a, **k: (calls.append(len(ids)), route(ids, *a, **k))[1]  # type: ignore[func-returns-value, method-assign, assignment]
    precompute(router, TOKENS, 3, tmp_path / "cut", window=16, batch=7)
    assert sum(calls) == 30
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    precompute(router, TOKENS, 3, tmp_path / "cut", window=16)
    assert sum(calls) == 30  # finished records are opened, not made again


def test_a_generator_can_be_resumed_too(tmp_path: Path) -> None:
    router = small()
    interrupt(router, tmp_path / "cut", 20, iter(WINDOWS.split(3)))
    records = precompute(router, iter(WINDOWS.split(5)), 3, tmp_path / "cut")
    assert torch.equal(records[:][1], online(router)[0])


def test_other_data_or_arguments_do_not_continue_a_run(tmp_path: Path) -> None:
    router = small()
    interrupt(router, tmp_path, 20)
    kept = contents(tmp_path)
    other = TOKENS.copy()
    other[16 * 3 + 2] ^= 1
    for change, said in (
        ({"tokens": other}, "window 3 is the first"),
        ({"tokens": TOKENS[: 16 * 10]}, "20 windows already, the data 10"),
        ({"window": 8}, "window is 16 there, 8 here"),
        ({"k": 2}, "k is 3 there, 2 here"),
        ({"scale": 2.0}, "scale is 1.0 there"),
        ({"gates": "fp32"}, "gates is 'bfloat16' there"),
        ({"grouter": small(1)}, "grouter is '"),
    ):
        arguments = {"grouter": router, "tokens": TOKENS, "k": 3, "out_dir": tmp_path, "window": 16} | change
        with pytest.raises(InputError, match=said):
            precompute(**arguments)  # type: ignore[arg-type]
        assert contents(tmp_path) == kept
    finished = precompute(router, TOKENS, 3, tmp_path, window=16)
    with pytest.raises(InputError, match="window 3 is the first"):
        precompute(router, other, 3, tmp_path, window=16)
    assert len(finished) == 50


# -- checking --------------------------------------------------------------------------------------------------------


def test_check_finds_data_that_does_not_match(tmp_path: Path) -> None:
    router = small()
    records = precompute(router, TOKENS, 3, tmp_path, window=16)
    records.check(TOKENS)
    records.check(WINDOWS, router)
    records.check(iter(WINDOWS.split(9)))
    swapped = WINDOWS.clone()
    swapped[[20, 30]] = WINDOWS[[30, 20]]
    for tokens, said in (
        (swapped, "window 20 is the first"),
        (np.roll(TOKENS, 1), "window 0 is the first"),
        (WINDOWS[:49], "hold 50 windows, the data 49"),
        (torch.cat([WINDOWS, WINDOWS[:1]]), "end after window 49"),
        (WINDOWS.reshape(100, 8), "windows of 8 tokens where 16"),
    ):
        with pytest.raises(InputError, match=said):
            records.check(tokens)
    with pytest.raises(InputError, match="another Grouter"):
        records.check(TOKENS, small(1))
    router.selection_bias[0] += 1
    with pytest.raises(InputError, match="another Grouter"):
        records.check(TOKENS, router)


def test_directories_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no routing records here"):
        RoutingRecords.open(tmp_path)
    precompute(small(), TOKENS, 3, tmp_path, window=16)
    gates = (tmp_path / "gates.bin").read_bytes()
    (tmp_path / "gates.bin").write_bytes(gates[:-1])
    with pytest.raises(InputError, match=r"gates\.bin[\s\S]*4800 bytes, found 4799"):
        RoutingRecords.open(tmp_path)
    (tmp_path / "gates.bin").unlink()
    with pytest.raises(InputError, match="found no file"):
        RoutingRecords.open(tmp_path)
    header = json.loads((tmp_path / "header.json").read_text())
    (tmp_path / "header.json").write_text(json.dumps(header | {"colour": 1}))
    with pytest.raises(InputError, match="colour"):
        RoutingRecords.open(tmp_path)


def test_options_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    for options, said in (
        ({"k": 9}, "top-9 of 8"),
        ({"k": 0}, "top-0"),
        ({"gates": "bf61"}, "bf16"),
        ({"k": 2.5}, "k=2.5"),
        ({"scale": float("nan")}, "scale=nan is not finite"),
        ({"scale": "one"}, "scale='one'"),
        ({"scale": -1}, "scale=-1 is not positive"),
        ({"normalise": "foo"}, "unknown normalise='foo'"),
        ({"eod_id": -1}, "eod_id -1 is outside"),
        ({"batch": 0}, "0 windows per forward"),
        ({"batch": -1}, "-1 windows per forward"),
        ({"tokens": TOKENS + 60}, "outside of the Grouter's vocabulary of 64"),
    ):
        with pytest.raises(InputError, match=said):
            precompute(**{"grouter": small(), "tokens": TOKENS, "k": 3, "out_dir": tmp_path, "window": 16} | options)  # type: ignore[arg-type]
        assert not (tmp_path / "header.json").exists() or "tokens" in options
    assert len(precompute(small(), TOKENS, 3, tmp_path, window=16)) == 50  # a run that wrote nothing is in nobody's way


def test_masks_choose_windows_and_other_kinds_are_refused(tmp_path: Path) -> None:
    records = precompute(small(), TOKENS, 3, tmp_path, window=16)
    mask = np.zeros(50, dtype=bool)
    mask[[5, 7]] = True
    for chosen in (mask, torch.from_numpy(mask), mask.tolist()):
        assert torch.equal(records[chosen][0], WINDOWS[[5, 7]])  # type: ignore[call-overload]
    for few in ([], mask & False):
        assert records[few][0].shape == (0, 16)  # type: ignore[call-overload]
    for other in (mask[:49], 1.7, [1.0, 2.0], "3", None):
        with pytest.raises(InputError, match="chosen by their numbers"):
            records[other]  # type: ignore[call-overload]


def test_headers_that_no_run_writes_are_named(tmp_path: Path) -> None:
    precompute(small(), TOKENS, 3, tmp_path, window=16)
    path = tmp_path / "header.json"
    header = json.loads(path.read_text())
    impossible = {
        "k": ["4", 9], "ids": ["foo", "uint16"], "window": [None], "windows": [-1, True], "gates": ["float64"],
        "scale": [float("nan")], "tokens": [16], "num_experts": [[8]], "format": [2], "complete": [1], "data": [None],
        "eod_id": ["5"], "normalise": [[]],
    }  # fmt: skip
    for name, value in ((name, value) for name, values in impossible.items() for value in values):
        path.write_text(json.dumps(header | {name: value}))
        with pytest.raises(InputError, match="header of the routing records cannot be read") as caught:
            RoutingRecords.open(tmp_path)
        assert f"{name}={value!r}" in str(caught.value.why)
    path.write_text("[]")
    with pytest.raises(InputError, match="cannot be read"):
        RoutingRecords.open(tmp_path)
    path.write_text(json.dumps(header))
    assert len(RoutingRecords.open(tmp_path)) == 50


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    want = precompute(small(), TOKENS, 3, tmp_path / "a", window=16, scale=2.0, eod_id=5)
    numbers = {"k": np.int64(3), "window": np.int64(16), "scale": np.float32(2), "eod_id": np.uint16(5)}
    found = precompute(small(), TOKENS, out_dir=tmp_path / "b", **numbers)  # type: ignore[arg-type]
    assert found.header == want.header
