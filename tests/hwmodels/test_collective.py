"""All-to-all against DeepEP's published points; laws of the ring collectives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hwmodels.collective import (
    all_to_all_law,
    all_to_all_seconds,
    rank_seconds,
    ring_collective,
)
from hwmodels.device import Link
from hwmodels.errors import HardwareError
from hwmodels.system import System
from planners.dispatch import DispatchCounts, dispatch_counts, source_ranks
from tests.ep_examples import contiguous, h800_system, random_topk

FP8_COPY, BF16_COPY = 7168 + 224, 2 * 7168
HEADER = 16  # bytes of routing metadata beside each low-latency copy

# DeepEP V1 on H800 with one 400 Gb/s NIC per device, hidden 7168, top-8, FP8 out and BF16 back.
LOW_LATENCY_US = {  # 128 tokens per rank: dispatch, combine
    8: (77, 114),
    16: (118, 195),
    32: (155, 273),
    64: (173, 314),
    128: (192, 369),
    256: (194, 360),
}
NORMAL_GB_PER_S = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}  # 4096 tokens


def mean_over_ranks(counts: DispatchCounts, scale: float) -> list[np.ndarray]:
    """Copies per rank when every rank carries the mean: what many repetitions measure."""
    sent = (counts.up_send, counts.up_recv, counts.out_send, counts.out_recv)
    return [np.broadcast_to(c.mean() * scale, c.shape) for c in sent]


@pytest.mark.parametrize("n_ranks", LOW_LATENCY_US)
def test_low_latency_all_to_all_is_within_20_percent_of_deepep(n_ranks: int) -> None:
    tokens = 16
    rng = np.random.default_rng(0)
    topk = random_topk(rng, (tokens * n_ranks, 1, 256), 8)
    source = source_ranks(len(topk), n_ranks)
    counts = dispatch_counts(topk, source, contiguous(1, 256, n_ranks), "expert")
    law = all_to_all_law(h800_system(n_ranks), "low_latency")
    for published_us, size in zip(
        LOW_LATENCY_US[n_ranks], (FP8_COPY + HEADER, BF16_COPY), strict=True
    ):
        sent = [copies * size for copies in mean_over_ranks(counts, 128 / tokens)]
        predicted = float(all_to_all_seconds(law, *sent)[0])
        assert predicted * 1e6 == pytest.approx(published_us, rel=0.20)


def grouped_topk(rng: np.random.Generator, n_tokens: int, n_nodes: int) -> np.ndarray:
    """Top-8 of 256 experts out of at most four of the groups, one group per node."""
    scores = rng.random((n_tokens, n_nodes, 256 // n_nodes))
    closed = np.argsort(rng.random((n_tokens, n_nodes)), axis=1)[:, 4:]
    scores[np.arange(n_tokens)[:, None], closed] = 2.0
    chosen = np.argpartition(scores.reshape(n_tokens, 256), 7, axis=1)[:, :8]
    return chosen[:, None, :].astype(np.int16)


@pytest.mark.parametrize("n_ranks", NORMAL_GB_PER_S)
def test_normal_all_to_all_is_within_20_percent_of_deepep(n_ranks: int) -> None:
    """DeepEP counts one copy per destination (node, or rank inside one node), the own included."""
    tokens, n_nodes = 512, n_ranks // 8
    topk = grouped_topk(np.random.default_rng(0), tokens * n_ranks, n_nodes)
    source = source_ranks(len(topk), n_ranks)
    counts = dispatch_counts(topk, source, contiguous(1, 256, n_ranks), "node")
    unit = topk[:, 0] // (256 // (n_nodes if n_nodes > 1 else n_ranks))
    copies = np.mean([len(np.unique(row)) for row in unit]) * 4096
    law = all_to_all_law(h800_system(n_ranks), "normal")
    for published, size in zip(NORMAL_GB_PER_S[n_ranks], (FP8_COPY, BF16_COPY), strict=True):
        sent = [c * size for c in mean_over_ranks(counts, 4096 / tokens)]
        seconds = float(all_to_all_seconds(law, *sent)[0])
        assert copies * size / seconds / 1e9 == pytest.approx(published, rel=0.20)


def test_low_latency_all_to_all_on_h100_is_within_its_stated_error(
    shared: Path,
) -> None:
    rows = pd.read_parquet(shared / "measured" / "calibration-deepep_ll.parquet")
    rows = rows[(rows.hidden_size == 7168) & (rows.num_topk == 8) & (rows.num_experts == 256)]
    device = h800_system(8).device
    errors = []
    for row in rows.itertuples():
        n = row.node_num * 8
        nvlink, ndr = Link("NVLink4", 370e9, 5e-6), Link("NDR", 48e9, 0.6e-6)
        law = all_to_all_law(System("h100", device, n, 8, nvlink, ndr), "low_latency")
        up, out = row.num_token * 8 * 7 / n, row.num_token * 8 * (n - 8) / n
        for size, measured in (
            (FP8_COPY + HEADER, row.dispatch_avg_t_us),
            (BF16_COPY, row.combine_avg_t_us),
        ):
            per_rank = [np.full(n, c * size) for c in (up, up, out, out)]
            errors.append(float(all_to_all_seconds(law, *per_rank)) * 1e6 / measured - 1)
    assert len(errors) > 80
    assert np.median(np.abs(errors)) < 0.15


def test_one_device_pays_no_all_to_all() -> None:
    law = all_to_all_law(h800_system(1))
    assert float(all_to_all_seconds(law, *[np.zeros(1)] * 4)) == 0.0


def test_the_busiest_rank_and_link_set_the_time() -> None:
    law = all_to_all_law(h800_system(16))
    up = np.array([0.0, 9e6, 1e6])
    out = np.array([1e6, 0.0, 0.0])
    none = np.zeros(3)
    seconds = float(all_to_all_seconds(law, up, none, none, out))
    assert seconds == law.latency_s + max(9e6 * law.up_s_per_byte, 1e6 * law.out_s_per_byte)
    assert seconds == rank_seconds(law, up, none, none, out).max()


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(HardwareError, match="low_latency, normal"):
        all_to_all_law(h800_system(8), "fast")  # type: ignore[arg-type]


def test_all_reduce_is_a_reduce_scatter_and_an_all_gather_but_for_one_start() -> None:
    system = h800_system(16)
    for group in (2, 8, 16):
        whole = ring_collective(system, "all_reduce", 1e8, group)
        half = ring_collective(system, "all_gather", 1e8, group)
        other = ring_collective(system, "reduce_scatter", 1e8, group)
        assert float(whole.bytes) == pytest.approx(float(half.bytes + other.bytes))
        assert float(whole.seconds) == pytest.approx(float(half.seconds + other.seconds), abs=6e-6)


def test_ring_collectives_meet_nccl_on_h100_within_their_stated_error(
    shared: Path,
) -> None:
    rows = pd.read_parquet(shared / "measured" / "calibration-nccl.parquet")
    rows = rows[(rows.hw == "h100_sxm") & (rows.nccl_dtype == "half") & (rows.num_gpus == 8)]
    nvlink = Link("NVLink4", 370e9, 5e-6)
    system = System("h100x8", h800_system(8).device, 8, 8, nvlink, nvlink)
    for op, bound in (("all_reduce", 0.20), ("all_gather", 0.25), ("reduce_scatter", 0.20)):
        part = rows[rows.op_name == op]
        predicted = ring_collective(system, op, part.bytes.to_numpy(), 8).seconds  # type: ignore[arg-type]
        errors = np.abs(predicted / (part.latency_ms.to_numpy() * 1e-3) - 1)
        assert np.median(errors) < bound, op


def test_groups_of_one_cost_nothing_and_too_large_ones_are_refused() -> None:
    system = h800_system(8)
    assert float(ring_collective(system, "all_reduce", 1e6, 1).seconds) == 0.0
    with pytest.raises(HardwareError, match="group=9"):
        ring_collective(system, "all_reduce", 1e6, 9)
