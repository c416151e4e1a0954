"""Collectives: expert-parallel all-to-all by bytes per rank and link; all-reduce and its halves.

The all-to-all is a law of three constants. What a rank sends and receives on each link is the
caller's count (`planners/dispatch.py` counts it from the routing itself).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from hwmodels.cost import Cost, Work
from hwmodels.errors import HardwareError
from hwmodels.system import System

AllToAllKernel = Literal["low_latency", "normal"]
RingOp = Literal["all_reduce", "all_gather", "reduce_scatter"]
Bytes = npt.NDArray[np.float64]

# Software seconds of an all-to-all beside the link's own latency: (inside a node, across nodes).
# Set so that DeepEP's published H800 figures lie within 20 % (kind: derived); the normal
# kernels first tell every rank the sizes to come, the low-latency ones do not.
ALL_TO_ALL_BASE_S: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"low_latency": (15e-6, 25e-6), "normal": (30e-6, 60e-6)}
)
# Share of the achievable link rate that an all-to-all keeps: DeepEP on H800, EP16 to EP64, moves
# 43 to 46 GB/s of real NIC traffic on links that reach 48.
ALL_TO_ALL_SHARE = 0.94
# Ring collectives, NCCL 2.27 on H100 at 512 bytes: 15.5 us for 14 hops, 10.3 us for 7.
RING_BASE_S = 5e-6
RING_HOP_S = 0.75e-6


@dataclass(frozen=True, slots=True)
class AllToAllLaw:
    """Seconds of one all-to-all: latency_s + most bytes of a rank on a link * seconds per byte.

    up_s_per_byte   in-node link, one direction, per rank
    out_s_per_byte  link to other nodes, one direction, per rank
    """

    latency_s: float
    up_s_per_byte: float
    out_s_per_byte: float


def all_to_all_law(system: System, kernel: AllToAllKernel = "low_latency") -> AllToAllLaw:
    """The law of a system; a system of one device has no latency.

    kernel  "low_latency" (decode: sizes not announced) or "normal" (prefill: sizes first)
    raises  HardwareError for an unknown kernel
    source  DeepEP's published points on H800 (EP8 to EP256) lie within 20 % of this law, see
            tests/hwmodels/test_collective.py. On H100, normal kernels over exactly two nodes take
            up to 40 % longer: the kernel, not a link, limits them there.
    """
    if kernel not in ALL_TO_ALL_BASE_S:
        known = ", ".join(sorted(ALL_TO_ALL_BASE_S))
        raise HardwareError(f"all-to-all kernel {kernel!r} is unknown, known: {known}")
    up_base_s, out_base_s = ALL_TO_ALL_BASE_S[kernel]
    if system.n_devices == 1:
        latency_s = 0.0
    elif system.n_nodes == 1:
        latency_s = up_base_s + system.scale_up.latency_s
    else:
        latency_s = max(
            out_base_s + system.scale_out.latency_s, up_base_s + system.scale_up.latency_s
        )
    return AllToAllLaw(
        latency_s,
        1 / (system.scale_up.bytes_per_s * ALL_TO_ALL_SHARE),
        1 / (system.scale_out.bytes_per_s * ALL_TO_ALL_SHARE),
    )


def rank_seconds(
    law: AllToAllLaw, up_send: Bytes, up_recv: Bytes, out_send: Bytes, out_recv: Bytes
) -> Bytes:
    """Seconds each rank is busy in an all-to-all; both links and both directions run at once.

    up_send, up_recv    float64[..., ranks] bytes over the in-node link, forwarded ones included
    out_send, out_recv  float64[..., ranks] bytes over the link to other nodes
    returns             float64[..., ranks], latency + the rank's busier link
    """
    up = np.maximum(up_send, up_recv) * law.up_s_per_byte
    out = np.maximum(out_send, out_recv) * law.out_s_per_byte
    return np.asarray(law.latency_s + np.maximum(up, out))


def all_to_all_seconds(
    law: AllToAllLaw, up_send: Bytes, up_recv: Bytes, out_send: Bytes, out_recv: Bytes
) -> Bytes:
    """float64[...]: seconds of each all-to-all, those of its slowest rank; see rank_seconds."""
    return np.asarray(rank_seconds(law, up_send, up_recv, out_send, out_recv).max(axis=-1))


def ring_collective(system: System, op: RingOp, n_bytes: Work, group: int) -> Cost:
    """All-reduce, all-gather or reduce-scatter over consecutive ranks, no in-switch reduction.

    n_bytes  size of the full buffer on every rank (of the gathered result for all_gather)
    group    number of ranks, starting at a node boundary when larger than a node
    returns  base + hops * hop latency + share of the buffer / rate of the slowest ring edge; a ring
             across nodes runs one lane per NIC, so a node's NICs add up, capped by the in-node link
    source   textbook ring: 2 (g-1) hops and 2 (g-1)/g of the buffer for all_reduce, half for the
             others; constants from NCCL on H100. Short of medium sizes (around 2 MB) by a third.
    """
    if not 1 <= group <= system.n_devices:
        raise HardwareError(f"group={group} must be in 1..{system.n_devices} of {system.name}")
    size = np.asarray(n_bytes, dtype=np.float64)
    if group == 1:
        zero = np.zeros_like(size)
        return Cost(zero, zero.copy(), zero.copy(), zero.copy())
    rounds = 2 if op == "all_reduce" else 1
    rate, energy = system.scale_up.bytes_per_s, system.scale_up.energy_j_per_byte
    hop_s = rounds * (group - 1) * RING_HOP_S
    if group > system.devices_per_node:
        rate = min(rate, system.scale_out.bytes_per_s * system.devices_per_node)
        hop_s += rounds * (group // system.devices_per_node) * system.scale_out.latency_s
    moved = rounds * (group - 1) / group * size
    seconds = np.where(size > 0, RING_BASE_S + hop_s + moved / rate, 0.0)
    return Cost(seconds, moved * energy, moved, np.zeros_like(size))
