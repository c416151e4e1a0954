"""The replay benchmark runs, replays what it says, and agrees with libCacheSim where installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "cache_replay.py"


@pytest.fixture(scope="module")
def benchmark_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_cache_replay", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_small_benchmark_replays_every_policy_over_every_request(
    benchmark_module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = benchmark_module.main(["--small"])
    assert {row.policy for row in rows} == set(benchmark_module.POLICIES)
    assert {row.scope for row in rows} == {"global", "per layer"}
    for row in rows:
        assert row.n_requests == 1000 * 4 * 2
        assert 0 < row.n_misses < row.n_requests
        assert row.their_misses in (None, row.n_misses)
    assert "cache replay, drawn, 1000 tokens, 8000 requests" in capsys.readouterr().out
