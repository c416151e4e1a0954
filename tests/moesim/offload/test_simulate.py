"""Clocking an offloaded run: laws of time, bytes, energy and memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hwmodels.box import Box, load_box
from hwmodels.errors import HardwareError
from moesim.errors import SimulationError
from moesim.offload.built_in import decide_built_in
from moesim.offload.drive import cold_reads
from moesim.offload.energy import joules_of
from moesim.offload.memory import check_below, expert_room_bytes, footprint
from moesim.offload.pim import with_pim
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Prices, Weights, prices
from moesim.offload.simulate import run, simulate
from moesim.policies.prefetch import oracle
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.model import ModelSpec
from traces.models import load_model
from traces.synth import zipf_trace

BOX = "rtx-4090-xeon-6454s"


def work_of(n_tokens: int = 200, model: str = "mixtral-8x7b", batch: int = 1) -> LayerSteps:
    """Decode layer-steps of a synthetic trace in a model's shape."""
    spec = load_model(model)
    trace = zipf_trace(n_tokens, spec.n_moe_layers, spec.n_experts, spec.top_k, 0.6, 0.3, seed=1)
    return layer_steps(trace, forward_passes(trace, batch, "decode"))


def priced(
    work: LayerSteps, box: str | Box = BOX, form: Weights | None = None, model: str = "mixtral-8x7b"
) -> tuple[ModelSpec, Prices]:
    """The model and the prices of its work."""
    spec = load_model(model)
    where = load_box(box) if isinstance(box, str) else box
    return spec, prices(spec, where, work, form)


def slots(work: LayerSteps, n: int) -> OffloadPolicy:
    """n slots in every layer, LRU, misses loaded."""
    return OffloadPolicy(slots=np.full(work.n_layers, n, np.int64))


def test_with_all_experts_resident_only_the_first_loads_stall() -> None:
    work = work_of()
    _, price = priced(work)
    result = simulate(work, price, slots(work, 8))
    late = result.stall_s[100:]
    assert result.loads <= work.n_objects
    assert (late < 1e-12).mean() > 0.9


def test_without_a_cache_every_request_is_a_copy() -> None:
    work = work_of(50)
    _, price = priced(work)
    result = simulate(work, price, slots(work, 0))
    assert result.hit_rate == 0
    assert result.loads == len(work.expert)
    expected = len(work.expert) * price.expert_bytes / 50
    assert result.bytes_per_token == pytest.approx(expected)
    # The link is the bottleneck: the run takes at least what the bytes take on it.
    assert result.seconds >= result.bytes_per_token * 50 / price.box.copy_bytes_per_s


def test_a_pass_lasts_as_long_as_work_and_stall_on_the_device() -> None:
    work = work_of(80)
    _, price = priced(work)
    result = simulate(work, price, slots(work, 3))
    np.testing.assert_allclose(result.busy_s[0] + result.stall_s.sum(), result.seconds, rtol=1e-9)
    assert result.load_wait_s <= result.stall_s.sum() + 1e-12


def test_running_in_parts_changes_nothing_without_loads_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = work_of(60)
    _, price = priced(work)
    whole = simulate(work, price, slots(work, 3))
    monkeypatch.setattr("moesim.offload.simulate._CELLS_AT_ONCE", 200)
    parts = simulate(work, price, slots(work, 3))
    np.testing.assert_allclose(parts.pass_s, whole.pass_s, rtol=1e-9)


def test_more_slots_a_faster_link_and_fewer_bits_never_slow_a_run() -> None:
    work = work_of(80)
    _, price = priced(work)
    by_slots = [simulate(work, price, slots(work, n)).seconds for n in (2, 4, 6, 8)]
    assert (np.diff(by_slots) <= 1e-12).all()
    box = load_box(BOX)
    by_link = [
        simulate(work, priced(work, replace(box, copy_bytes_per_s=rate))[1], slots(work, 3)).seconds
        for rate in (5e9, 20e9, 80e9)
    ]
    assert (np.diff(by_link) < 0).all()
    by_bits = [
        simulate(work, priced(work, form=Weights(bits))[1], slots(work, 3)).seconds
        for bits in (16, 8, 4.25)
    ]
    assert (np.diff(by_bits) < 0).all()


