"""The routed experts of one layer on one rank, as a function of the tokens of each expert.

A kernel reads the weights of every expert that has a token, computes in tiles that a few tokens do
not fill, and moves activations: of its own copies, and in most engines also of all slots of
the batch (top_k per token), be their expert here or on another rank.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hwmodels.device import Device
from hwmodels.errors import HardwareError
from hwmodels.fitted.gemm import up
from hwmodels.fitted.parts import Floats, Parts, Work, checked, chip, log2, peak

ROUTED = ("copies", "distinct", "max_load", "padded_16", "padded_32", "padded_64", "padded_128",
          "concentration")  # fmt: skip
COLUMNS = (
    "tokens", "hidden", "intermediate", "top_k", "experts", "local_experts", "weight_bits",
    "activation_bits", "matrices", *ROUTED,
)  # fmt: skip
TILES = (16, 32, 64, 128)


def routed(counts: npt.NDArray[np.integer]) -> dict[str, Floats]:
    """The columns ROUTED of rows of per-expert token counts int[n, local_experts].

    copies         token copies of the rank
    distinct       experts with a token; max_load, tokens of the busiest
    padded_t       copies when each expert's list is padded to whole tiles of t rows
    concentration  tokens of the expert of a copy, averaged over copies
    raises         HardwareError for negative counts or another number of dimensions
    """
    loads = np.asarray(counts)
    if loads.ndim != 2 or loads.shape[1] == 0 or (loads < 0).any():
        raise HardwareError(f"counts: shape {loads.shape}, expected [n, local_experts], all >= 0")
    loads = loads.astype(np.float64)
    copies = loads.sum(axis=1)
    found = {"copies": copies, "distinct": (loads > 0).sum(axis=1) * 1.0}
    found["max_load"] = loads.max(axis=1)
    found |= {f"padded_{tile}": up(loads, tile).sum(axis=1) for tile in TILES}
    found["concentration"] = (loads**2).sum(axis=1) / np.maximum(copies, 1)
    return found


def parts(device: Device, work: Work) -> Parts:
    """The parts of each layer; work has COLUMNS, all of one length.

    tokens         of the batch, over all ranks that share the experts
    intermediate   width of one expert on this rank, after tensor parallelism
    experts, local_experts  routed experts of the layer, and those held here
    matrices       3 with a gate, 2 without
    raises         HardwareError for a column that is missing, negative or of another length, and
                   for counts that cannot be
    """
    c = checked("experts", work, COLUMNS)
    _check_counts(c)
    has, memory = chip(device), chip(device).memory_bytes_per_s
    rate = peak(device, c["activation_bits"])
    hidden, inter, copies, slots = (
        c["hidden"],
        c["intermediate"],
        c["copies"],
        c["tokens"] * c["top_k"],
    )
    params = hidden * inter * c["matrices"]
    weights = c["distinct"] * params * c["weight_bits"] / 8
    touched = weights + copies * (hidden + inter) * 2
    cached = has.cached_share(touched)
    per_copy_s = 2 * params / rate
    pad_64, pad_128 = up(inter, 64) / inter, up(inter, 128) / inter
    cycle = 1 / has.clock_hz
    slots_s = slots * (hidden + inter) * 2 / memory
    exact_s = per_copy_s * copies
    return Parts(
        {
            "memory": weights * (1 - cached) / memory,
            "cache": weights * cached / memory,
            "ragged": weights * (pad_64 - 1) / memory,
        },
        {
            "arithmetic": exact_s,
            "tiles_16": per_copy_s * c["padded_16"] * pad_64,
            "tiles_64": per_copy_s * c["padded_64"] * pad_64,
            "tiles_128": per_copy_s * c["padded_128"] * pad_128,
        },
        {
            "tokens": c["tokens"] * hidden * 2 / memory,
            "slots_hidden": slots * hidden * 2 / memory,
            "slots_inner": slots * inter * 2 / memory,
            "copies_hidden": copies * hidden * 2 / memory,
            "copies_inner": copies * inter * 2 / memory,
            "slots": slots * cycle,
            "experts": c["experts"] * cycle,
            "distinct": c["distinct"] * cycle,
            "depth": (hidden + inter) * cycle,
        },
        _shape(c, slots)
        | {
            "pad_inner_64": pad_64,
            "pad_inner_128": pad_128,
            "odd_inner": (inter % 16 != 0) * 1.0,
            "weights": log2(weights / memory + 1e-9),
            "arithmetic": log2(exact_s + 1e-9),
            "intensity": log2(exact_s + 1e-9)
            - log2((weights + copies * hidden * 4) / memory + 1e-9),
            "cache": log2(touched / has.l2_bytes),
            "slots_share": log2(slots_s) - log2(weights / memory + exact_s + 1e-9),
        },
    )


def _shape(c: Work, slots: Floats) -> dict[str, Floats]:
    copies = c["copies"]
    return {
        "tokens": log2(c["tokens"]), "copies": log2(copies + 0.1), "hidden": log2(c["hidden"]),
        "inner": log2(c["intermediate"]), "top_k": c["top_k"], "experts": log2(c["experts"]),
        "local": log2(c["local_experts"]), "distinct": log2(c["distinct"] + 0.1),
        "max_load": log2(c["max_load"] + 0.1), "matrices": c["matrices"],
        "per_expert": log2(copies / np.maximum(c["distinct"], 0.1) + 0.01),
        "pad_64": c["padded_64"] / np.maximum(copies, 1),
        "pad_128": c["padded_128"] / np.maximum(copies, 1),
        "tiles_64": log2(c["padded_64"] / 64 * np.ceil(c["intermediate"] / 64) + 1),
        "tiles_128": log2(c["padded_128"] / 128 * np.ceil(c["intermediate"] / 128) + 0.1),
        "concentration": log2(c["concentration"] + 0.1), "slots": log2(slots),
        "ranks": log2(c["experts"] / c["local_experts"]),
    }  # fmt: skip


def _check_counts(c: Work) -> None:
    """Counts that no routing gives are an error, not a price."""
    slots = c["tokens"] * c["top_k"]
    rules = (
        ("distinct", c["distinct"] > c["local_experts"], "local_experts"),
        ("distinct", c["distinct"] > c["copies"] + 1e-9, "copies"),
        ("copies", c["copies"] > slots * (1 + 1e-9), "tokens * top_k"),
        ("local_experts", c["local_experts"] > c["experts"], "experts"),
        ("max_load", c["max_load"] > c["copies"] * (1 + 1e-9), "copies"),
    )
    for name, broken, limit in rules:
        if broken.any():
            raise HardwareError(f"experts: {name}={c[name][broken][0]:g} is more than {limit}")
    for name in ("hidden", "intermediate", "experts", "local_experts"):
        if (c[name] <= 0).any():
            raise HardwareError(f"experts: {name}={c[name].min():g} must be > 0")
