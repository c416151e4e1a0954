"""Experts of one layer split between two units that share their memory: a GPU and PIM in its HBM.

The GPU (xPU) has the arithmetic, the processing-in-memory side (PIM) the bandwidth. `unit_seconds`
is the time of an expert with n tokens on either; `co_processing_split` decides, layer-step by
layer-step, which experts the PIM side computes while the GPU computes the others. Both are pure
functions of arrays; `split_cells` is the same rule for layer-steps of unequal length.

The rule (Duplex, arXiv 2409.01141, section V-B): all experts begin on the GPU; in order of their
tokens, fewest first, experts move to the PIM side one by one while the later of the two finishes
earlier than before. Experts without a token cost nothing and are never moved.

No split is better while the GPU's time does not depend on the tokens (a Mixtral expert on an H100:
up to 295); beyond, up to 2000 tokens, the best of all splits of 8 experts was at most 8 % faster in
20,000 random draws. Where one unit's time has no order in the tokens, loads over a slow link for
instance, the rule can be far off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hwmodels.cost import ExpertShape
from hwmodels.device import Device
from planners.errors import PlanError
from traces.compiled import compiled

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Counts = int | npt.NDArray[np.int64] | npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class UnitRates:
    """What one unit can do with the weights in its memory.

    bytes_per_s  of weights read by the unit
    flop_per_s   of the multiplication, a multiply-add counted as two
    fixed_s      of every expert with a token (a launch, a command), 0 for none
    """

    bytes_per_s: float
    flop_per_s: float
    fixed_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.bytes_per_s > 0 and self.flop_per_s > 0 and self.fixed_s >= 0):
            raise PlanError(
                f"unit: bytes_per_s={self.bytes_per_s} and flop_per_s={self.flop_per_s} must be"
                f" > 0, fixed_s={self.fixed_s} >= 0"
            )


@dataclass(frozen=True, slots=True)
class Split:
    """Where the experts of each layer-step run, and how long each unit is busy with them.

    on_pim  bool[steps, experts]; an expert without a token is False
    xpu_s   float64[steps], pim_s float64[steps]
    """

    on_pim: Flags
    xpu_s: Floats
    pim_s: Floats

    @property
    def makespan_s(self) -> Floats:
        """float64[steps]: when both units have finished."""
        return np.maximum(self.xpu_s, self.pim_s)


def device_rates(
    device: Device, n_devices: int = 1, dtype: str = "fp16", fixed_s: float = 0.0
) -> UnitRates:
    """Nominal rates of n equal devices that share every expert (the stacks of a GPU: 5).

    raises  HardwareError for a dtype the device has no peak for
    """
    return UnitRates(
        n_devices * device.memory_bytes_per_s, n_devices * device.peak_flop_per_s(dtype), fixed_s
    )


def unit_seconds(
    unit: UnitRates, shape: ExpertShape, tokens: Counts, weight_bits: float = 16
) -> Floats:
    """Seconds of one expert on a unit, for each number of tokens: float64 of the same shape.

    weight_bits  bits stored per weight
    returns      fixed_s + max(weight bytes / bytes_per_s, 2 * weights * tokens / flop_per_s),
                 0 without tokens; activations are left out, as in the paper
    source       arXiv 2409.01141: an FP16 expert with n tokens has n operations a byte
    """
    count = np.asarray(tokens, dtype=np.float64)
    if (count < 0).any():
        raise PlanError(f"tokens={count.min():g}, expected >= 0")
    read_s = shape.n_params * weight_bits / 8 / unit.bytes_per_s
    busy_s = np.maximum(read_s, 2.0 * shape.n_params * count / unit.flop_per_s)
    return np.asarray(np.where(count > 0, unit.fixed_s + busy_s, 0.0))


def pim_seconds(
    stack: Device, n_stacks: int, shape: ExpertShape, tokens: Counts, weight_bits: float = 16
) -> Floats:
    """`unit_seconds` on the PIM stacks of one GPU, from the catalogue's figures of one stack."""
    return unit_seconds(device_rates(stack, n_stacks), shape, tokens, weight_bits)


def ridge_tokens(unit: UnitRates, weight_bits: float = 16) -> float:
    """Tokens from which an expert is bound by arithmetic; in 16 bits, the unit's FLOP a byte."""
    return unit.flop_per_s / unit.bytes_per_s * weight_bits / 16