def test_the_cpu_beats_the_link_for_one_token_and_loses_for_many() -> None:
    few, many = work_of(60), work_of(2400, batch=600)
    for work, cpu_wins in ((few, True), (many, False)):
        _, price = priced(work)
        policy = OffloadPolicy(slots=np.full(work.n_layers, 2, np.int64))
        loaded = simulate(work, price, policy).seconds
        on_cpu = simulate(work, price, replace(policy, on_miss="cpu")).seconds
        assert (on_cpu < loaded) is cpu_wins


def test_splitting_by_time_is_never_far_from_the_better_side() -> None:
    for batch in (1, 16, 64):
        work = work_of(640, batch=batch)
        _, price = priced(work)
        policy = OffloadPolicy(slots=np.full(work.n_layers, 2, np.int64))
        seconds = {
            rule: simulate(work, price, replace(policy, on_miss=rule)).seconds
            for rule in ("load", "cpu", "hss")
        }
        assert seconds["hss"] <= 1.1 * min(seconds["load"], seconds["cpu"])


def test_prefetch_in_time_hides_loads_and_a_wrong_one_costs_bytes() -> None:
    work = work_of(150)
    fast = replace(load_box(BOX), copy_bytes_per_s=4e12, dram_bytes_per_s=8e12)
    _, price = priced(work, fast)
    plain = simulate(work, price, slots(work, 4))
    told = simulate(work, price, slots(work, 4), oracle(work, 1.0))
    misled = simulate(work, price, slots(work, 4), oracle(work, 0.0))
    assert told.hit_rate > 0.99
    assert told.stall_s.sum() < 0.2 * plain.stall_s.sum()
    assert misled.bytes_per_token > plain.bytes_per_token
    assert misled.wasted > 0


def test_a_hit_that_arrives_late_still_stalls() -> None:
    work = work_of(100)
    slow = replace(load_box(BOX), copy_bytes_per_s=2e9)
    _, price = priced(work, slow)
    told = simulate(work, price, slots(work, 4), oracle(work, 1.0))
    assert told.hit_rate > 0.99
    assert told.stall_s.sum() > 0.5 * told.seconds


def test_what_host_memory_cannot_hold_is_read_from_the_drive() -> None:
    work = work_of(100)
    box = load_box(BOX, drive="nvme-gen4")
    _, price = priced(work, box)
    all_in, half = work.n_objects, work.n_objects // 2
    warm = simulate(work, price, slots(work, 2), host_slots=all_in)
    cold = simulate(work, price, slots(work, 2), host_slots=half)
    assert warm.seconds < cold.seconds
    assert cold.busy_s[3] > 0 == warm.busy_s[3]
    decided = decide_built_in(work, slots(work, 2))
    extras = cold_reads(work, decided, all_in)
    assert extras.load_cold is not None
    assert not extras.load_cold.any()


def test_experts_on_a_drive_need_one() -> None:
    work = work_of(20)
    _, price = priced(work)
    with pytest.raises(SimulationError, match="no drive"):
        simulate(work, price, slots(work, 2), host_slots=20)


def test_demand_overtakes_loads_ahead_that_have_not_started() -> None:
    # Wrong predictions queue on a slow link; with a queue of one kind they would block every miss.
    work = work_of(120)
    slow = replace(load_box(BOX), copy_bytes_per_s=5e9)
    _, price = priced(work, slow)
    plain = simulate(work, price, slots(work, 3))
    misled = simulate(work, price, slots(work, 3), oracle(work, 0.2))
    loads_s = price.expert_bytes / 5e9
    # A miss waits for at most the one load ahead that is on the link already.
    assert misled.seconds <= plain.seconds + (misled.loads + misled.loads_ahead) * loads_s
    assert misled.dropped > 0


def test_a_drive_tier_of_one_expert_reads_every_change() -> None:
    work = work_of(20)
    decided = decide_built_in(work, slots(work, 2))
    cold = cold_reads(work, decided, 1).load_cold
    assert cold is not None
    before = np.r_[0, decided.loads.object[:-1]]
    np.testing.assert_array_equal(cold, decided.loads.object != before)


