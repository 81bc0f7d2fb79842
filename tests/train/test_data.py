"""The corpus, splits, batches, and everything that can be wrong with the user's data."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError
from moefx.train import corpus as corpus_module
from moefx.train import data as data_module
from moefx.train.corpus import embedded_corpus, is_held_out
from moefx.train.data import TokenDataset, embedded_dataset, open_dataset, unigram_nats

from .toy import VOCAB, toy_data


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, bytes]]:
    return embedded_corpus()


def token_file(directory: Path, tokens: list[int], dtype: str = "uint16", vocab: int = 100) -> Path:
    path = directory / "tokens.bin"
    np.asarray(tokens, dtype=dtype).tofile(path)
    path.with_suffix(".json").write_text(json.dumps({"dtype": dtype, "vocab_size": vocab}))
    return path


# The embedded corpus


def test_corpus_is_text_of_this_installation_in_a_fixed_order(documents: list[tuple[str, bytes]]) -> None:
    names = [name for name, _ in documents]
    assert names == sorted(set(names))
    assert any(n.startswith("topic/") for n in names)
    assert "lib/dataclasses.py" in names
    assert b"def dataclass(" in dict(documents)["lib/dataclasses.py"]
    assert 1_000_000 < sum(len(text) for _, text in documents) <= corpus_module.LIMIT
    for _, text in documents:
        text.decode("utf-8")


def test_corpus_leaves_out_what_differs_between_machines(documents: list[tuple[str, bytes]]) -> None:
    for name, _ in documents:
        assert not {"site-packages", "test", "tests", "__pycache__", "encodings"} & set(name.split("/")[:-1])
        assert "_sysconfigdata" not in name


def test_corpus_is_the_same_in_another_process(documents: list[tuple[str, bytes]]) -> None:
    program = "from moefx.train.data import embedded_dataset; print(embedded_dataset().fingerprint)"
    environment = {"PYTHONHASHSEED": "123", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    assert done.stdout.strip() == embedded_dataset().fingerprint


def test_corpus_limit_keeps_a_subset(documents: list[tuple[str, bytes]]) -> None:
    few = embedded_corpus(limit=500_000)
    assert 0 < sum(len(text) for _, text in few) <= 500_000
    assert set(few) < set(documents)
    # Chosen by hash, not from the head of the alphabet.
    assert max(name for name, _ in few) > "lib/p"


def test_held_out_documents_are_about_one_in_twenty(documents: list[tuple[str, bytes]]) -> None:
    held = [name for name, _ in documents if is_held_out(name)]
    assert 0.02 < len(held) / len(documents) < 0.1


def test_splits_of_the_corpus_share_no_document(documents: list[tuple[str, bytes]]) -> None:
    data = embedded_dataset()
    train, val = (set(bytes(data.tokens(split)).split(b"\0")) for split in ("train", "val"))
    expected: dict[bool, set[bytes]] = {True: set(), False: set()}
    for name, text in documents:
        if text:  # empty __init__ files are in both
            expected[is_held_out(name)].add(text)
    assert train - {b""} == expected[False]
    assert val - {b""} == expected[True]
    assert not (train & val) - {b""}


def test_a_stripped_installation_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus_module, "_topics", dict)
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match="carries no text") as caught:
        embedded_corpus()
    assert caught.value.where == str(tmp_path)


def test_sources_skip_other_encodings_and_dangling_links(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "also_good.py").write_text("x = 2\n")
    monkeypatch.setattr(corpus_module, "_topics", dict)
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda _: str(tmp_path))
    assert embedded_corpus() == [("lib/good.py", b"x = 1\n")]


# Batches


@given(seed=st.integers(0, 2**40), step=st.integers(0, 2**40), batch=st.integers(1, 5), seq=st.integers(2, 9))
@settings(max_examples=50, deadline=None)
def test_a_batch_depends_on_seed_and_step_only(seed: int, step: int, batch: int, seq: int) -> None:
    data = toy_data()
    long = list(islice(data.batches("train", batch, seq, seed, step), 4))
    late = next(data.batches("train", batch, seq, seed, step + 3))
    assert torch.equal(long[3], late)
    assert late.shape == (batch, seq)
    assert late.dtype == torch.int64


def test_rows_are_windows_of_the_split() -> None:
    data = TokenDataset(np.arange(50, dtype=np.uint16), np.arange(100, 130, dtype=np.uint16), 200, "count")
    for split, low, high in (("train", 0, 50), ("val", 100, 130)):
        for ids in islice(data.batches(split, 4, 10, seed=3), 20):
            assert torch.equal(ids, ids[:, :1] + torch.arange(10))
            assert ids.min() >= low
            assert ids.max() < high


def test_every_window_can_be_drawn_the_last_one_included() -> None:
    data = TokenDataset(np.arange(7, dtype=np.uint8), np.arange(7, dtype=np.uint8), 8, "tiny")
    starts = {int(row[0]) for ids in islice(data.batches("train", 8, 5, seed=0), 20) for row in ids}
    assert starts == {0, 1, 2}


def test_seeds_steps_and_splits_draw_differently() -> None:
    tokens = np.arange(60000, dtype=np.uint16)
    data = TokenDataset(tokens, tokens, 60000, "count")
    drawn = [
        next(data.batches(split, 8, 4, seed, step))[:, 0].tolist()
        for split in ("train", "val")
        for seed in (0, 1)
        for step in (0, 1)
    ]
    assert len({tuple(d) for d in drawn}) == len(drawn)
    assert len({start for d in drawn for start in d}) > 60  # of 64: neighbouring steps share no starts


FROZEN = [993, 623, 362, 5]


def test_drawing_is_frozen() -> None:
    """The words of Philox are defined by its paper. If this changes, old runs can no longer be resumed exactly."""
    data = TokenDataset(np.arange(1000, dtype=np.uint16), np.arange(1000, dtype=np.uint16), 1000, "count")
    assert next(data.batches("train", 4, 2, seed=7, start_step=5))[:, 0].tolist() == FROZEN


def test_fingerprint_sees_every_token_and_the_split() -> None:
    base = toy_data()
    changed = base.train.copy()
    changed[1234] ^= 1
    others = [
        TokenDataset(changed, base.val, VOCAB, "toy"),
        TokenDataset(base.train, base.val[:-1], VOCAB, "toy"),
        TokenDataset(base.train.astype(np.uint16), base.val, VOCAB, "toy"),
    ]
    assert toy_data().fingerprint == base.fingerprint
    assert len({base.fingerprint, *(o.fingerprint for o in others)}) == 4


def test_fingerprint_of_long_data_looks_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "_SCAN_LIMIT", 100)
    monkeypatch.setattr(data_module, "_CHUNK", 16)
    base = np.zeros(1000, dtype=np.uint8)
    prints = set()
    for place in (None, 0, 999):
        tokens = base.copy()
        if place is not None:
            tokens[place] = 1
        prints.add(TokenDataset(tokens, base, 2, "long").fingerprint)
    assert len(prints) == 3


# The user's files


def test_text_files_become_bytes_with_the_tail_of_each_held_out(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes(b"a" * 95 + b"A" * 5)
    second.write_bytes("é".encode() * 19 + b"BB")
    data = open_dataset([first, str(second)])
    assert bytes(data.train) == b"a" * 95 + b"\0" + "é".encode() * 19
    assert bytes(data.val) == b"A" * 5 + b"\0" + b"BB"
    assert data.vocab_size == 256


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_file_is_memory_mapped(tmp_path: Path, dtype: str) -> None:
    ids = list(range(100))
    data = open_dataset([token_file(tmp_path, ids, dtype)])
    assert isinstance(data.train, np.memmap)
    assert data.train.tolist() == ids[:95]
    assert data.val.tolist() == ids[95:]
    assert next(data.batches("val", 2, 4, seed=0)).max() < 100


def test_no_paths_mean_the_corpus() -> None:
    assert open_dataset().name.startswith("embedded corpus")


def test_missing_file(tmp_path: Path) -> None:
    for name in ("gone.txt", "gone.bin"):
        with pytest.raises(InputError, match="cannot be read") as caught:
            open_dataset([tmp_path / name])
        assert caught.value.where == str(tmp_path / name)
        assert "No such file" in str(caught.value.why)


def test_directory_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        open_dataset([tmp_path])


def test_empty_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(InputError, match="is empty"):
        open_dataset([empty])
    with pytest.raises(InputError, match="it is empty"):
        open_dataset([token_file(tmp_path, [])])


def test_kinds_cannot_be_mixed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 data files, one of them a \.bin"):
        open_dataset([token_file(tmp_path, [1, 2]), tmp_path / "a.txt"])


def test_odd_number_of_bytes(tmp_path: Path) -> None:
    path = token_file(tmp_path, list(range(50)))
    path.write_bytes(path.read_bytes() + b"\1")
    with pytest.raises(InputError, match="101 bytes are no multiple of 2"):
        open_dataset([path])


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        (None, "has no sidecar"),
        ("{", "is not JSON"),
        ("[]", "dtype=None"),
        ('{"dtype": "int8", "vocab_size": 5}', "dtype='int8'"),
        ('{"dtype": ["uint16"], "vocab_size": 5}', "is incomplete"),
        ('{"dtype": "uint16"}', "vocab_size=None"),
        ('{"dtype": "uint16", "vocab_size": true}', "vocab_size=True"),
        ('{"dtype": "uint16", "vocab_size": 0}', "vocab_size=0"),
    ],
)
def test_bad_sidecar(tmp_path: Path, sidecar: str | None, message: str) -> None:
    path = token_file(tmp_path, [1, 2, 3])
    path.with_suffix(".json").unlink()
    if sidecar is not None:
        path.with_suffix(".json").write_text(sidecar)
    with pytest.raises(InputError, match=message) as caught:
        open_dataset([path])
    assert caught.value.where == str(path.with_suffix(".json"))
    assert "uint32" in str(caught.value.todo)


def test_ids_beyond_the_sidecar(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="token id 100 contradicts the sidecar's vocab_size 100"):
        open_dataset([token_file(tmp_path, [*range(99), 100])])


def test_ids_beyond_the_sidecar_in_a_long_file_are_met_when_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "_SCAN_LIMIT", 10)
    data = open_dataset([token_file(tmp_path, [100] * 40)])
    with pytest.raises(InputError, match="token id 100 is outside"):
        next(data.batches("train", 1, 4, seed=0))


def test_ids_beyond_the_model(tmp_path: Path) -> None:
    data = open_dataset([token_file(tmp_path, [*range(60)])])
    data.check(seq=3, model_vocab=60)  # the sidecar says 100, but the ids fit
    data.check(seq=3, model_vocab=None)
    with pytest.raises(InputError, match="token id 59 is outside of a vocabulary of 59"):
        data.check(seq=3, model_vocab=59)


def test_data_shorter_than_a_sequence(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("x" * 100)
    data = open_dataset([short])
    with pytest.raises(InputError, match="the val split has 5 tokens, less than one sequence of 6") as caught:
        data.check(seq=6, model_vocab=None)
    assert "held out" in str(caught.value.why)
    with pytest.raises(InputError, match="the train split has 95 tokens"):
        next(data.batches("train", 1, 96, seed=0))
    assert next(data.batches("val", 1, 5, seed=0)).shape == (1, 5)


def test_unknown_split() -> None:
    with pytest.raises(InputError, match="unknown split 'vall'"):
        toy_data().tokens("vall")


# The unigram baseline


@given(
    train=st.lists(st.integers(0, 4), max_size=40),
    val=st.lists(st.integers(0, 4), min_size=1, max_size=40),
)
@settings(deadline=None)
def test_unigram_against_counting(train: list[int], val: list[int]) -> None:
    counts = Counter(train)
    brute = -sum(math.log((counts[t] + 1) / (len(train) + 5)) for t in val) / len(val)
    assert unigram_nats(np.array(train, dtype=np.uint8), np.array(val, dtype=np.uint8), 5) == pytest.approx(brute)


def test_unigram_counts_across_chunks_and_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_data()
    whole = unigram_nats(data.train, data.val, VOCAB)
    monkeypatch.setattr(data_module, "_CHUNK", 7)
    assert unigram_nats(data.train, data.val.reshape(4, -1), VOCAB) == pytest.approx(whole, abs=1e-12)
    assert whole == pytest.approx(math.log(VOCAB), abs=0.01)  # the toy's tokens are uniform


def test_a_single_path_needs_no_sequence(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"some text" * 9)
    want = open_dataset([file])
    for given_as in (file, str(file)):
        found = open_dataset(given_as)
        assert (found.fingerprint, found.name) == (want.fingerprint, want.name)
    with pytest.raises(InputError, match="cannot be read"):
        open_dataset("")


def test_arrays_are_not_read_as_text(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(99))
    with pytest.raises(InputError, match=r"\.npy file is no text"):
        open_dataset([tmp_path / "ids.npy"])


@pytest.mark.parametrize(("batch", "seq"), [(0, 4), (-1, 4), (2, 0), (2, -4)])
def test_batches_of_nothing(batch: int, seq: int) -> None:
    with pytest.raises(InputError, match=f"batches of {batch} sequences of {seq} tokens"):
        next(toy_data().batches("train", batch, seq, 0))
