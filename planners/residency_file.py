"""The residency plan as JSON: which tier holds each expert, at how many bits, and what moves.

Per absolute layer it holds the tier of the attention weights and, on MoE layers, the tier and bits
of every expert; beside it the cache that serves the rest, the inputs with their hashes, the
figures of the plan and of every incumbent, the bound and the verdict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from planners.errors import PlanError
from traces.files import write_text

_MOST_BYTES = 1 << 30
Count = Annotated[int, Field(gt=0, le=1 << 20)]


class TierEntry(BaseModel):
    """One memory of the machine, fastest first.

    kind            "device" (GPU memory), "host" (DRAM), "disk" (NVMe), "pim"
    capacity_bytes  what the plan may use of it
    used_bytes      what the plan uses: weights, slots of the cache, KV share
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: Literal["device", "host", "disk", "pim"]
    capacity_bytes: int = Field(ge=0)
    used_bytes: int = Field(default=0, ge=0)


class CacheEntry(BaseModel):
    """The cache of experts in the fastest tier, beside the pinned ones.

    slots   free slots of every MoE layer (per_layer) or one number (global)
    policy  name of an eviction policy; "" for none: experts stay where the plan puts them
    """

    model_config = ConfigDict(extra="forbid")

    scope: Literal["per_layer", "global"] = "per_layer"
    slots: list[int] = []
    policy: str = ""
    prefetch: str = ""
    on_miss: Literal["load", "cpu", "split"] = "load"


class ResidentLayer(BaseModel):
    """One decoder layer: where its attention lives, and on a MoE layer each expert's tier and bits.

    expert_tier  index into the plan's tiers for every logical expert; [] on dense layers
    expert_bits  bits per weight of every expert (16, 8, 4.25, ...); [] on dense layers
    load         share of the layer's activations that each expert got on the planned part
    """

    model_config = ConfigDict(extra="forbid")

    layer: int = Field(ge=0)
    kind: Literal["dense", "moe"]
    attention_tier: int = Field(default=0, ge=0)
    expert_tier: list[int] = []
    expert_bits: list[float] = []
    load: list[float] = []


class ResidencyFile(BaseModel):
    """A residency plan with everything needed to check it and to write an engine's file.

    expert_bytes  one routed expert at the most bits that any expert of the plan has
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    kind: Literal["residency"] = "residency"
    model: str
    n_experts: Count
    top_k: Count
    expert_bytes: Annotated[int, Field(gt=0)]
    tiers: list[TierEntry]
    layers: list[ResidentLayer]
    cache: CacheEntry = CacheEntry()
    kv_bytes: int = Field(default=0, ge=0)
    inputs: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    verdict: Literal["deploy", "not_worth_it"] | None = None
    versions: dict[str, str] = {}
    seed: int = 0

    @model_validator(mode="after")
    def _layers_fit(self) -> ResidencyFile:
        if not self.tiers:
            raise ValueError("tiers is empty, expected at least one")
        for index, layer in enumerate(self.layers):
            _check_layer(self, index, layer)
        if not any(layer.kind == "moe" for layer in self.layers):
            raise ValueError("layers holds no moe layer")
        given, wanted = len(self.cache.slots), len(self.moe_layers)
        if self.cache.scope == "per_layer" and given not in (0, wanted):
            raise ValueError(
                f"cache.slots has {given} entries, expected one for each of {wanted} MoE layers"
            )
        return self

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Absolute indices of the MoE layers."""
        return tuple(layer.layer for layer in self.layers if layer.kind == "moe")

    def expert_tiers(self) -> npt.NDArray[np.int64]:
        """int64[moe_layers, n_experts]: tier index of every expert."""
        return np.array([row.expert_tier for row in self.layers if row.kind == "moe"], np.int64)

    def loads(self) -> npt.NDArray[np.float64]:
        """float64[moe_layers, n_experts]: share of each layer's activations, zeros when unknown."""
        rows = [row.load or [0.0] * self.n_experts for row in self.layers if row.kind == "moe"]
        return np.array(rows, dtype=np.float64)


def _check_layer(plan: ResidencyFile, index: int, layer: ResidentLayer) -> None:
    if layer.layer != index:
        raise ValueError(f"layers[{index}].layer is {layer.layer}, expected {index}")
    expected = plan.n_experts if layer.kind == "moe" else 0
    for field in ("expert_tier", "expert_bits"):
        if len(getattr(layer, field)) != expected:
            raise ValueError(
                f"layers[{index}].{field} has {len(getattr(layer, field))} entries,"
                f" expected {expected}"
            )
    if layer.load and len(layer.load) != expected:
        raise ValueError(f"layers[{index}].load has {len(layer.load)} entries, expected {expected}")
    highest = max([layer.attention_tier, *layer.expert_tier])
    if highest >= len(plan.tiers) or min(layer.expert_tier, default=0) < 0:
        raise ValueError(f"layers[{index}] names tier {highest}, expected 0..{len(plan.tiers) - 1}")
    if any(not 0 < bits <= 32 for bits in layer.expert_bits):
        raise ValueError(f"layers[{index}].expert_bits must be in (0, 32]")


def read_residency(path: Path) -> ResidencyFile:
    """A residency plan file; PlanError names the file, the field and what was expected."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise PlanError(f"{path}: {path.stat().st_size} bytes, expected at most {_MOST_BYTES}")
        return ResidencyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise PlanError(f"{path}: {field}: {first['msg']}") from error


def write_residency(plan: ResidencyFile, path: Path) -> None:
    """Write a residency plan file."""
    write_text(path, plan.model_dump_json(indent=1) + "\n")
