"""Collectives of a library such as NCCL inside one node: bytes over the link, hops, protocols.

A library changes protocol as messages grow: small ones go with flags in every word, at low latency
and half the rate, large ones in blocks. Seen from outside, seconds over bytes rise steeply at
first and then at the link's rate; the parts `rise_*` are that: each adds its share up to a number
of bytes and nothing beyond.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from hwmodels.device import Device
from hwmodels.errors import HardwareError
from hwmodels.fitted.parts import Floats, Parts, Work, checked, log2

COLUMNS = ("message_bytes", "ranks", "element_bytes", "rounds")
# How often the buffer passes around: an all-reduce is a reduce-scatter, then an all-gather.
ROUNDS = MappingProxyType(
    {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "alltoall": 1.0}
)
HOP_S = 1e-6  # unit of a hop, not a claim: the fit scales it
RISES = (14, 20, 22, 25)  # log2 of the bytes up to which each rise adds
HOP_RISE = 15  # the same of the rise that every further rank adds


def parts(device: Device, work: Work) -> Parts:
    """The parts of each collective; work has COLUMNS, all of one length.

    message_bytes  of the full buffer on every rank: what is reduced, what all-gather ends with,
                   what all-to-all sends including the share that stays
    ranks          in one node; one rank moves nothing
    rounds         of ROUNDS
    raises         HardwareError for a column that is missing, negative or of another length,
                   ranks < 1, or a device without links
    """
    c = checked("collective", work, COLUMNS)
    for name in ("ranks", "element_bytes", "rounds"):
        if (c[name] < 1).any():
            raise HardwareError(f"collective: {name}={c[name].min():g} must be >= 1")
    rate, others = link_rate(device), c["ranks"] - 1
    wire = wire_bytes(c)
    memory = {"link": wire / rate}
    if not device.link_bytes_per_s:  # no switch: ranks share host bridges and each other's slots
        memory["shared"] = wire * c["ranks"] ** 2 / rate
    serial = {f"rise_{bits}": _rise(wire, bits) / rate for bits in RISES}
    serial["hop_rise"] = _rise(wire, HOP_RISE) * others / rate
    serial["elements"] = wire / c["element_bytes"] / rate
    return Parts(
        memory,
        {"hops": c["rounds"] * others * HOP_S},
        serial,
        {
            "message": log2(np.maximum(c["message_bytes"], 1)),
            "ranks": log2(c["ranks"]),
            "element": log2(c["element_bytes"]),
        },
    )


def wire_bytes(work: Work) -> Floats:
    """Bytes a rank sends in a ring or all-to-all: (g - 1) / g of the buffer in every round."""
    ranks = work["ranks"]
    return np.asarray(work["rounds"] * (ranks - 1) / ranks * work["message_bytes"])


def link_rate(device: Device) -> float:
    """Bytes/s between devices of a node, one direction; over the host where there is no link."""
    rate = device.link_bytes_per_s or device.host_link_bytes_per_s
    if not rate:
        raise HardwareError(f"device {device.name}: no link and no host link in the catalogue")
    return rate


def _rise(n_bytes: Floats, bits: int) -> Floats:
    """Bytes, of which no more than 2 ** bits count."""
    most = 2.0**bits
    return np.asarray(-most * np.expm1(-n_bytes / most))