def crossover_tokens(xpu: UnitRates, pim: UnitRates, weight_bits: float = 16) -> float:
    """Tokens up to which an expert is faster on the PIM side, fixed seconds left out.

    returns  inf where it always is, 0 where it never is
    """
    if pim.bytes_per_s <= xpu.bytes_per_s:
        return 0.0
    if pim.flop_per_s >= xpu.flop_per_s:
        return float("inf")
    return pim.flop_per_s / xpu.bytes_per_s * weight_bits / 16


def co_processing_split(
    counts: npt.NDArray[np.int64] | npt.NDArray[np.int32],
    xpu_table: Floats,
    pim_table: Floats,
    space: Longs | None = None,
) -> Split:
    """Split the experts of many layer-steps by the rule at the top of this file.

    counts     int[steps, experts], tokens of each expert
    xpu_table  float64[most + 1], seconds of an expert with 0..most tokens on the GPU, whatever
               they include (`unit_seconds(unit, shape, np.arange(most + 1))`, or measured)
    pim_table  the same on the PIM side
    space      int64[experts], memory space of each expert: spaces then move whole, the one with
               the fewest tokens first, so that the two units never touch one at once; None lets
               every expert move for itself
    raises     PlanError for counts outside the tables or a space of another length
    source     arXiv 2409.01141, sections V-B and V-C
    """
    if counts.ndim != 2 or counts.dtype.kind not in "iu":
        raise PlanError(f"counts: {counts.dtype}{list(counts.shape)}, expected int[steps, experts]")
    most = min(len(xpu_table), len(pim_table)) - 1
    if counts.size and not (counts.min() >= 0 and counts.max() <= most):
        raise PlanError(f"counts={counts.min()}..{counts.max()}, expected 0..{most} as the tables")
    xpu_s, pim_s = xpu_table[counts] * (counts > 0), pim_table[counts] * (counts > 0)
    if space is None:
        on_pim = _split_rows(counts.astype(np.int64), xpu_s, pim_s)
    else:
        member = _membership(space, counts.shape[1])
        moved = _split_rows(counts @ member, xpu_s @ member, pim_s @ member)
        on_pim = moved[:, space] & (counts > 0)
    busy_pim_s = np.where(on_pim, pim_s, 0.0).sum(axis=1)
    return Split(on_pim, np.where(on_pim, 0.0, xpu_s).sum(axis=1), busy_pim_s)


def split_cells(start: Longs, tokens: Longs, xpu_s: Floats, pim_s: Floats) -> Flags:
    """The same rule for layer-steps with unequal numbers of experts, and any seconds.

    start    int64[steps + 1], where each layer-step's cells begin (`LayerSteps.start`)
    tokens   int64[cells], tokens of the cell's expert: the order in which cells move
    xpu_s    float64[cells], seconds of the cell's expert on the GPU, its load included where it
             has to be fetched; pim_s float64[cells] on the PIM side
    returns  bool[cells], True for the experts that the PIM side computes
    """
    on_pim = np.zeros(len(tokens), np.bool_)
    _move_cells(start, tokens, xpu_s, pim_s, on_pim)
    return on_pim


def _split_rows(counts: Longs, xpu_s: Floats, pim_s: Floats) -> Flags:
    n_steps, n_columns = counts.shape
    start = np.arange(n_steps + 1, dtype=np.int64) * n_columns
    flat = split_cells(start, counts.ravel(), xpu_s.ravel(), pim_s.ravel())
    return flat.reshape(counts.shape)


def _membership(space: Longs, n_experts: int) -> Longs:
    """int64[experts, spaces]: 1 where the expert lies in the space."""
    if space.shape != (n_experts,) or (n_experts and space.min() < 0):
        raise PlanError(f"space: {space.shape}, expected one id >= 0 for each of {n_experts}")
    member = space[:, None] == np.arange(space.max(initial=-1) + 1)
    return np.asarray(member, dtype=np.int64)


@compiled
def _move_cells(start: Longs, tokens: Longs, xpu_s: Floats, pim_s: Floats, on_pim: Flags) -> None:
    """Set on_pim; ties in tokens move in the order of the cells."""
    for step in range(len(start) - 1):
        first, last = start[step], start[step + 1]
        left, moved = 0.0, 0.0
        for cell in range(first, last):
            if tokens[cell] > 0:
                left += xpu_s[cell]
        for place in np.argsort(tokens[first:last], kind="mergesort"):
            cell = first + place
            if tokens[cell] == 0:
                continue
            without, more = left - xpu_s[cell], moved + pim_s[cell]
            if max(without, more) >= max(left, moved):
                break
            on_pim[cell] = True
            left, moved = without, more
