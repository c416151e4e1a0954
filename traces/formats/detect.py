"""The door: read_any takes a file of any known format and gives a trace or counts.

The format is told from the content (first bytes, names inside the archive, keys), not from the
file's suffix; the caller may name it instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from traces import parquet
from traces.errors import TraceError
from traces.formats import (
    counts_csv,
    hf_router_logits,
    megatron_router_trace,
    npz,
    preplay_jsonl,
    routed_experts,
    sglang_recorder,
    tensorrt_llm,
)
from traces.formats.common import check_model, with_model
from traces.formats.load import decoding, head, npz_headers, one_line
from traces.formats.options import ImportOptions
from traces.routing import ExpertCounts, RoutingTrace

__all__ = ["READERS", "ImportOptions", "detect", "read_any"]

_HEAD_BYTES = 2**20


def _read_parquet(path: Path, options: ImportOptions) -> RoutingTrace | ExpertCounts:
    with decoding(path, "Parquet file"):
        trace = parquet.read(path)
    if isinstance(trace, RoutingTrace):
        return with_model(trace, path, options.model)
    if options.model is not None:
        check_model(path, trace.n_experts, trace.layers, trace.top_k, options.model)
    return trace


READERS: dict[str, Callable[[Path, ImportOptions], RoutingTrace | ExpertCounts]] = {
    "parquet": _read_parquet,
    "npz": npz.read,
    "sglang-recorder": sglang_recorder.read,
    "routed-experts": routed_experts.read,
    "megatron-router-trace": megatron_router_trace.read,
    "preplay-jsonl": preplay_jsonl.read,
    "hf-router-logits": hf_router_logits.read,
    "counts-csv": counts_csv.read,
    "tensorrt-llm": tensorrt_llm.read,
}

# In text and in a torch file's index, the first of these that occurs tells the format.
_TEXT_KEYS = {
    b'"row_type"': "preplay-jsonl",
    b'"top_indices"': "megatron-router-trace",
    b'"logical_count"': "sglang-recorder",
    b'"routed_experts"': "routed-experts",
    b'"meta_info"': "routed-experts",
    b'"choices"': "routed-experts",
}
_TORCH_KEYS = {
    b"logical_count": "sglang-recorder",
    b"global_physical_count": "sglang-recorder",
    b"last_physical_to_logical_map": "sglang-recorder",
    b"router_logits": "hf-router-logits",
}
_FOLDERS = {
    "meta_info.json": "tensorrt-llm",
    "expert_distribution_recorder_*.pt": "sglang-recorder",
    "router_trace_rank*.jsonl": "megatron-router-trace",
}


def read_any(path: Path, options: ImportOptions | None = None) -> RoutingTrace | ExpertCounts:
    """The trace or counts in a file (or folder) of any known format.

    raises  TraceError of one line naming the file, the field, the value and what was expected
    """
    options = options or ImportOptions()
    try:
        if not path.exists():
            raise TraceError(f"{path}: no such file")
        name = options.format or detect(path)
        if name not in READERS:
            raise TraceError(f"{path}: format {name!r} is unknown, expected {', '.join(READERS)}")
        return READERS[name](path, options)
    except TraceError as error:
        text = " ".join(str(error).split())
        raise TraceError(text if str(path) in text else f"{path}: {text}") from error
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({one_line(error.strerror)})") from error


def detect(path: Path) -> str:
    """Name of the format of a file or folder, from what is in it.

    raises  TraceError listing the known formats when it is none of them
    """
    if path.is_dir():
        found = [name for pattern, name in _FOLDERS.items() if any(path.glob(pattern))]
        return found[0] if found else _unknown(path, "a folder without known files")
    start = head(path, _HEAD_BYTES)
    if not start:
        raise TraceError(f"{path}: empty file")
    if start[:4] == b"PAR1":
        return "parquet"
    if start[:6] == b"\x93NUMPY":
        return "routed-experts"
    if start[:4] == b"PK\x03\x04":
        return _detect_archive(path)
    if start.lstrip()[:1] in (b"{", b"["):
        return _first_key(start, _TEXT_KEYS) or _unknown(path, "JSON without known keys")
    first_line = start.lstrip(b"\xef\xbb\xbf").split(b"\n", 1)[0].lower()
    if re.match(rb'\s*"?layer"?\s*,', first_line):
        return "counts-csv"
    return _unknown(path, f"begins with {one_line(start[:16])}")


def _detect_archive(path: Path) -> str:
    names = npz_headers(path)
    if "routed_experts" in names:
        return "routed-experts"
    if any(name.startswith("router_logits") for name in names):
        return "hf-router-logits"
    if names:
        return "npz"
    # A torch archive: its index is stored as it is, near the start, with the keys readable.
    return _first_key(head(path, _HEAD_BYTES), _TORCH_KEYS) or _unknown(
        path, "an archive without known arrays or keys"
    )


def _first_key(data: bytes, keys: dict[bytes, str]) -> str | None:
    return next((name for key, name in keys.items() if key in data), None)


def _unknown(path: Path, what: str) -> str:
    raise TraceError(f"{path}: unknown format ({what}), expected one of {', '.join(READERS)}")
