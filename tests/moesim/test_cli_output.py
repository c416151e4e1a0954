"""What commands write: JSON that anything can read, files that appear whole, no bar in a pipe."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.cli import output
from traces.files import write_bytes

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@dataclass(frozen=True, slots=True)
class Point:
    x: object
    y: object


@given(VALUES)
def test_any_document_is_valid_json_with_sorted_keys(value: object) -> None:
    def sorted_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
        keys = [key for key, _ in pairs]
        assert keys == sorted(keys)
        return dict(pairs)

    def no_constant(name: str) -> object:
        raise AssertionError(f"{name} is not JSON")

    text = output.json_text(value)
    json.loads(text, object_pairs_hook=sorted_keys, parse_constant=no_constant)
    assert text.endswith("\n")


def test_numpy_values_dataclasses_and_paths_become_plain() -> None:
    document = {
        "array": np.array([[1, 2], [3, 4]], dtype=np.int16),
        "number": np.float32(0.5),
        "flag": np.bool_(True),
        "point": Point(np.int64(3), (Path("a") / "b",)),
        "mapping": MappingProxyType({1: "one"}),
    }
    assert json.loads(output.json_text(document)) == {
        "array": [[1, 2], [3, 4]],
        "number": 0.5,
        "flag": True,
        "point": {"x": 3, "y": ["a/b"]},
        "mapping": {"1": "one"},
    }


def test_numbers_that_are_not_finite_become_null() -> None:
    values = [math.nan, math.inf, np.float64("nan"), np.array([1.0, -np.inf])]
    assert json.loads(output.json_text(values)) == [None, None, None, [1.0, None]]


def test_what_has_no_form_in_json_is_a_bug_not_a_guess() -> None:
    with pytest.raises(TypeError, match="set has no form in JSON"):
        output.json_text({1, 2})


@given(st.binary(max_size=50))
def test_a_written_file_holds_the_bytes_and_nothing_lies_beside_it(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("files") / "file"
    write_bytes(path, content)
    assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_names_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(self: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left.*file'$"):
        write_bytes(path, b"new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_targets_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    output.check_target(tmp_path / "new")
    with pytest.raises(IsADirectoryError):
        output.check_target(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        output.check_target(tmp_path / "missing" / "file")


def test_a_table_of_values_keeps_all_digits_and_leaves_unknown_ones_empty(tmp_path: Path) -> None:
    rows = [("a", 0.1 + 0.2, None), ("b,c", np.float64(1e-9), math.nan)]
    output.write_csv(tmp_path / "t.csv", ("name", "value", "other"), rows)
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines == ["name,value,other", "a,0.30000000000000004,", '"b,c",1e-09,']


def test_no_bar_is_drawn_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress(3, "work") as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_a_bar_goes_to_a_terminal_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(shown: bool) -> str:
        reader, writer = os.openpty()
        with open(writer, "w", buffering=1) as terminal:
            monkeypatch.setattr("sys.stderr", terminal)
            token = output.show_progress.set(shown)
            with output.progress(2, "working hard") as advance:
                advance(2)
            output.show_progress.reset(token)
            terminal.write("end")
            terminal.flush()
            text = os.read(reader, 65536).decode()
        os.close(reader)
        return text

    monkeypatch.setenv("TERM", "xterm")
    assert drawn(shown=False) == "end"
    assert "working hard" in drawn(shown=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (math.nan, "-"), (True, "yes"), (1234567, "1,234,567"), (12345.6, "12,346"),
        (0.5, "0.5000"), (2.0, "2.000"), (1e-7, "1.000e-07"), ("text", "text"), (0.0, "0.000"),
    ],
)  # fmt: skip
def test_values_are_shown_for_people(value: object, text: str) -> None:
    assert output.shown(value) == text
