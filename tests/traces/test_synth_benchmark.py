"""The fidelity benchmark runs and reports every statistic of a small drawn trace."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "synth_fidelity.py"


@pytest.fixture(scope="module")
def benchmark_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_synth_fidelity", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_small_study_compares_every_statistic_and_keeps_the_calibrated_ones(
    benchmark_module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (study,) = benchmark_module.main(["--small", "--seeds", "2", "--rounds", "12"])
    rows = {row.statistic: row for row in study.rows}
    assert study.n_tokens == 4000
    assert len(rows) == 13
    for kept in benchmark_module.KEPT:
        assert rows[kept].error <= benchmark_module.BAR
    assert rows["reuse ratio"].source > 1.5
    assert "drawn: 4000 tokens generated against the source" in capsys.readouterr().out
