"""The last step of larger.py: a routing file to the trace, its provenance and the config."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from traces.data.encoded import RECORD, read_arrays
from traces.data.model import TinyMoe, TinyMoeConfig
from traces.data.provenance import Limits, write_files
from traces.errors import TraceError
from traces.routing import RoutingTrace

log = logging.getLogger(__name__)

_TYPES = {
    "topk": ("int16", 3),
    "weights": ("float16", 3),
    "request": ("int32", 1),
    "position": ("int32", 1),
    "phase": ("int8", 1),
    "domain": ("int16", 1),
    RECORD: ("uint8", 1),
}


class _Config(BaseModel):
    """TinyMoeConfig, with bounds that keep a strange file from asking for a huge model."""

    model_config = ConfigDict(extra="forbid", strict=True)

    vocab_size: int = Field(gt=0, le=2**20)
    hidden: int = Field(gt=0, le=2**16)
    n_layers: int = Field(gt=0, le=1024)
    n_heads: int = Field(gt=0, le=1024)
    n_experts: int = Field(gt=0, le=4096)
    top_k: int = Field(gt=0, le=4096)
    expert_hidden: int = Field(gt=0, le=2**16)
    rope_theta: float
    norm_eps: float


class _Record(BaseModel):
    """What the training machine says of a routing file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=64)
    config: _Config
    positions: int = Field(gt=0)
    domains: list[str] = Field(min_length=1)
    torch: str
    device: str
    corpus: dict[str, Any]
    training: dict[str, Any]
    capture: dict[str, Any]


def finish(routing: Path, out: Path, trace_bytes: float) -> None:
    """Write NAME.parquet, NAME.json and NAME-config.json of a routing file into a folder.

    trace_bytes  a larger trace is written without its gate weights
    raises       TraceError for a file that is not one of `train`, before anything is written
    """
    arrays, values = read_arrays(routing, _TYPES)
    try:
        record = _Record.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise TraceError(f"{routing}: record: field {field}: {first['msg']}") from error
    trace, domains = _trace(routing, arrays, record)
    with torch.device("meta"):  # parameters are counted, none is made
        model = TinyMoe(TinyMoeConfig(**record.config.model_dump()))
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "made_by": "python -m traces.data.larger",
        "torch": record.torch,
        "device": record.device,
        "corpus": record.corpus,
        "training": record.training,
        "capture": record.capture,
    }
    limits = Limits(round(trace_bytes), record.positions)
    write_files(out, record.name, model, (trace, domains), document, limits)
    log.info("%s: %d tokens", out / f"{record.name}.parquet", trace.n_tokens)


def _trace(
    path: Path, arrays: dict[str, np.ndarray], record: _Record
) -> tuple[RoutingTrace, list[str]]:
    """The trace and the domain of each request, every number checked."""
    domain = arrays.pop("domain")
    topk, config = arrays["topk"], record.config
    expected = (config.n_layers, config.top_k)
    if topk.shape[1:] != expected or not len(topk):
        raise TraceError(f"{path}: topk: {topk.shape}, expected tokens and then {expected}")
    if topk.min() < 0 or topk.max() >= config.n_experts:
        raise TraceError(
            f"{path}: topk: {topk.min()} to {topk.max()}, expected 0 to {config.n_experts - 1}"
        )
    if not len(domain) or domain.min() < 0 or domain.max() >= len(record.domains):
        raise TraceError(f"{path}: domain: expected 0 to {len(record.domains) - 1} of each request")
    if not np.array_equal(np.unique(arrays["request"]), np.arange(len(domain))):
        raise TraceError(f"{path}: request: expected each of 0 to {len(domain) - 1}")
    where = f"router hooks, torch on {record.device}, requests side by side"
    trace = RoutingTrace(
        n_experts=config.n_experts,
        layers=tuple(range(config.n_layers)),
        model=record.name,
        capture=f"{where}, prefill then sampled decode",
        **arrays,
    )
    return trace, [record.domains[index] for index in domain]
