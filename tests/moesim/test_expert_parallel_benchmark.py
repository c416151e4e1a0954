"""The benchmark runs and measures the job it names; its speed is not asserted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "expert_parallel.py"


def test_the_small_benchmark_covers_every_mode_rule_and_the_steps() -> None:
    spec = importlib.util.spec_from_file_location("expert_parallel_benchmark", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    rows = module.main(["--small"])
    assert [row.unit for row in rows] == ["choices"] * 6 + ["steps"]
    assert {row.amount for row in rows[:6]} == {64 * 4 * 4}
    assert all(row.per_s > 0 for row in rows)
