"""Pictures: written whole, equal bytes for equal figures, and what they are made of."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moesim.errors import SimulationError
from moesim.report import breakdown, curves, figure, heatmap, roofline

RNG = np.random.default_rng(0)
LOADS = {"contiguous": RNG.random((6, 8)) + 0.2, "plan": np.full((6, 8), 3.0)}
PARTS = {
    "contiguous": {"experts": 3e-3, "dispatch": 1e-3, "dense": 0.0, "overlap": -5e-4},
    "plan": {"experts": 2e-3, "dispatch": 1e-3, "dense": 0.0, "overlap": -4e-4},
}
NAN = np.array([np.nan, np.nan])
ROOFS = roofline.Roofs("h200", 4.8e12, {"bf16": 989e12, "fp16": 989e12, "fp8": 1979e12})
POINTS = [roofline.Points("experts", np.array([2.0, 50.0]), np.array([9e12, 2e14]), ["1", "64"])]

PICTURES: dict[str, Callable[[Path], None]] = {
    "ranks": lambda path: heatmap.rank_load_heatmaps(LOADS, path, range(3, 9)),
    "ranks of five": lambda path: heatmap.rank_load_heatmaps(
        {str(i): LOADS["contiguous"] for i in range(5)}, path
    ),
    "one rank": lambda path: heatmap.rank_load_heatmaps({"one": np.ones((1, 1))}, path),
    "experts": lambda path: heatmap.expert_load_heatmap(LOADS["contiguous"], range(6), path),
    "no load": lambda path: heatmap.expert_load_heatmap(np.zeros((2, 4)), (0, 1), path),
    "transitions": lambda path: heatmap.transition_heatmap(np.eye(8) * 5, (3, 4), path),
    "bars": lambda path: breakdown.step_breakdown(PARTS, path),
    "one bar": lambda path: breakdown.step_breakdown({"plan": {"experts": 2e-7}}, path),
    "roofline": lambda path: roofline.roofline(ROOFS, POINTS, path),
    "bare roofline": lambda path: roofline.roofline(ROOFS, [], path),
    "reuse": lambda path: curves.reuse_by_layer(np.array([1.5, np.nan, 0.5]), (0, 1, 2), path),
    "no reuse": lambda path: curves.reuse_by_layer(NAN, (0, 1), path),
    "srp": lambda path: curves.srp_by_window((2, 4), np.array([0.8, np.nan]), NAN * 0, path),
    "no srp": lambda path: curves.srp_by_window((2, 4), NAN, np.array([0.5, 0.4]), path),
    "shares": lambda path: curves.shares_by_rank({"trace": LOADS["contiguous"]}, path),
}


def size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_a_png_of_readable_size(tmp_path: Path, name: str) -> None:
    path = tmp_path / "picture.png"
    PICTURES[name](path)
    width, height = size(path)
    assert 500 <= width <= 2000
    assert 250 <= height <= 2400
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("name", ["ranks", "bars", "roofline", "reuse"])
def test_equal_figures_give_equal_bytes(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        PICTURES[name](path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_that_fails_half_way_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    with pytest.raises(ZeroDivisionError), figure.drawing(path, (4, 3)) as (_, (panel,)):
        panel.plot([0, 1 // 0])
    assert list(tmp_path.iterdir()) == []


def test_loads_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match=r"shapes .*\[2, 4\].*\[3, 4\]"):
        heatmap.rank_load_heatmaps({"a": np.ones((2, 4)), "b": np.ones((3, 4))}, tmp_path / "x")
    for empty in (
        lambda: heatmap.rank_load_heatmaps({}, tmp_path / "x"),
        lambda: breakdown.step_breakdown({}, tmp_path / "x"),
        lambda: roofline.roofline(roofline.Roofs("cpu", 1e11, {}), [], tmp_path / "x"),
    ):
        with pytest.raises(SimulationError, match=r"loads|parts|no compute"):
            empty()
    assert list(tmp_path.iterdir()) == []


POSITIVE = arrays(np.float64, (3, 4), elements=st.floats(0.1, 1e6))


@given(POSITIVE)
def test_load_over_the_mean_averages_to_one_in_every_row(load: np.ndarray) -> None:
    np.testing.assert_allclose(heatmap.over_mean(load).mean(axis=1), 1.0)
    np.testing.assert_allclose(heatmap.over_mean(load * 7), heatmap.over_mean(load))


WEIGHTS = arrays(np.float64, 4, elements=st.floats(1, 1e3))


@given(WEIGHTS, WEIGHTS)
def test_independent_choices_are_what_chance_gives(x: np.ndarray, y: np.ndarray) -> None:
    np.testing.assert_allclose(heatmap.over_chance(np.outer(x, y)), 1.0)


def test_rows_without_load_are_neither_busy_nor_idle() -> None:
    assert (heatmap.over_mean(np.zeros((2, 3))) == 1).all()
    assert (heatmap.over_chance(np.zeros((3, 3))) == 1).all()


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300), st.integers(1, 20))
def test_ticks_are_few_begin_with_the_first_and_keep_their_labels(
    labels: list[int], most: int
) -> None:
    places, texts = figure.few_ticks(labels, most)
    assert 1 <= len(places) <= most
    assert places[0] == 0
    assert texts == [str(labels[place]) for place in places]


@pytest.mark.parametrize(
    ("longest_s", "unit"), [(2.0, "s"), (0.5, "ms"), (2e-3, "ms"), (5e-5, "µs"), (0.0, "µs")]
)
def test_times_are_drawn_in_a_unit_that_reads_well(longest_s: float, unit: str) -> None:
    assert figure.time_unit(longest_s)[1] == unit
