"""Hugging Face router logits (`output_router_logits=True`), saved as npz or with torch.

`router_logits` is [moe_layers, tokens, experts], or a tuple of [tokens, experts], one a MoE layer
(in npz also `router_logits_0`, `router_logits_1`, ...). Experts are the top_k largest logits,
largest first, which is the router's own choice only where nothing but the logits decides it. May
hold `top_k layers seq phase pos` too. The logits are kept as the scores, as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.errors import TraceError
from traces.formats.common import RawTrace, build_trace
from traces.formats.load import as_array, load_torch, npz_array, npz_headers, one_line
from traces.formats.options import ImportOptions
from traces.routing import RoutingTrace

_NOT_LOGITS_ALONE = ("sigmoid", "group", "bias", "relu")


def read(path: Path, options: ImportOptions) -> RoutingTrace:
    """The trace that the logits imply; TraceError when the logits alone do not decide it."""
    _refuse_other_routers(path, options)
    found = _from_npz(path) if npz_headers(path) else _from_torch(path)
    logits = _stack(found.pop("router_logits"), path)
    top_k = _top_k(found.pop("top_k", None), logits.shape[2], path, options)
    raw = RawTrace(
        topk=_largest(logits, top_k),
        n_experts=logits.shape[2],
        layers=_layers(found.get("layers"), path),
        request=found.get("seq"),
        position=found.get("pos"),
        phase=found.get("phase"),
        scores=logits,
        capture=f"top {top_k} of the router logits in {path.name}; scores are the logits",
    )
    return build_trace(raw, path, options)


def _refuse_other_routers(path: Path, options: ImportOptions) -> None:
    model = options.model
    if model is None:
        return
    words = [word for word in _NOT_LOGITS_ALONE if word in model.router.lower()]
    if words or model.n_groups > 1:
        raise TraceError(
            f"{path}: model {model.name} routes by {one_line(model.router, 60)!r}"
            f" (groups: {model.n_groups}), which the logits alone do not decide;"
            " capture the chosen ids instead"
        )


def _from_npz(path: Path) -> dict[str, Any]:
    names = npz_headers(path)
    found: dict[str, Any] = {
        name: npz_array(path, name) for name in ("top_k", "layers", "seq", "phase", "pos")
        if name in names
    }  # fmt: skip
    parts = [name for name in names if re.fullmatch(r"router_logits_\d{1,4}", name)]
    if "router_logits" in names:
        found["router_logits"] = npz_array(path, "router_logits")
    elif parts:
        parts.sort(key=lambda name: int(name.rsplit("_", 1)[1]))
        found["router_logits"] = [npz_array(path, name) for name in parts]
    else:
        raise TraceError(f"{path}: arrays {one_line(sorted(names), 80)}, expected router_logits")
    return found


def _from_torch(path: Path) -> dict[str, Any]:
    content = load_torch(path)
    if not isinstance(content, dict):
        return {"router_logits": content}
    if "router_logits" not in content:
        raise TraceError(f"{path}: keys {one_line(list(content), 80)}, expected router_logits")
    found = {"router_logits": content["router_logits"]}
    for name in ("top_k", "layers", "seq", "phase", "pos"):
        if name in content:
            found[name] = as_array(content[name], f"{path}: {name}")
    return found


def _stack(logits: Any, path: Path) -> npt.NDArray[Any]:
    """float[tokens, layers, experts]"""
    if isinstance(logits, (tuple, list)):
        arrays = [as_array(part, f"{path}: router_logits[{i}]") for i, part in enumerate(logits)]
    else:
        arrays = list(np.atleast_1d(as_array(logits, f"{path}: router_logits")))
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1 or arrays[0].ndim != 2 or not arrays[0].size:
        raise TraceError(
            f"{path}: router_logits: layers of shapes {one_line(sorted(shapes), 80)},"
            " expected [tokens, experts], the same in every layer"
        )
    for layer, array in enumerate(arrays):
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise TraceError(f"{path}: router_logits[{layer}]: expected finite floats")
    return np.stack(arrays, axis=1)


def _top_k(
    found: npt.NDArray[Any] | None, n_experts: int, path: Path, options: ImportOptions
) -> int:
    if found is not None and found.size == 1 and found.dtype.kind in "iu":
        top_k = int(np.ravel(found)[0])
    elif options.model is not None:
        top_k = options.model.top_k
    else:
        raise TraceError(f"{path}: top_k is not in the file; pass --model")
    if not 0 < top_k <= n_experts:
        raise TraceError(f"{path}: top_k: {top_k}, expected 1..{n_experts}")
    return top_k


def _layers(found: npt.NDArray[Any] | None, path: Path) -> list[int] | None:
    if found is None:
        return None
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise TraceError(
            f"{path}: layers: {found.dtype}{list(found.shape)}, expected integers [layers]"
        )
    return [int(layer) for layer in found]


def _largest(logits: npt.NDArray[Any], top_k: int) -> npt.NDArray[np.int16]:
    """Ids of the top_k largest logits, largest first, the lower id on a tie."""
    chosen = np.empty((*logits.shape[:2], top_k), dtype=np.int16)
    for layer in range(logits.shape[1]):
        order = np.argsort(-logits[:, layer], axis=1, kind="stable")
        chosen[:, layer] = order[:, :top_k]
    return chosen
