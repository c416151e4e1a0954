"""Dense multiplication C[m, n] = A[m, k] B[k, n], B the weights; results in 16 bits."""

from __future__ import annotations

import numpy as np

from hwmodels.device import Device
from hwmodels.fitted.parts import Floats, Parts, Work, checked, chip, log2, peak

COLUMNS = ("m", "n", "k", "weight_bits", "activation_bits")
OUTPUT_BYTES = 2.0
TILE = 128


def parts(device: Device, work: Work) -> Parts:
    """The parts of each product; work has COLUMNS, sizes in elements, all of one length.

    raises  HardwareError for a column that is missing, negative or of another length
    """
    columns = checked("gemm", work, COLUMNS)
    m, n, k, weight_bits, activation_bits = (columns[name] for name in COLUMNS)
    has = chip(device)
    weights, operands, results = n * k * weight_bits / 8, m * k * activation_bits / 8, m * n * 2.0
    moved = weights + operands + results
    cached = has.cached_share(moved)
    rate = peak(device, activation_bits)
    exact_s = 2 * m * n * k / rate
    tiles = up(m, TILE) * up(n, TILE) / TILE**2 / has.multiprocessors
    waves_s = np.minimum(
        _waves(m, n, 128, has.multiprocessors), 1.15 * _waves(m, n, 64, has.multiprocessors)
    ) * (2 * k / rate)
    memory = has.memory_bytes_per_s
    return Parts(
        {"memory": moved * (1 - cached) / memory, "cache": moved * cached / memory},
        {"arithmetic": exact_s, "waves": waves_s},
        {
            "depth": k / has.clock_hz,
            "activations": (operands + results) / memory,
            "operands": m * k * 2 / memory,
        },
        {
            "m": log2(m), "n": log2(n), "k": log2(k), "cache": log2(moved / has.l2_bytes),
            "intensity": log2(exact_s) - log2(moved / memory), "tiles": log2(tiles),
            "last_wave": tiles % 1, "pad_m_64": up(m, 64) / m, "pad_m_128": up(m, 128) / m,
            "pad_n": up(n, TILE) / n, "odd_n_16": (n % 16 != 0) * 1.0,
            "odd_n_64": (n % 64 != 0) * 1.0, "odd_k": (k % 64 != 0) * 1.0,
            "waves": log2(waves_s) - log2(exact_s),
        },
    )  # fmt: skip


def up(values: Floats, step: int) -> Floats:
    """Values rounded up to whole steps."""
    return np.ceil(values / step) * step


def _waves(m: Floats, n: Floats, rows: int, multiprocessors: int) -> Floats:
    """Elements of C that whole waves of tiles of rows x TILE hold."""
    tiles = np.ceil(m / rows) * np.ceil(n / TILE)
    return np.asarray(np.ceil(tiles / multiprocessors) * multiprocessors * rows * TILE)
