"""Nested (matryoshka) weights: one stored copy that can be read at several precisions.

The base is asymmetric integers; every further bit is a plane of signs with a scale of its own, so
a copy of 2 bits lies inside that of 3, which lies inside that of 4:

    W_3 = W_2 + s_3 Q_3,  W_4 = W_3 + s_4 Q_4,  Q in {-1, +1}

One store serves all precisions, and an upgrade moves only the planes that are missing. All
functions are counts of bytes; what a precision costs in quality is not their matter.
source: D2MoE (arXiv 2504.15299)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError
from traces.counting import total_params
from traces.model import ModelSpec

NOTHING = 0  # bits of a copy that is not there


@dataclass(frozen=True, slots=True)
class NestedFormat:
    """How weights are nested.

    base_bits, top_bits    bits of the base and of the widest copy; a plane for every bit between
    group                  neighbouring weights that share a scale
    scale_bits, zero_bits  stored once a group: a scale for the base and for every plane, a zero
                           point for the base alone. D2MoE prints the group of 128; 16 bits for
                           each of the two are assumed
    """

    base_bits: int = 2
    top_bits: int = 4
    group: int = 128
    scale_bits: int = 16
    zero_bits: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.base_bits <= self.top_bits <= 16:
            raise PlanError(
                f"nested bits {self.base_bits}..{self.top_bits}, expected 1 <= base <= top <= 16"
            )
        if self.group < 1 or min(self.scale_bits, self.zero_bits) < 0:
            raise PlanError(
                f"group={self.group}, scale_bits={self.scale_bits}, zero_bits={self.zero_bits}:"
                " expected a group of 1 or more and no negative bits"
            )

    @property
    def levels(self) -> tuple[int, ...]:
        """Precisions that can be read, lowest first."""
        return tuple(range(self.base_bits, self.top_bits + 1))


D2MOE = NestedFormat()


def nested_bytes(n_weights: int, bits: int, form: NestedFormat = D2MOE) -> int:
    """Bytes of a nested copy that is read at `bits`, scales included; 0 for NOTHING.

    raises  PlanError for bits that the format does not have, or a negative number of weights
    source  S bits / 16 + scales, S the size in 16 bits; a group that is not full has its scales
    """
    groups = _groups(n_weights, form)
    if bits == NOTHING:
        return 0
    if bits not in form.levels:
        known = ", ".join(map(str, form.levels))
        raise PlanError(f"a nested copy of {bits} bits, expected 0 for none, or one of {known}")
    base = n_weights * form.base_bits + groups * (form.scale_bits + form.zero_bits)
    plane = n_weights + groups * form.scale_bits
    return _bytes(base) + (bits - form.base_bits) * _bytes(plane)


def upgrade_bytes(n_weights: int, had: int, bits: int, form: NestedFormat = D2MOE) -> int:
    """Bytes to move so that a copy of `had` bits can be read at `bits`: the difference.

    raises  PlanError when that is no upgrade
    """
    if bits < had:
        raise PlanError(f"an upgrade from {had} to {bits} bits, expected at least as many")
    return nested_bytes(n_weights, bits, form) - nested_bytes(n_weights, had, form)


def plane_bytes(n_weights: int, form: NestedFormat = D2MOE) -> npt.NDArray[np.int64]:
    """int64[levels]: bytes of the base, then of every further plane; their sum is the whole."""
    below = (NOTHING, *form.levels)
    planes = [upgrade_bytes(n_weights, *step, form) for step in zip(below, below[1:], strict=False)]
    return np.array(planes, dtype=np.int64)


def separate_bytes(n_weights: int, bits: int, form: NestedFormat = D2MOE) -> int:
    """Bytes of a copy of its own at `bits`: asymmetric integers, one scale and zero a group."""
    if bits < 1:
        raise PlanError(f"a copy of {bits} bits, expected 1 or more")
    groups = _groups(n_weights, form)
    return _bytes(n_weights * bits + groups * (form.scale_bits + form.zero_bits))


@dataclass(frozen=True, slots=True)
class StoreBytes:
    """What a model takes when its experts can be read at every precision of a format.

    nested       experts nested, everything else once
    experts      experts in separate copies, everything else once
    models       separate models, everything else in each
    """

    nested: int
    experts: int
    models: int


def store_bytes(
    spec: ModelSpec, form: NestedFormat = D2MOE, dense_bits: int = 4, embedding_bits: int = 16
) -> StoreBytes:
    """Bytes of a whole model in the three ways.

    dense_bits      of attention and all else that is neither expert nor embedding, in groups too
    embedding_bits  of input and output embeddings, without scales
    """
    tables = spec.vocab_size * spec.hidden_size * (1 if spec.tied_embeddings else 2)
    n_experts = spec.n_moe_layers * spec.n_experts
    other = total_params(spec) - tables - n_experts * spec.expert_params
    rest = separate_bytes(other, dense_bits, form) + _bytes(tables * embedding_bits)
    nested = n_experts * nested_bytes(spec.expert_params, form.top_bits, form)
    copies = n_experts * sum(separate_bytes(spec.expert_params, b, form) for b in form.levels)
    return StoreBytes(nested + rest, copies + rest, copies + len(form.levels) * rest)


def _groups(n_weights: int, form: NestedFormat) -> int:
    if n_weights < 0:
        raise PlanError(f"n_weights={n_weights}, expected 0 or more")
    return -(-n_weights // form.group)


def _bytes(bits: int) -> int:
    """Whole bytes that hold so many bits."""
    return -(-bits // 8)
