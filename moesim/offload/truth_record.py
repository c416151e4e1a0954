"""What the runtime in `kernels/offload` hands back, checked where it comes in."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moesim.errors import SimulationError
from moesim.lower.runtime import Parts

COMPONENTS = (
    "dense_s", "dense_after_reads_s", "dense_beside_s", "expert_s", "expert_read_s",
    "expert_beside_s", "read_s", "read_next_s", "read_beside_s", "handoff_s",
)  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Strict):
    """Seconds of something done n times; `middle` is what to add up."""

    median: float
    middle: float
    p10: float
    p90: float
    n: int


class Costs(_Strict):
    """Seconds of the parts of a step; what each of them is stands in `kernels/offload`."""

    expert_bytes: int
    read_s: Spread
    read_next_s: Spread
    read_beside_s: Spread
    handoff_s: Spread
    dense_s: Spread
    dense_after_reads_s: Spread
    dense_beside_s: Spread
    expert_s: Spread
    expert_beside_s: Spread
    expert_read_s: Spread
    loop_s: dict[str, Spread]
    expert_tokens_s: dict[str, Spread]
    read_bytes_s: dict[str, Spread]

    def parts(self) -> Parts:
        """The part of it that predictions are made of."""
        of_name = {name: getattr(self, name).middle for name in COMPONENTS}
        loops = {f"loop_{name}_s": self.loop_s[name].middle for name in ("inline", "background")}
        return Parts(**of_name, **loops)


class PolicyRecord(_Strict):
    """What was measured under one policy, of the tokens after the warm-up.

    A number for each token, or [tokens][layers] where it is decided, or [rounds][tokens].
    """

    hit_rate: float
    buffer_bytes: int
    step_s: list[float]
    stall_s: list[float]
    busy_s: list[float]
    robbed_s: list[float]
    late: list[float]
    dropped: list[float]
    bytes_read: list[float]
    round_step_s: list[list[float]]
    round_robbed_s: list[list[float]]
    hits: list[list[int]]
    misses: list[list[int]]
    prefetched: list[list[int]]

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """One of the fields as an array."""
        return np.array(getattr(self, name), np.float64)


class Record(_Strict):
    """A whole run of the runtime, all policies with the same tokens.

    calm_share    of a step: what other programs may have taken of it, for it to count as calm
    same_outputs  whether all runs computed the same, bit for bit
    """

    format: Literal[1] = Field(alias="schema")
    tier: str
    slots: int
    warm_up: int
    rounds: int
    chunk: int
    n_tokens: int
    calm_share: float
    same_outputs: bool
    costs: Costs
    policies: dict[str, PolicyRecord]
    environment: dict[str, Any]
    stack: dict[str, Any]


def read_record(document: object) -> Record:
    """The record in a JSON document; SimulationError names the first field that does not fit."""
    try:
        return Record.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SimulationError(f"record of the runtime: {where}: {first['msg']}") from error
