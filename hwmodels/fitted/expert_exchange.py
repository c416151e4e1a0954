"""Dispatch and combine of expert parallelism with DeepEP's kernels, by token copies on each link.

The low-latency kernels send one copy of a token to each of its experts and work in one block per
group of experts; the normal ones send one copy to each rank that holds any of them, on
a chosen number of multiprocessors. Copies that arrive lie in a buffer first and pass through
device memory again: written out for the experts, or summed into tokens.
"""

from __future__ import annotations

import numpy as np

from hwmodels.device import Device
from hwmodels.devices import load_link
from hwmodels.errors import HardwareError
from hwmodels.fitted.collectives import link_rate
from hwmodels.fitted.parts import Floats, Parts, Work, checked, chip, log2

COLUMNS = (
    "tokens", "hidden", "top_k", "experts", "ranks", "nodes", "multiprocessors", "element_bits",
    "sums", "copies", "node_copies",
)  # fmt: skip
FP8_BITS = 8.25  # with a 4-byte scale for every 128 elements
TURN_S = 1e-6  # units of what one multiprocessor does for one token; the fit scales them
MULTIPROCESSOR_BYTES_PER_S = 10e9
FIRST_TOKENS = 4.0  # of a multiprocessor, while its queue fills


def distinct(groups: Floats, top_k: Floats, experts: Floats) -> Floats:
    """Expected groups that top_k different experts, uniformly chosen, fall into, float64[n].

    groups   of equally many experts: ranks, or nodes
    returns  groups * (1 - C(experts - size, top_k) / C(experts, top_k)), size = experts / groups
    """
    size, missed = experts / groups, np.ones(np.broadcast(groups, top_k, experts).shape)
    for pick in range(int(np.max(top_k, initial=0))):
        left = np.maximum(experts - size - pick, 0) / np.maximum(experts - pick, 1)
        missed = np.where(pick < top_k, missed * left, missed)
    return np.asarray(groups * (1 - missed))


def deduplicated_copies(work: Work) -> dict[str, Floats]:
    """Columns copies and node_copies of the normal kernels under uniform routing.

    work     tokens of a rank, top_k, experts, ranks, nodes: float64[n]
    returns  copies, token copies to other ranks, one to each; node_copies, to other nodes
    """
    tokens, top_k, experts = work["tokens"], work["top_k"], work["experts"]
    ranks, nodes = work["ranks"], work["nodes"]
    return {
        "copies": tokens * distinct(ranks, top_k, experts) * (ranks - 1) / ranks,
        "node_copies": tokens * distinct(nodes, top_k, experts) * (nodes - 1) / nodes,
    }


def single_copies(work: Work) -> dict[str, Floats]:
    """As `deduplicated_copies`, of the low-latency kernels: a copy for every expert."""
    slots, ranks, nodes = work["tokens"] * work["top_k"], work["ranks"], work["nodes"]
    return {
        "copies": slots * (ranks - 1) / ranks,
        "node_copies": slots * (nodes - 1) / nodes,
    }


def low_latency_parts(device: Device, work: Work) -> Parts:
    """The parts of each exchange by the low-latency kernels; work has COLUMNS, of one rank.

    tokens           of the rank, before any copy
    multiprocessors  not used: the kernels take what the number of experts asks for
    element_bits     on the wire, scales included: FP8_BITS, or 16
    sums             1 for combine, which sums the copies of a token; 0 for dispatch
    copies           of tokens sent to other ranks; node_copies, those of them to other nodes
    raises           HardwareError for columns that are missing, negative or cannot be
    """
    c = checked("exchange_low_latency", work, COLUMNS)
    _check_copies("exchange_low_latency", c, c["top_k"])
    has, vector = chip(device), c["hidden"] * c["element_bits"] / 8
    groups = np.ceil(c["experts"] / has.multiprocessors)
    blocks = np.ceil(c["experts"] / groups)
    turns, slots = np.ceil(c["tokens"] / blocks), c["tokens"] * c["top_k"]
    turn_bytes_s = turns * vector / MULTIPROCESSOR_BYTES_PER_S
    return Parts(
        _links(device, c, vector, (c["copies"] - c["node_copies"], slots)),
        {"turns": turns * TURN_S, "turn_bytes": turn_bytes_s, "sums": turn_bytes_s * c["top_k"]},
        {
            "experts": c["experts"] / has.clock_hz,
            "groups": groups * TURN_S,
            "first_copies": np.minimum(slots, c["experts"]) * vector / has.memory_bytes_per_s,
        },
        _shape(c, vector) | {"blocks": blocks, "turns": log2(turns)},
    )


