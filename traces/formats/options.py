"""ImportOptions: what the caller knows that a trace file may not say."""

from __future__ import annotations

from dataclasses import dataclass

from traces.model import ModelSpec


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the caller knows of a file; None where it must come from the file itself.

    model      the model that was captured; the file is held against it
    format     name of the format, a key of `detect.READERS`; None to detect it from the content
    n_experts  routed experts a layer, where the file does not say
    layers     absolute layer index of each captured layer, in place of what the file says
    """

    model: ModelSpec | None = None
    format: str | None = None
    n_experts: int | None = None
    layers: tuple[int, ...] | None = None
