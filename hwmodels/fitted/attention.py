"""Attention with keys and values per head (multi-head, grouped-query): decode steps and prefill."""

from __future__ import annotations

import numpy as np

from hwmodels.device import Device
from hwmodels.fitted.parts import Chip, Floats, Parts, Work, checked, chip, log2, peak

COLUMNS = (
    "batch", "new_tokens", "cached_tokens", "heads", "kv_heads", "head_dim", "window",
    "kv_bits", "activation_bits",
)  # fmt: skip
ROWS = 128  # queries of one prefill tile
NO_WINDOW = 1e12


def decode_parts(device: Device, work: Work) -> Parts:
    """One new token a sequence; new_tokens is not used, work has COLUMNS.

    cached_tokens  of each sequence, the new one included; window  0 for none
    """
    c = _columns(work)
    has, seen = chip(device), np.minimum(c["cached_tokens"], c["window"])
    sequences, heads, kv_heads, width = c["batch"], c["heads"], c["kv_heads"], c["head_dim"]
    cache = sequences * seen * kv_heads * width * 2 * c["kv_bits"] / 8
    flops = 4 * sequences * heads * seen * width
    # The query heads of one KV head share tiles of 16 rows, filled or not.
    tiled = 4 * sequences * kv_heads * np.ceil(heads / kv_heads / 16) * 16 * seen * width
    rate = peak(device, c["activation_bits"])
    io = sequences * heads * width * 4
    shape = _shape(c, has, cache + io, flops / rate) | blocks(sequences * kv_heads, has)
    return Parts(
        memory_of(has, cache + io),
        {"arithmetic": flops / rate, "tiles": tiled / rate},
        {
            "queries": io / has.memory_bytes_per_s,
            "sequences": sequences / has.clock_hz,
            "context": seen / has.clock_hz,
        },
        shape,
    )


def prefill_parts(device: Device, work: Work) -> Parts:
    """new_tokens of each sequence attend to themselves causally and to what is cached before.

    cached_tokens  of each sequence, the new ones included
    """
    c = _columns(work)
    has, new, cached, window = chip(device), c["new_tokens"], c["cached_tokens"], c["window"]
    sequences, heads, kv_heads, width = c["batch"], c["heads"], c["kv_heads"], c["head_dim"]
    whole = cached - new / 2
    narrow = np.maximum(window * (1 - window / (2 * np.maximum(new, 1))), window / 2)
    seen = np.where(cached <= window, whole, np.minimum(whole, narrow))
    flops = 4 * sequences * heads * new * seen * width
    io = sequences * new * heads * width * 4
    moved = sequences * cached * kv_heads * width * 2 * c["kv_bits"] / 8 + io
    return tiled_prefill(device, _shape(c, has, moved, flops / peak(device, c["activation_bits"])),
                         (c, moved, io, flops))  # fmt: skip


def tiled_prefill(
    device: Device, shape: dict[str, Floats], of: tuple[Work, Floats, Floats, Floats]
) -> Parts:
    """Parts of a prefill in tiles of ROWS queries; of: columns, bytes, io bytes, flops."""
    c, moved, io, flops = of
    has, rate = chip(device), peak(device, c["activation_bits"])
    tiles = c["batch"] * c["heads"] * np.ceil(c["new_tokens"] / ROWS)
    waves = np.ceil(tiles / has.multiprocessors) * has.multiprocessors
    return Parts(
        memory_of(has, moved),
        {"arithmetic": flops / rate, "waves": flops / rate * waves / np.maximum(tiles, 1)},
        {
            "queries": io / has.memory_bytes_per_s,
            "sequences": c["batch"] / has.clock_hz,
            "length": c["new_tokens"] / has.clock_hz,
        },
        shape | blocks(tiles, has),
    )


def _columns(work: Work) -> dict[str, Floats]:
    found = dict(checked("attention", work, COLUMNS))
    found["window"] = np.where(found["window"] > 0, found["window"], NO_WINDOW)
    return found


def memory_of(has: Chip, moved: Floats) -> dict[str, Floats]:
    """The memory parts of bytes that are moved once, cached or not."""
    cached, rate = has.cached_share(moved), has.memory_bytes_per_s
    return {"memory": moved * (1 - cached) / rate, "cache": moved * cached / rate}


def blocks(tiles: Floats, has: Chip) -> dict[str, Floats]:
    """Shape numbers of independent tiles: how many a multiprocessor gets, how full the last are."""
    filled = tiles / has.multiprocessors
    return {"blocks": log2(filled), "last_wave": filled % 1}


def _shape(c: Work, has: Chip, moved: Floats, compute_s: Floats) -> dict[str, Floats]:
    memory_s = moved / has.memory_bytes_per_s
    return {
        "batch": log2(c["batch"]), "new": log2(c["new_tokens"]), "cached": log2(c["cached_tokens"]),
        "heads": log2(c["heads"]), "kv_heads": log2(c["kv_heads"]),
        "group": log2(c["heads"] / c["kv_heads"]), "width": log2(c["head_dim"]),
        "window": log2(np.minimum(c["window"], 2.0**20)), "cache": log2(moved / has.l2_bytes),
        "intensity": log2(compute_s) - log2(memory_s), "arithmetic": log2(compute_s),
        "moved": log2(memory_s),
    }  # fmt: skip
