"""What is measured on a CPU: the points of every operator, most informative first."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KIB, MIB = 1 << 10, 1 << 20
ROWS = (1, 64, 8, 2, 32, 4, 16)
MATRICES = ((2048, 768), (768, 2048), (4096, 2048), (2048, 2048), (1408, 2048), (1024, 4096))
WEIGHTS = ("bf16", "int8", "fp32", "int4")
EXPERTS = ((2048, 768, 32, 4), (1024, 512, 32, 8), (2048, 1408, 16, 2), (1536, 512, 24, 4))
TOKENS = (1, 64, 8, 24, 3)
LOADS = ("balanced", "power_law_1.2", "captured")
STREAM_BYTES = (128 * MIB, 64 * MIB, 256 * MIB, 96 * MIB, 192 * MIB, 80 * MIB)
BLOCK_BYTES = (4 * KIB, 16 * MIB, 1 * MIB, 64 * KIB, 4 * MIB, 256 * KIB, 16 * KIB, 64 * MIB)
DEPTHS = (1, 32, 8, 4, 16, 2)
MOST_IN_FLIGHT_BYTES = 128 * MIB
MESSAGE_BYTES = tuple(KIB << shift for shift in (0, 16, 10, 13, 7, 4, 14, 12, 8, 2, 15, 11, 6))


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to measure; the three mappings go into its row as they are.

    shape    sizes in elements, bytes or counts, and `threads` on a CPU
    dtype    `w` of the weights or the moved data, `a` of the activations, `group` of the scales
    routing  `dist` and `seed` where tokens choose experts
    kernel   which of several implementations, "" where there is one
    """

    op: str
    shape: Mapping[str, int | str]
    dtype: Mapping[str, int | str] = field(default_factory=dict)
    routing: Mapping[str, int | str] = field(default_factory=dict)
    kernel: str = ""

    def key(self, device: str) -> str:
        """Name of the point on a device, the same in every run; 16 hexadecimal digits.

        device  `timing.place`: with other software it is another device
        """
        parts = [self.op, dict(self.shape), dict(self.dtype), dict(self.routing), device]
        parts += [self.kernel] * bool(self.kernel)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def ladder(*dimensions: Sequence[object]) -> list[tuple[object, ...]]:
    """All combinations; those that are early in every dimension come first."""
    places = itertools.product(*(range(len(dimension)) for dimension in dimensions))
    ordered = sorted(places, key=lambda place: (sum(place), place))
    return [tuple(d[i] for d, i in zip(dimensions, place, strict=True)) for place in ordered]


def thread_counts() -> tuple[int, ...]:
    """All cores first, then one, then the powers of two between."""
    cores = len(os.sched_getaffinity(0))
    between = [1 << shift for shift in range(1, cores.bit_length()) if 1 << shift < cores]
    return tuple(dict.fromkeys((cores, 1, *reversed(between))))


def cpu_points() -> dict[str, list[Point]]:
    """The points of every operator by its name, most informative first."""
    return {
        "cpu_gemv": _products((1,)),
        "cpu_gemm": _products(ROWS[1:]),
        "cpu_experts": _experts(),
        "stream": _streams(),
        "nvme_read": _reads(),
        "all_to_all": [
            Point("all_to_all", {"bytes": size, "ranks": 2, "split": split}, {"w": "uint8"})
            for size, split in ladder(MESSAGE_BYTES, ("even", "uneven"))
        ],
    }


def alternating(*lists: Sequence[Any]) -> list[Any]:
    """All items so that every list is equally far along at any place."""
    placed = [
        ((index + 1) / len(items), place, item)
        for place, items in enumerate(lists)
        for index, item in enumerate(items)
    ]
    return [item for _, _, item in sorted(placed, key=lambda of: of[:2])]


def interleaved(points: Mapping[str, Sequence[Point]]) -> list[Point]:
    """All points so that, wherever the time ends, every operator is equally far along."""
    return alternating(*points.values())


def weight_dtype(name: str) -> dict[str, int | str]:
    """The `dtype` of a row: weights below 16 bits go with bf16 activations."""
    activation = name if name == "fp32" else "bf16"
    return {"w": name, "a": activation} | ({"group": 128} if name == "int4" else {})


def _products(rows: Sequence[int]) -> list[Point]:
    return [
        Point(
            "cpu_gemv" if m == 1 else "cpu_gemm",
            {"m": m, "n": n, "k": k, "threads": threads},
            weight_dtype(dtype),
        )
        for dtype, threads, m, (n, k) in ladder(WEIGHTS, thread_counts(), rows, MATRICES)
    ]


def _experts() -> list[Point]:
    """The loop in every load and dtype, and beside it one call for all experts."""
    loops = ladder(TOKENS, EXPERTS, thread_counts(), LOADS, ("fp32", "bf16"), ("",))
    grouped = ladder(
        TOKENS, EXPERTS, thread_counts()[:1], LOADS[:1], ("bf16",), ("torch_grouped_mm",)
    )
    return [
        Point(
            "cpu_experts",
            {
                "tokens": tokens, "hidden": hidden, "inter": inter, "experts": experts,
                "topk": topk, "tp": 1, "ep": 1, "threads": threads,
            },
            weight_dtype(dtype),
            {"dist": load, "seed": 0},
            kernel,
        )
        for tokens, (hidden, inter, experts, topk), threads, load, dtype, kernel in alternating(
            loops, grouped
        )
    ]  # fmt: skip


def _streams() -> list[Point]:
    return [
        Point("stream", {"bytes": size, "kind": kind, "threads": threads}, {"w": "fp32"})
        for size, kind, threads in ladder(STREAM_BYTES, ("triad", "copy"), thread_counts())
    ]


def _reads() -> list[Point]:
    return [
        Point("nvme_read", {"block_bytes": block, "depth": depth}, {"w": "uint8"})
        for block, depth in ladder(BLOCK_BYTES, DEPTHS)
        if block * depth <= MOST_IN_FLIGHT_BYTES
    ]
