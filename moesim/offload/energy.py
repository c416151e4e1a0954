"""Joules of an offloaded run: device, host and copies, from busy seconds and bytes.

    device  idle watts while it waits, ready watts while it works, plus its bytes and FLOPs
    host    the same for the CPU with its DRAM; DRAM read by copies is counted with the copies
    copies  link and DRAM energy of every byte loaded

Power states and energies are those of `hwmodels/energy.py` (kind: assumed for most devices).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwmodels.devices import load_component
from hwmodels.energy import ENERGY_SOURCES, EnergyModel, energy_model
from moesim.offload.decisions import LOADED, ON_CPU, RESIDENT, Decisions
from moesim.offload.prices import Prices
from moesim.offload.simulate import OffloadResult
from traces.counting import active_params
from traces.layer_steps import LayerSteps
from traces.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Joules:
    """Energy per token by part; nan where a board power is not known."""

    device_j_per_token: float
    host_j_per_token: float
    copies_j_per_token: float

    @property
    def total_j_per_token(self) -> float:
        """All parts."""
        return self.device_j_per_token + self.host_j_per_token + self.copies_j_per_token


def joules_of(
    model: ModelSpec, prices: Prices, work: LayerSteps, decided: Decisions, result: OffloadResult
) -> Joules:
    """Energy of a run, per token of its passes."""
    box, tokens = prices.box, float(result.pass_tokens.sum())
    copies = result.bytes_per_token * tokens
    on_device = int(np.isin(decided.place, (RESIDENT, LOADED)).sum())
    on_host = int((decided.place == ON_CPU).sum())
    share = work.n_layers / max(1, model.n_moe_layers)
    dense_params = (
        active_params(model) - model.n_moe_layers * model.top_k * model.expert_params
    ) * share
    device_bytes = on_device * prices.expert_bytes + work.passes.n_passes * dense_params * 2.0
    device_flops = 2.0 * (dense_params * tokens + on_device * model.expert_params)
    busy = float(result.busy_s[: prices.n_gpus].sum()) * prices.links
    device = _joules(
        energy_model(box.device), (busy, result.seconds * box.n_devices), device_bytes, device_flops
    )
    host_busy = float(result.busy_s[2 * prices.n_gpus])
    host = 0.0 if box.host is None else _joules(
        energy_model(box.host), (host_busy, result.seconds), on_host * prices.expert_bytes,
        2.0 * on_host * model.expert_params,
    )  # fmt: skip
    per_byte = _link_j_per_byte(prices) + ENERGY_SOURCES["dram.memory"].value
    return Joules(device / tokens, host / tokens, copies * per_byte / tokens)


def _joules(
    model: EnergyModel | None, seconds: tuple[float, float], n_bytes: float, flops: float
) -> float:
    """Joules of a unit that is busy for part of the time; seconds are (busy, in all)."""
    if model is None:
        return float("nan")
    busy, total = seconds
    moved = float(model.dynamic_j(np.array(n_bytes), np.array(flops), 16, 0.0))
    working = min(busy * model.ready_w + moved, busy * model.tdp_w)
    return working + max(0.0, total - busy) * model.idle_w


def _link_j_per_byte(prices: Prices) -> float:
    if prices.box.unified:
        return 0.0
    return load_component("pcie-energy").figures["energy.transfer"].value
