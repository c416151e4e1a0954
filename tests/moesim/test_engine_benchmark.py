"""The benchmark of the engine runs; engine and twin agree on its programs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "engine.py"


def test_the_small_benchmark_prints_a_line_for_every_case(
    capsys: pytest.CaptureFixture[str],
) -> None:
    benchmark = runpy.run_path(str(BENCHMARK))
    assert benchmark["main"](["--small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:28].strip() for line in lines[2:]] == [c.name for c in benchmark["CASES"]]


def test_the_fewest_bytes_of_a_program_are_those_of_its_arrays_and_results() -> None:
    benchmark = runpy.run_path(str(BENCHMARK))
    program = benchmark["copies_over_two_pools"](10)
    assert benchmark["fewest_bytes"](program) == 10 * (4 + 5 * 8) + 20 * 4