def normal_parts(device: Device, work: Work) -> Parts:
    """The parts of each exchange by the normal kernels; work has COLUMNS, as above.

    multiprocessors  that the kernel was given; half of them send, half receive
    copies           of tokens sent to other ranks, one to each; node_copies, to other nodes, one
                     to each
    """
    c = checked("exchange_normal", work, COLUMNS)
    _check_copies("exchange_normal", c, np.minimum(c["top_k"], c["ranks"] - 1))
    if (c["multiprocessors"] < 1).any():
        raise HardwareError("exchange_normal: multiprocessors=0 must be >= 1")
    vector, mine = c["hidden"] * c["element_bits"] / 8, c["multiprocessors"]
    arrived = c["copies"] * c["ranks"] / np.maximum(c["ranks"] - 1, 1)
    each, tokens = arrived / mine, c["tokens"] / mine
    return Parts(
        _links(device, c, vector, (c["copies"], arrived)),
        {
            "copies": each * TURN_S / 10,
            "copy_bytes": each * vector / MULTIPROCESSOR_BYTES_PER_S,
            "token_bytes": tokens * vector / MULTIPROCESSOR_BYTES_PER_S,
        },
        {
            "first_tokens": -np.expm1(-tokens / FIRST_TOKENS) * TURN_S,
            "first_copies": -np.expm1(-each / FIRST_TOKENS) * TURN_S,
            "channels": mine * TURN_S / 10,
            "experts": c["experts"] / chip(device).clock_hz,
        },
        _shape(c, vector)
        | {
            "multiprocessors": mine,
            "each": log2(each + 0.01),
            "per_token": log2(arrived + 0.01) - log2(c["tokens"] + 0.01),
        },
    )


def _links(
    device: Device, c: Work, vector: Floats, copies: tuple[Floats, Floats]
) -> dict[str, Floats]:
    """Time on the links; copies: sent inside the node, and arrived at the rank from anywhere.

    What arrives passes through device memory once the link is done with it, at rates in
    proportion to both: one part, so that a device with other memory is priced right.
    """
    inside, arrived = copies
    passed = arrived + np.where(c["sums"] > 0, c["tokens"], arrived)
    away = load_link(device.scale_out).bytes_per_s if (c["nodes"] > 1).any() else np.inf
    return {
        "exchange": vector * (inside / link_rate(device) + passed / device.memory_bytes_per_s),
        "away": vector * c["node_copies"] / away,
    }


def _shape(c: Work, vector: Floats) -> dict[str, Floats]:
    return {
        "tokens": log2(c["tokens"]), "hidden": log2(c["hidden"]), "top_k": log2(c["top_k"]),
        "experts": log2(c["experts"]), "ranks": log2(c["ranks"]), "nodes": log2(c["nodes"]),
        "element": log2(c["element_bits"]), "bytes": log2(c["copies"] * vector + 1),
    }  # fmt: skip


def _check_copies(family: str, c: Work, most: Floats) -> None:
    """Copies that no routing gives are an error, not a price; most, of one token."""
    for name in ("hidden", "top_k", "experts", "ranks", "nodes", "element_bits"):
        if (c[name] < 1).any():
            raise HardwareError(f"{family}: {name}={c[name].min():g} must be >= 1")
    rules = (
        ("copies", c["tokens"] * most, "tokens reach on other ranks"),
        ("node_copies", c["copies"], "copies"),
        ("top_k", c["experts"], "experts"),
        ("nodes", c["ranks"], "ranks"),
    )
    for name, limit, of in rules:
        over = c[name] > limit * (1 + 1e-9)
        if over.any():
            raise HardwareError(f"{family}: {name}={c[name][over][0]:g} is more than {of}")
