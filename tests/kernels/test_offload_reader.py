"""The background reader takes what is needed first, and never spoils a slot given away."""

from __future__ import annotations

import threading
import time

import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra `kernels`)")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from moesim_kernels.offload.cache import LruSlots  # noqa: E402
from moesim_kernels.offload.policy import Read  # noqa: E402
from moesim_kernels.offload.reader import Background, Inline  # noqa: E402
from moesim_kernels.offload.robbed import LEAST, Taken, Watch, undisturbed  # noqa: E402


class Gated:
    """A tier whose reads go through one at a time, when the test lets them."""

    kind, device, weights = "gated", torch.device("cpu"), ()

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.slots: dict[int, int] = {}
        self._gate = threading.Semaphore(0)
        self._began = threading.Semaphore(0)

    def read(self, layer: int, expert: int, slot: int) -> None:
        self.begun.append(expert)
        self._began.release()
        assert self._gate.acquire(timeout=10)
        self.slots[slot] = expert

    def wait_for_begin(self) -> None:
        assert self._began.acquire(timeout=10)

    def let(self, n: int) -> None:
        self._gate.release(n)

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def gated():
    tier = Gated()
    reader = Background(tier)
    yield tier, reader
    tier.let(100)
    reader.close()


def read(expert: int, slot: int | None = None) -> Read:
    return Read(0, expert, expert if slot is None else slot)


def test_what_is_needed_waits_for_the_read_in_progress_and_goes_before_all_others(gated) -> None:
    tier, reader = gated
    reader.ask_ahead([read(1), read(2), read(3), read(4)])
    tier.wait_for_begin()
    assert reader.hurry([1, 3]) == [1, 3]  # 1 is in progress, 3 has not begun
    reader.ask([read(5), read(6)])
    reader.ask_ahead([read(7)])
    tier.let(7)
    reader.drain()
    assert tier.begun == [1, 3, 5, 6, 2, 4, 7]
    assert len(reader.taken) == 7
    assert reader.dropped == 0
    assert reader.hurry([1, 3, 5]) == []
    assert reader.wait(5) == 0.0


def test_a_read_is_dropped_when_its_slot_goes_to_another_expert_before_it_began(gated) -> None:
    tier, reader = gated
    reader.ask_ahead([read(1), read(2, slot=9)])
    tier.wait_for_begin()
    reader.ask([read(3, slot=9)])
    tier.let(3)
    assert reader.wait(9) > 0
    reader.drain()
    assert tier.begun == [1, 3]
    assert tier.slots[9] == 3
    assert reader.dropped == 1


def test_a_slot_given_away_while_it_is_read_into_ends_with_the_later_expert(gated) -> None:
    tier, reader = gated
    reader.ask_ahead([read(1, slot=9)])
    tier.wait_for_begin()
    reader.ask([read(2, slot=9)])
    tier.let(1)
    tier.wait_for_begin()
    assert tier.slots[9] == 1
    assert reader.hurry([9]) == [9]  # still to come: the expert that was asked for last
    tier.let(1)
    reader.wait(9)
    assert tier.slots[9] == 2
    assert reader.dropped == 0


def test_waiting_lasts_until_the_read_ends(gated) -> None:
    tier, reader = gated
    reader.ask([read(1)])
    threading.Timer(0.05, tier.let, [1]).start()
    assert 0.03 < reader.wait(1) < 5


def test_what_stops_the_reader_is_raised_where_its_expert_is_waited_for() -> None:
    class Broken(Gated):
        def read(self, layer: int, expert: int, slot: int) -> None:
            raise OSError("the disk is gone")

    reader = Background(Broken())
    reader.ask([read(1)])
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            reader.wait(1)
    reader.close()


def test_the_running_thread_reads_each_expert_once_and_only_when_it_is_waited_for() -> None:
    tier = Gated()
    tier.let(2)
    reader = Inline(tier)
    reader.ask([read(1), read(2)])
    assert tier.begun == []
    assert reader.wait(2) > 0
    assert reader.wait(2) == 0.0
    assert tier.begun == [2]
    with pytest.raises(RuntimeError, match="background reader"):
        reader.ask_ahead([read(3)])
    reader.close()


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(3, 6),
    asked=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=3, unique=True), max_size=30),
)
def test_slots_hold_what_was_asked_for_and_the_longest_unused_leave(
    n: int, asked: list[list[int]]
) -> None:
    cache, recent = LruSlots(10, n), []
    for experts in asked:
        before = {expert for expert, _ in cache.resident()}
        reads = cache.bring(experts)
        cache.touch(experts)
        recent = [e for e in recent if e not in experts] + experts
        held = dict(cache.resident())
        assert [expert for expert, _ in reads] == [e for e in experts if e not in before]
        assert list(held) == recent[-n:]
        assert len(set(held.values())) == len(held) <= n
        assert set(held.values()) <= set(range(10, 10 + n))
        assert all(held[expert] == slot for expert, slot in reads)


def test_a_thread_that_runs_alone_is_hardly_ever_without_a_core() -> None:
    watch = Watch()
    taken = watch.timed(lambda: time.sleep(0.02))
    assert taken.seconds >= 0.02
    assert 0 <= taken.robbed_s <= taken.seconds
    watch.close()
    assert watch.robbed_s() == 0.0


def test_calm_samples_count_where_there_are_enough_of_them() -> None:
    calm, robbed = Taken(1.0, 0.005), Taken(3.0, 2.0)
    assert undisturbed([calm] * LEAST + [robbed] * 9) == [1.0] * LEAST
    assert undisturbed([calm] * (LEAST - 1) + [robbed]) == [1.0] * (LEAST - 1) + [3.0]
