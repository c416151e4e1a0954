"""Tuning on a stand-in: the quickest configuration enters a table, nothing is tuned twice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra `kernels`)")

from moesim_kernels.autotune import Workload, candidates, tune  # noqa: E402
from moesim_kernels.bench import tune as tuner  # noqa: E402
from moesim_kernels.bench.gpu_experts import Sizes  # noqa: E402
from moesim_kernels.bench.timing import Timed  # noqa: E402
from moesim_kernels.errors import KernelError  # noqa: E402
from moesim_kernels.tuning import Config, Problem, choose_config, load_table  # noqa: E402

from tests.kernels.stand_in import stand_in  # noqa: E402

SMALL = [
    Sizes(tokens, 64, 64, 3, 2, kind, torch.float16)
    for kind in ("dense", "int4")
    for tokens in (2, 5)
]
TRIES = 3


class Clock:
    """Times nothing: each group of calls is told the next of `seconds`, over and over."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.asked = seconds, 0

    def __call__(self, calls: Sequence[object], graph: bool):
        assert graph
        self.asked += 1
        return Timed([self.seconds[(self.asked - 1) % len(self.seconds)]]), {}


@pytest.fixture(autouse=True)
def one_thread():
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("the stand-in is for the interpreter; the tuner itself uses a GPU")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(out: Path, clock: Clock, minutes: float = 1.0, wanted: Sequence[Sizes] = SMALL):
    events: list[dict[str, object]] = []
    gpu = stand_in(time=clock)
    return tuner.tune_all(wanted, gpu, out, TRIES, minutes, events.append), events


def test_the_quickest_configuration_of_each_batch_enters_the_table_of_its_problem(
    tmp_path: Path,
) -> None:
    clock = Clock(3.0, 1.0, 2.0)
    count, events = _run(tmp_path, clock)
    assert count == {"tuned": 4, "refused": 0, "reused": 0, "left": 0}
    assert clock.asked == 4 * TRIES
    assert [event["event"] for event in events] == ["start", *["tuned"] * 4, "end"]
    names = {Problem(3, 64, "stand-in", kind).file_name() for kind in ("dense", "int4")}
    assert {path.name for path in tmp_path.iterdir()} == names
    for sizes in SMALL:
        problem = Problem(3, 64, "stand-in", sizes.weight_format)
        second = candidates(Workload(2 * sizes.tokens, 3, sizes.weight_format), TRIES)[1]
        assert choose_config(tmp_path, problem, sizes.tokens, 2) == second
        content = json.loads((tmp_path / problem.file_name()).read_text())
        assert set(content) == {"2", "5"}


def test_a_second_run_tunes_only_what_the_tables_lack(tmp_path: Path) -> None:
    _run(tmp_path, Clock(1.0), wanted=SMALL[:1])
    before = load_table(next(tmp_path.iterdir()))
    clock = Clock(1.0, 2.0)
    count, _ = _run(tmp_path, clock, wanted=SMALL[:3])
    assert (count["reused"], count["tuned"]) == (1, 2)
    assert clock.asked == 2 * TRIES
    dense = load_table(tmp_path / Problem(3, 64, "stand-in").file_name())
    assert dense.items() >= before.items()
    assert set(dense) == {2, 5}


def test_when_the_time_is_over_the_rest_is_left_and_no_half_search_is_saved(
    tmp_path: Path,
) -> None:
    class Slow(Clock):
        def __call__(self, calls, graph):
            time.sleep(0.2)
            return super().__call__(calls, graph)

    count, _ = _run(tmp_path, Slow(1.0), minutes=0.1 / 60)
    assert count == {"tuned": 0, "refused": 0, "reused": 0, "left": 4}
    assert list(tmp_path.iterdir()) == []


def test_a_problem_without_a_kernel_is_refused_in_words_and_the_next_goes_on(
    tmp_path: Path,
) -> None:
    no_whole_blocks = Sizes(2, 64, 64, 3, 2, "fp8", torch.bfloat16)
    count, events = _run(tmp_path, Clock(1.0), wanted=[no_whole_blocks, SMALL[0]])
    assert (count["refused"], count["tuned"]) == (1, 1)
    # The stand-in's clock calls nothing, so the winner's check is what meets the refusal.
    assert "two equal halves" in str(events[1]["why"])


def test_a_configuration_that_computes_something_else_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tuner.moe_ffn
    monkeypatch.setattr(tuner, "moe_ffn", lambda *given: right(*given) * 2)
    count, events = _run(tmp_path, Clock(1.0), wanted=SMALL[:1])
    assert count["refused"] == 1
    assert "is wrong by" in str(events[1]["why"])
    assert list(tmp_path.iterdir()) == []


def test_a_broken_device_ends_the_run_and_keeps_what_was_tuned(tmp_path: Path) -> None:
    class Breaks(Clock):
        def __call__(self, calls, graph):
            if self.asked == TRIES:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().__call__(calls, graph)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        _run(tmp_path, Breaks(1.0))
    assert set(load_table(next(tmp_path.iterdir()))) == {2}


def test_what_the_compiler_cannot_do_is_passed_over() -> None:
    configs = [Config(16, 16, 16), Config(16, 32, 16)]

    def time_s(config: Config) -> float:
        if config == configs[0]:
            raise RuntimeError("PassManager::run failed")
        return 1.0

    found = tune(configs, time_s)
    assert (found.config, found.n_refused) == (configs[1], 1)
    with pytest.raises(KernelError, match="refused all 1"):
        tune(configs[:1], time_s)


def test_problems_are_all_different_and_begin_with_decode_of_the_first_shape() -> None:
    wanted = tuner.problems()
    assert len(set(wanted)) == len(wanted) > 100
    first = wanted[0]
    assert (first.hidden, first.experts, first.weight_format) == (2048, 128, "dense")
    assert first.tokens * first.topk == first.experts
    assert {sizes.weight_format for sizes in wanted[:40]} == {"dense", "int4", "fp8", "int8"}
