"""Experts on a PIM unit in the device's own memory, beside the device (Duplex and its kin).

The PIM side reads the same stacks, so nothing moves: of the resident experts of every layer-step
those with few tokens go to it while the later of the two finishes earlier than before
(`planners/co_processing.py`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hwmodels.cost import ExpertShape
from hwmodels.device import Device
from moesim.lower.offload import Extras
from moesim.offload.decisions import NO_LOAD, ON_PIM, RESIDENT, Decisions
from moesim.offload.prices import Prices
from planners.co_processing import UnitRates, device_rates, split_cells, unit_seconds
from traces.layer_steps import LayerSteps
from traces.model import ModelSpec

DEFAULT_STACKS = 5
MEMORY_SHARE, COMPUTE_SHARE = 0.85, 0.80  # caps of scale-snu/attacc_simulator, as in the handbook


def with_pim(
    work: LayerSteps,
    decided: Decisions,
    prices: Prices,
    model: ModelSpec,
    unit: tuple[Device, int],
    weight_bits: float = 16.0,
) -> tuple[Decisions, Extras]:
    """The decisions with some resident experts on PIM, and what the lowering must know of it.

    unit  one PIM stack of the catalogue, and how many each device has
    """
    stack, n_stacks = unit
    shape = ExpertShape(model.hidden_size, model.expert_intermediate_size, model.ffn_matrices)
    tokens = np.arange(len(prices.gpu_s))
    on_all = n_stacks * prices.links
    nominal = device_rates(stack, on_all)
    reached = UnitRates(MEMORY_SHARE * nominal.bytes_per_s, COMPUTE_SHARE * nominal.flop_per_s)
    pim_s = unit_seconds(reached, shape, tokens, weight_bits)
    movable = (decided.place == RESIDENT) & (decided.load == NO_LOAD)
    xpu_cell_s, pim_cell_s = prices.gpu_s[work.tokens], pim_s[work.tokens]
    counts = work.tokens.astype(np.int64)
    moved = movable & split_cells(work.start, counts, xpu_cell_s, pim_cell_s)
    place = decided.place.copy()
    place[moved] = ON_PIM
    return replace(decided, place=place), Extras(pim_s=pim_s)
