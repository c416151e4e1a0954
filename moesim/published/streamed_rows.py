"""Published runs with streamed weights (a table of end-to-end measurements) as runs of the model.

A row says hardware, model, lengths and, for part of them, the policy. What it does not say is
filled by rule: MTBench prompts are padded to their longest (418 tokens) unless the row says
"variable length"; FlexGen's MTBench policies on one GPU are those of the launch scripts in
MoE-Lightning's artifact; MoE-Lightning's policies come from our search. Rows whose batch nobody
published are refused with that reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moesim.errors import SimulationError
from moesim.reproduce.streamed_runs import (
    RunTime,
    flexgen_run,
    l4_box,
    lightning_run,
    t4_box,
    zero_run,
)
from planners.streamed import LayerShape, Lengths, StreamBox, StreamedPolicy, joined, layer_shape
from planners.streamed_policy import MemoryRules, best_policy
from traces.models import load_model

MTBENCH_LONGEST, MTBENCH_MEAN = 418.0, 77.0
# (GPU, generated tokens) to (micro-batch, micro-batches, share of weights on the GPU): launch
# scripts benchmarks/flexgen/{T4,L4}/mtbench_8x7b_*.sh of caoshiyi/artifacts.
FLEXGEN_MTBENCH: Mapping[tuple[str, int], tuple[int, int, float]] = MappingProxyType(
    {
        ("T4", 32): (32, 40, 0.07),
        ("T4", 64): (16, 78, 0.08),
        ("T4", 128): (8, 139, 0.08),
        ("T4", 256): (8, 113, 0.08),
        ("L4", 32): (64, 21, 0.12),
        ("L4", 64): (64, 20, 0.12),
        ("L4", 128): (64, 18, 0.12),
        ("L4", 256): (32, 30, 0.14),
    }
)
# The share for the HELM scenarios (helm_moe_8x7b_*.sh), whose batches the rows print.
_FLEXGEN_HELM: Mapping[str, float] = MappingProxyType({"T4": 0.07, "L4": 0.14})
_HARDWARE = re.compile(r"(\d)x (T4|L4)\b", re.ASCII)
_GENERATED = re.compile(r"\bgen (\d{1,5})\b", re.ASCII)
_IN_OUT = re.compile(r"(\d{1,6}) in / (\d{1,5}) out", re.ASCII)
_BATCH = re.compile(r"micro-batch (\d{1,5}), (?:(\d{1,5}) micro-batches|batch (\d{1,6}))", re.ASCII)
NO_BATCH = "the batch of this run was not published"


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """One published run: system without its version's additions, box, lengths and policy."""

    name: str
    system: str
    shape: LayerShape
    box: StreamBox
    n_gpus: int
    lengths: Lengths
    policy: StreamedPolicy


def read_row(row: Mapping[str, str]) -> StreamedRow | str:
    """A row of the table (columns as text) as a run, or why it cannot be one.

    raises  SimulationError naming the row and the field that is of no known form
    """
    hardware = _HARDWARE.search(row["hardware"])
    if hardware is None:
        raise SimulationError(f"{row['id']}: hardware={row['hardware']!r}, expected 'Nx T4|L4'")
    n_gpus, gpu = int(hardware[1]), hardware[2]
    box = l4_box() if gpu == "L4" else t4_box(n_gpus)
    shape = layer_shape(load_model(row["model"]))
    system = re.split(r"[,\s]", row["system_version"])[0].removesuffix("(p)")
    lengths = _row_lengths(row)
    place = (shape, joined(box, n_gpus, own_links=True), lengths, n_gpus)
    policy = _row_policy(row, system, gpu, place)
    if policy is None:
        return NO_BATCH
    return StreamedRow(row["id"], system, shape, place[1], n_gpus, lengths, policy)


def row_run(row: StreamedRow) -> RunTime:
    """Simulate the run of a row."""
    where = (row.shape, row.box, row.lengths)
    if row.system == "MoE-Lightning":
        return lightning_run(*where, row.policy, row.n_gpus)
    if row.system == "DeepSpeed-ZeRO":
        return zero_run(*where, int(row.policy.batch))
    return flexgen_run(*where, row.policy)


def _row_lengths(row: Mapping[str, str]) -> Lengths:
    given, generated = _IN_OUT.search(row["workload"]), _GENERATED.search(row["workload"])
    if given is not None:
        return Lengths(float(given[1]), float(given[2]))
    if generated is None:
        raise SimulationError(f"{row['id']}: workload={row['workload']!r}, expected lengths")
    mean = row["policy"] == "variable length"
    return Lengths(MTBENCH_MEAN if mean else MTBENCH_LONGEST, float(generated[1]))


def _row_policy(
    row: Mapping[str, str],
    system: str,
    gpu: str,
    place: tuple[LayerShape, StreamBox, Lengths, int],
) -> StreamedPolicy | None:
    shape, box, lengths, n_gpus = place
    printed = _BATCH.search(row["workload"])
    on_gpu = system in ("FlexGen", "DeepSpeed-ZeRO")
    known = FLEXGEN_MTBENCH.get((gpu, int(lengths.output)))
    if printed is not None:
        micro = int(printed[1])
        batch = int(printed[3]) if printed[3] else micro * int(printed[2])
        resident = 0.0
        if system.startswith("FlexGen") and "MoE-Lightning policy" not in row["system_version"]:
            is_mtbench = "MTBench" in row["workload"]
            resident = known[2] if known and is_mtbench else _FLEXGEN_HELM[gpu]
        return StreamedPolicy(batch, micro, on_gpu, weights_share=resident)
    if system == "MoE-Lightning":
        return best_policy(shape, box, lengths, MemoryRules(n_gpus=n_gpus)).policy
    if not system.startswith("FlexGen") or n_gpus > 1 or known is None:
        return None
    micro, count, resident = known
    return StreamedPolicy(micro * count, micro, on_gpu, weights_share=resident)
