"""TensorRT-LLM expert statistics: a folder of `meta_info.json` and `rank{r}.safetensors`.

Each safetensors file maps "{iteration}_{absolute layer}" to int64[experts]; the counts are summed
over iterations and ranks. As in NVIDIA's own reader, iterations must be contiguous and each must
have all layers.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from traces.errors import TraceError
from traces.formats.common import RawCounts, build_counts
from traces.formats.load import load_json, one_line, safetensors_arrays
from traces.formats.options import ImportOptions
from traces.routing import ExpertCounts

_RANK_FILE = re.compile(r"rank\d+\.safetensors")
_KEY = re.compile(r"(\d{1,9})_(\d{1,6})")


class _Meta(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    num_experts: int = Field(gt=0)
    num_experts_per_token: int = Field(gt=0)


def read(path: Path, options: ImportOptions) -> ExpertCounts:
    """The counts of a statistics folder, summed over its ranks and iterations."""
    if not path.is_dir():
        raise TraceError(f"{path}: not a folder, expected meta_info.json and rank*.safetensors")
    meta = _meta(path / "meta_info.json")
    files = sorted(file for file in path.iterdir() if _RANK_FILE.fullmatch(file.name))
    if not files:
        raise TraceError(f"{path}: no rank*.safetensors, expected one a rank")
    total: dict[int, npt.NDArray[np.float64]] = {}
    iterations: set[int] = set()
    for file in files:
        iterations |= _add_rank(total, file, meta.num_experts)
    if not total or max(iterations) - min(iterations) + 1 != len(iterations):
        raise TraceError(
            f"{path}: iterations {one_line(sorted(iterations), 60)}, expected contiguous ones"
        )
    layers = sorted(total)
    raw = RawCounts(
        counts=np.stack([total[layer] for layer in layers]),
        layers=layers,
        n_experts=meta.num_experts,
        top_k=meta.num_experts_per_token,
        capture=f"TensorRT-LLM statistics {path.name}, {len(files)} ranks,"
        f" iterations {min(iterations)}..{max(iterations)}",
    )
    return build_counts(raw, path, options)


def _meta(file: Path) -> _Meta:
    if not file.is_file():
        raise TraceError(f"{file}: no such file, expected it beside the statistics")
    try:
        return _Meta.model_validate(load_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        raise TraceError(f"{file}: field {first['loc']}: {first['msg']}") from error


def _add_rank(total: dict[int, npt.NDArray[np.float64]], file: Path, n_experts: int) -> set[int]:
    """Adds one rank's counts to the total by layer; returns its iterations."""
    seen: dict[int, set[int]] = {}
    for name, counts in safetensors_arrays(file).items():
        match = _KEY.fullmatch(name)
        if match is None or counts.shape != (n_experts,) or counts.dtype.kind not in "iu":
            raise TraceError(
                f"{file}: tensor {one_line(name, 40)}: {counts.dtype}{list(counts.shape)},"
                f" expected iteration_layer: integers [{n_experts}]"
            )
        iteration, layer = int(match[1]), int(match[2])
        seen.setdefault(iteration, set()).add(layer)
        if layer not in total:
            total[layer] = np.zeros(n_experts)
        total[layer] += counts
    if len({frozenset(layers) for layers in seen.values()}) > 1:
        raise TraceError(f"{file}: iterations differ in their layers, expected all in each")
    return set(seen)
