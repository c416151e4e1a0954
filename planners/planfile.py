"""The plan file: the neutral plan as JSON with a schema version, read and written whole.

Per absolute layer it holds what the layer is and what its slots hold; beside it, the inputs with
their hashes, the figures of the plan and of every incumbent, the bound and the verdict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from planners.errors import PlanError
from planners.plan import Placement
from traces.files import write_text

_MOST_BYTES = 1 << 30
Count = Annotated[int, Field(gt=0, le=1 << 20)]


class Layer(BaseModel):
    """One decoder layer: dense, or MoE with the logical expert of every physical slot.

    slots  rank-major; tier and bits hold for all experts of the layer
    """

    model_config = ConfigDict(extra="forbid")

    layer: int = Field(ge=0)
    kind: Literal["dense", "moe"]
    slots: list[int] = []
    tier: str = "device"
    bits: float | None = None


class PlanFile(BaseModel):
    """A placement plan with everything needed to check it and to write an engine's file."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    kind: Literal["placement"] = "placement"
    model: str
    n_experts: Count
    top_k: Count
    expert_parallel_size: Count
    ranks_per_node: Count
    n_slots: Count
    layers: list[Layer]
    inputs: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    verdict: Literal["deploy", "not_worth_it"] | None = None
    versions: dict[str, str] = {}
    seed: int = 0

    @model_validator(mode="after")
    def _layers_fit(self) -> PlanFile:
        for index, layer in enumerate(self.layers):
            if layer.layer != index:
                raise ValueError(f"layers[{index}].layer is {layer.layer}, expected {index}")
            expected = self.n_slots if layer.kind == "moe" else 0
            if len(layer.slots) != expected:
                raise ValueError(
                    f"layers[{index}].slots has {len(layer.slots)} entries, expected {expected}"
                )
        if not any(layer.kind == "moe" for layer in self.layers):
            raise ValueError("layers holds no moe layer")
        return self

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Absolute indices of the MoE layers."""
        return tuple(layer.layer for layer in self.layers if layer.kind == "moe")

    def placement(self) -> Placement:
        """The placement of the MoE layers; PlanError when it is not a valid one."""
        slots = [layer.slots for layer in self.layers if layer.kind == "moe"]
        return Placement(
            np.array(slots, dtype=np.int32),
            self.n_experts,
            self.expert_parallel_size,
            self.ranks_per_node,
        )


def layers_of(placement: Placement, moe_layers: tuple[int, ...], n_layers: int) -> list[Layer]:
    """Every decoder layer of the model, dense ones without slots."""
    rows = dict(zip(moe_layers, placement.physical_to_logical_map.tolist(), strict=True))
    return [
        Layer(layer=index, kind="moe" if index in rows else "dense", slots=rows.get(index, []))
        for index in range(n_layers)
    ]


def read_plan(path: Path) -> PlanFile:
    """A plan file; PlanError names the file, the field and what was expected."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise PlanError(f"{path}: {path.stat().st_size} bytes, expected at most {_MOST_BYTES}")
        plan = PlanFile.model_validate_json(path.read_bytes())
        plan.placement()
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise PlanError(f"{path}: {field}: {first['msg']}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    return plan


def write_plan(plan: PlanFile, path: Path) -> None:
    """Write a plan file."""
    write_text(path, plan.model_dump_json(indent=1) + "\n")
