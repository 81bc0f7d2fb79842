"""Files that are replaced together or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from moefx.errors import InputError
from moefx.files import json_text, replacing

from .disk import full_after

OLD = {"a": "old a", "b": "old b", "c": "old c"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in OLD.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    return {f.name: f.read_text() for f in folder.iterdir()}


def write(new: Path, **texts: str) -> None:
    for name, text in texts.items():
        (new / name).write_text(text)


def test_files_take_their_places_and_others_stay(folder: Path) -> None:
    with replacing(folder, "the results") as new:
        write(new, a="new a", d="new d")
        assert contents(new.parent / new.name) == {"a": "new a", "d": "new d"}
        assert (folder / "a").read_text() == "old a"
    assert contents(folder) == OLD | {"a": "new a", "d": "new d"}
    with replacing(folder / "deeper" / "still", "the results") as new:
        write(new, a="first")
    assert contents(folder / "deeper" / "still") == {"a": "first"}


def test_an_error_on_the_way_leaves_everything(folder: Path) -> None:
    def fail() -> None:
        with replacing(folder, "the results") as new:
            write(new, a="new a", b="new b")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert contents(folder) == OLD


def test_a_full_disk_leaves_everything_and_is_named(folder: Path) -> None:
    match = "the results could not be written"
    with pytest.raises(InputError, match=match) as caught, full_after(100), replacing(folder, "the results") as new:
        write(new, a="new a", b="b" * 200)
    assert contents(folder) == OLD
    assert caught.value.where == str(folder)
    assert "too large" in str(caught.value.why)


def test_one_inside_of_another_names_the_place_that_was_asked_for(folder: Path) -> None:
    def both(report: str) -> None:
        with replacing(folder, "the results") as new:
            write(new, a="new a")
            with replacing(new, "the report") as inner:
                write(inner, b=report)

    with pytest.raises(InputError, match="the report could not be written") as caught, full_after(100):
        both("b" * 200)
    assert caught.value.where == str(folder)
    assert contents(folder) == OLD
    both("new b")
    assert contents(folder) == OLD | {"a": "new a", "b": "new b"}


def test_what_is_no_file_is_not_replaced(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    for name in ("pipe", "sub"):
        with pytest.raises(InputError, match="no regular file"), replacing(folder, "the results") as new:
            write(new, a="new a", **{name: "new"})
        assert (folder / "a").read_text() == "old a"
    (folder / "file").write_text("in the way")
    with pytest.raises(InputError, match="exists"), replacing(folder / "file", "the results"):
        pass


def test_json_has_null_for_what_is_no_finite_number() -> None:
    content = {"loss": math.nan, "pairs": [(1, math.inf), (2, 0.5)], "deep": {"x": [-math.inf, "NaN", None, True]}}
    found = json.loads(json_text(content), parse_constant=pytest.fail)
    assert found == {"loss": None, "pairs": [[1, None], [2, 0.5]], "deep": {"x": [None, "NaN", None, True]}}
    assert math.isnan(content["loss"])  # what is written is left as it was
    assert json_text({"where": Path("runs"), "n": 3}, default=str, indent=1) == '{\n "where": "runs",\n "n": 3\n}'
