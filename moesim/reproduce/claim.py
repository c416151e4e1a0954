"""Claim: one published figure beside the simulated one, and whether it falls inside its band."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moesim.errors import SimulationError

Tier = Literal["A", "B", "C"]
Verdict = Literal["inside", "outside", "shown"]


@dataclass(frozen=True, slots=True)
class Claim:
    """One figure of one system.

    system      name of the file it comes from, with hyphens ("pre-gated-moe")
    claim       what is claimed, with its unit, as a reader would say it
    published   the figure in the paper, None where the paper prints none
    simulated   the same figure here
    low, high   band that counts as reproduced, None and None for a figure that is shown only
                (such as the claim against a stronger baseline)
    tier        A: an identity, exact; B: calibrated replay of a captured trace of the model;
                C: trend, from a synthetic trace or with a guessed constant
    convention  whose rules the figure follows: "paper", "code", "execution order", ...
    note        what a reader must know: assumed constants, which trace, a weak baseline
    """

    system: str
    claim: str
    published: float | None
    simulated: float
    low: float | None
    high: float | None
    tier: Tier
    convention: str
    note: str = ""

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise SimulationError(
                f"claim {self.system}: low={self.low} and high={self.high}, expected both or none"
            )
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise SimulationError(f"claim {self.system}: low={self.low} is above high={self.high}")

    @property
    def inside(self) -> bool | None:
        """Whether the simulated figure falls inside the band; None for a figure shown only."""
        if self.low is None or self.high is None:
            return None
        return bool(math.isfinite(self.simulated) and self.low <= self.simulated <= self.high)

    @property
    def verdict(self) -> Verdict:
        """The same as a word."""
        return {True: "inside", False: "outside", None: "shown"}[self.inside]  # type: ignore[return-value]
