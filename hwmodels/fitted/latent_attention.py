"""Multi-head latent attention (MLA): absorbed decode over latents, prefill over expanded heads."""

from __future__ import annotations

from hwmodels.device import Device
from hwmodels.fitted.attention import blocks, memory_of, tiled_prefill
from hwmodels.fitted.parts import Chip, Floats, Parts, Work, checked, chip, log2, peak

COLUMNS = (
    "batch", "new_tokens", "cached_tokens", "heads", "kv_rank", "rope_dim", "nope_dim", "v_dim",
    "kv_bits", "activation_bits", "tensor_parallel",
)  # fmt: skip


def decode_parts(device: Device, work: Work) -> Parts:
    """One new token a sequence, up-projections absorbed; work has COLUMNS.

    cached_tokens    of each sequence, the new one included
    tensor_parallel  ranks that share the heads; heads are those of one rank
    source           a latent and a rotary key a token; 2 (2 rank + rope) flops a head and token
    """
    c = checked("latent attention", work, COLUMNS)
    has, latent = chip(device), c["kv_rank"] + c["rope_dim"]
    cache = c["batch"] * c["cached_tokens"] * latent * c["kv_bits"] / 8
    flops = 2 * c["batch"] * c["heads"] * c["cached_tokens"] * (latent + c["kv_rank"])
    io = c["batch"] * c["heads"] * (latent + c["kv_rank"]) * 2
    compute_s = flops / peak(device, c["activation_bits"])
    return Parts(
        memory_of(has, cache + io),
        {"arithmetic": compute_s},
        {
            "queries": io / has.memory_bytes_per_s,
            "sequences": c["batch"] / has.clock_hz,
            "context": c["cached_tokens"] / has.clock_hz,
        },
        _shape(c, has, cache + io, compute_s) | blocks(c["batch"], has),
    )


def prefill_parts(device: Device, work: Work) -> Parts:
    """New tokens of each sequence, causally, keys and values expanded per head."""
    c = checked("latent attention", work, COLUMNS)
    has, widths = chip(device), c["nope_dim"] + c["rope_dim"] + c["v_dim"]
    seen = c["cached_tokens"] - c["new_tokens"] / 2
    flops = 2 * c["batch"] * c["heads"] * c["new_tokens"] * seen * widths
    io = c["batch"] * c["new_tokens"] * c["heads"] * widths * 2
    moved = c["batch"] * c["cached_tokens"] * c["heads"] * widths * 2 + io
    shape = _shape(c, has, moved, flops / peak(device, c["activation_bits"]))
    return tiled_prefill(device, shape, (c, moved, io, flops))


def _shape(c: Work, has: Chip, moved: Floats, compute_s: Floats) -> dict[str, Floats]:
    memory_s = moved / has.memory_bytes_per_s
    return {
        "batch": log2(c["batch"]), "new": log2(c["new_tokens"]), "cached": log2(c["cached_tokens"]),
        "heads": log2(c["heads"]), "ranks": c["tensor_parallel"],
        "cache": log2(moved / has.l2_bytes), "intensity": log2(compute_s) - log2(memory_s),
        "arithmetic": log2(compute_s), "moved": log2(memory_s),
    }  # fmt: skip