def test_two_gpus_by_tensor_halve_what_each_copies_and_by_layers_do_not() -> None:
    work = work_of(60)
    box = load_box("rtx-4090x4-xeon-6454s", n_devices=2)
    one = simulate(work, priced(work, replace(box, n_devices=1))[1], slots(work, 2)).seconds
    tensor = simulate(work, priced(work, box)[1], slots(work, 2)).seconds
    layers = simulate(work, priced(work, box, Weights(split="layers"))[1], slots(work, 2)).seconds
    assert 0.45 * one < tensor < 0.75 * one
    assert layers == pytest.approx(one, rel=0.05)


def test_pim_takes_small_experts_and_never_slows_the_layer() -> None:
    from hwmodels.devices import load_device

    work = work_of(640, batch=32)
    spec, price = priced(work, "h100x4")
    warm = np.ones(work.n_objects, np.bool_)
    policy = OffloadPolicy(slots=np.full(work.n_layers, 8, np.int64), warm=warm)
    decided = decide_built_in(work, policy)
    unit = (load_device("duplex-logic-pim"), 5)
    moved, extras = with_pim(work, decided, price, spec, unit)
    small = work.tokens[moved.place != decided.place]
    assert len(small)
    assert small.mean() < work.tokens.mean()
    plain, beside = run(work, decided, price), run(work, moved, price, extras)
    assert beside.seconds < plain.seconds


def test_joules_grow_with_bytes_and_stay_between_idle_and_board_power() -> None:
    work = work_of(60)
    spec, price = priced(work)
    per_token = {}
    for n in (2, 6):
        decided = decide_built_in(work, slots(work, n))
        result = run(work, decided, price)
        joules = joules_of(spec, price, work, decided, result)
        per_token[n] = joules
        device = price.box.device
        assert joules.device_j_per_token <= device.tdp_w * result.seconds / 60
        assert joules.device_j_per_token >= 0.1 * device.tdp_w * result.seconds / 60
    assert per_token[6].copies_j_per_token < per_token[2].copies_j_per_token
    assert per_token[6].total_j_per_token < per_token[2].total_j_per_token


def test_memory_that_is_short_is_named_with_the_amount() -> None:
    spec, box = load_model("mixtral-8x7b"), load_box(BOX)
    foot = footprint(spec, box, Weights(), 400_000)
    with pytest.raises(SimulationError, match=r"device memory is short by \d+\.\d+ GiB"):
        expert_room_bytes(box, foot)
    small = load_box(BOX, host_bytes=20 * 2**30)
    with pytest.raises(SimulationError, match="host memory is short by .* no drive"):
        check_below(small, footprint(spec, small, Weights(), 0), 0)
    on_drive = load_box(BOX, drive="nvme-gen4", host_bytes=20 * 2**30)
    held = check_below(on_drive, footprint(spec, on_drive, Weights(), 0), 0)
    assert held == 20 * 2**30 // footprint(spec, box, Weights(), 0).expert_bytes


def test_kv_cache_and_experts_compete_for_one_memory() -> None:
    spec, box = load_model("mixtral-8x7b"), load_box(BOX)
    rooms = [
        expert_room_bytes(box, footprint(spec, box, Weights(4.25), tokens))
        for tokens in (0, 8192, 65536)
    ]
    assert (np.diff(rooms) < 0).all()
    assert rooms[0] - rooms[1] == pytest.approx(8192 * 131072, rel=1e-6)


def test_a_device_without_a_link_to_the_host_is_refused() -> None:
    with pytest.raises(HardwareError, match="has no link"):
        replace(load_box(BOX), copy_bytes_per_s=0.0)


def test_unified_memory_needs_no_copies() -> None:
    box = load_box("jetson-agx-orin")
    assert box.unified


def test_a_trace_of_another_model_is_refused() -> None:
    with pytest.raises(SimulationError, match="has 8 experts, top-2; gpt-oss-20b has 32, top-4"):
        priced(work_of(10), model="gpt-oss-20b")
