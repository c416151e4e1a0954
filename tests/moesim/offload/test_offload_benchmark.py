"""The benchmark of the offload simulator runs and names every policy."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "offload.py"


def test_the_small_benchmark_prints_built_in_and_plain_policies(
    capsys: pytest.CaptureFixture[str],
) -> None:
    benchmark = runpy.run_path(str(BENCHMARK))
    assert benchmark["main"](["--small"]) == 0
    out = capsys.readouterr().out
    for name in ("lru, load", "arc, load", "lru, hss", "next-gate", "lru in Python"):
        assert name in out
