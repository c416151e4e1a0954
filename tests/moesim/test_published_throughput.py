"""Predicted tokens/s of DeepSeek-V3/R1 beside published measurements, with the error stated.

The prediction knows no scheduler, no CPU time and no contention between overlapping kernels, and
takes balanced popularity; so it should lie above what was measured, by at most 40 %.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from hwmodels.device import Device, Link
from hwmodels.system import System
from moesim.lower.layer_costs import StepOptions
from moesim.simulate import Setting, simulate_counts
from planners.dispatch import Mode
from planners.plan import Placement
from tests.ep_examples import DEEPSEEK_V3, H800, NDR, NVLINK
from traces.routing import ExpertCounts

H100_LINK = Link("NVLink4", 370e9, 5e-6)
H200 = replace(H800, name="h200", memory_bytes_per_s=4.8e12)


@dataclass(frozen=True)
class Published:
    """Tokens per second and device."""

    source: str
    device: Device
    link: Link
    n_devices: int
    n_slots: int
    options: StepOptions
    tokens_per_s: float


def prefill(tokens: int, prompt: int, overlap: bool) -> StepOptions:
    return StepOptions(
        tokens, "prefill", prompt, two_batch_overlap=overlap, shared_overlap=overlap, mode="node"
    )


def decode(sequences: int, context: int) -> StepOptions:
    mode: Mode = "expert"
    return StepOptions(
        sequences, "decode", context, two_batch_overlap=True, shared_overlap=True, mode=mode
    )


SGLANG = "SGLang, 12 nodes of 8 H100, May 2025, EPLB with 32 redundant experts"
VLLM = "vLLM wide expert parallelism, H200, prefill of 2000 tokens, DeepEP high throughput"
PROFILE = "DeepSeek's published profiles, H800"
CASES = [
    Published(SGLANG, H800, H100_LINK, 32, 288, prefill(16384, 1024, True), 57674 / 8),
    Published(SGLANG, H800, H100_LINK, 32, 288, prefill(16384, 2048, True), 54543 / 8),
    Published(SGLANG, H800, H100_LINK, 32, 288, prefill(16384, 4096, True), 50302 / 8),
    Published(SGLANG, H800, H100_LINK, 72, 288, decode(256, 2100), 22282 / 8),
    Published(VLLM, H200, H100_LINK, 8, 256, prefill(16384, 2000, False), 6500),
    Published(VLLM, H200, H100_LINK, 16, 256, prefill(16384, 2000, False), 7000),
    Published(VLLM, H200, H100_LINK, 32, 256, prefill(16384, 2000, False), 5100),
    Published(PROFILE, H800, NVLINK, 32, 288, prefill(16384, 4096, True), 7839),
    Published(PROFILE, H800, NVLINK, 128, 256, decode(128, 4096), 2325),
]


def predicted_tokens_per_s(case: Published) -> float:
    """Per device, on uniform popularity."""
    n = case.n_devices
    system = System(case.device.name, case.device, n, 8, case.link, NDR)
    slots = np.tile(np.arange(case.n_slots, dtype=np.int32) % 256, (58, 1))
    counts = ExpertCounts(np.ones((58, 256)), DEEPSEEK_V3.moe_layers, 8)
    setting = Setting(DEEPSEEK_V3, system, case.options)
    return simulate_counts(counts, Placement(slots, 256, n, 8), setting, 1, 0).tokens_per_s / n


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.device.name}x{c.n_devices}")
def test_throughput_is_at_most_40_percent_above_what_was_published(case: Published) -> None:
    error = predicted_tokens_per_s(case) / case.tokens_per_s - 1
    assert -0.05 < error < 0.40, case.source
