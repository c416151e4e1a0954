"""What the bundled trace is made of and what it measures, and the files beside it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from traces import parquet, stats
from traces.data.corpus import Corpus, Document
from traces.data.model import TinyMoe
from traces.routing import DECODE, PREFILL, RoutingTrace, content_hash

SRP_WINDOW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """Most bytes a trace may have with its weights, and the longest request of the model."""

    trace_bytes: int = 4_000_000
    positions: int = 384


LIMITS = Limits()


def write_files(
    folder: Path,
    name: str,
    model: TinyMoe,
    captured: tuple[RoutingTrace, list[str]],
    record: dict[str, Any],
    limits: Limits = LIMITS,
) -> None:
    """Write the trace, its provenance and the model's config; weights only when they fit.

    record  fields of the provenance; its `made_by` and `torch` replace those of this program
    """
    trace, domains = captured
    path = folder / f"{name}.parquet"
    parquet.write(trace, path)
    if path.stat().st_size > limits.trace_bytes:
        trace = replace(trace, weights=None)
        parquet.write(trace, path)
    document = {
        "name": name,
        "made_by": "python -m traces.data.train_and_capture",
        "content_sha256": content_hash(trace),
        "torch": torch.__version__,
        "model": model_record(model),
        **record,
        "requests": request_record(domains),
        "tokens": token_record(trace),
        "statistics": statistics(trace, domains),
    }
    _write_json(folder / f"{name}.json", document)
    _write_json(folder / f"{name}-config.json", hugging_face_config(model, limits.positions))


def corpus_record(corpus: Corpus) -> dict[str, Any]:
    """Source versions, and documents and UTF-8 bytes of each domain by split."""
    return {
        "sources": corpus.sources,
        "train": _by_domain(corpus.train),
        "held_out": _by_domain(corpus.held_out),
    }


def model_record(model: TinyMoe) -> dict[str, int]:
    """Shape in short, and parameter counts."""
    config = model.config
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_expert_parameters = 3 * config.hidden * config.expert_hidden
    idle = config.n_layers * (config.n_experts - config.top_k) * n_expert_parameters
    return {
        "moe_layers": config.n_layers,
        "experts": config.n_experts,
        "top_k": config.top_k,
        "hidden": config.hidden,
        "expert_hidden": config.expert_hidden,
        "vocabulary": config.vocab_size,
        "parameters": n_parameters,
        "active_parameters": n_parameters - idle,
    }


def request_record(domains: list[str]) -> dict[str, Any]:
    """Requests of each domain as {first, step, count}; raises ValueError when not regular."""
    records: dict[str, Any] = {}
    for domain in dict.fromkeys(domains):
        ids = [request for request, d in enumerate(domains) if d == domain]
        step = ids[1] - ids[0] if len(ids) > 1 else 1
        if ids != list(range(ids[0], ids[0] + step * len(ids), step)):
            raise ValueError(f"requests of {domain} are not evenly spaced: {ids[:5]}...")
        records[domain] = {"first": ids[0], "step": step, "count": len(ids)}
    return {"count": len(domains), "by_domain": records}


def token_record(trace: RoutingTrace) -> dict[str, int]:
    """Tokens by phase."""
    return {
        "total": trace.n_tokens,
        "prefill": int((trace.phase == PREFILL).sum()),
        "decode": int((trace.phase == DECODE).sum()),
    }


def statistics(trace: RoutingTrace, domains: list[str]) -> dict[str, Any]:
    """Reuse, segment routing performance and balance of the trace.

    The figures within a domain are those of its tokens alone, mean over domains: reuse over
    draws from the domain's own popularity, and the load when all traffic is of one domain.
    """
    counts = stats.load(trace)
    relative = counts / counts.mean(axis=1, keepdims=True)
    reuse, segments = stats.reuse_ratio(trace), stats.srp(trace, SRP_WINDOW_TOKENS)
    domain_of_row = np.array(domains)[trace.request]
    parts = [trace.rows(domain_of_row == domain) for domain in sorted({*domains})]
    within = [stats.reuse_ratio(part).mean() for part in parts]
    skew = [stats.max_over_mean(stats.load(part)).mean() for part in parts]
    return {
        "reuse_ratio": round(float(reuse.mean()), 3),
        "reuse_ratio_by_layer": _rounded(reuse),
        "reuse_ratio_within_domain": round(float(np.mean(within)), 3),
        "srp_window_tokens": SRP_WINDOW_TOKENS,
        "srp": round(segments.srp, 3),
        "srp_floor": round(segments.floor, 3),
        "max_over_mean_within_domain": round(float(np.mean(skew)), 3),
        "max_over_mean_by_layer": _rounded(relative.max(axis=1)),
        "min_over_mean_by_layer": _rounded(relative.min(axis=1)),
    }


def hugging_face_config(model: TinyMoe, positions: int) -> dict[str, Any]:
    """The model's shape in the keys of a Hugging Face config.json."""
    config = model.config
    return {
        "architectures": ["TinyMoe"],
        "model_type": "moesim_tiny_moe",
        "hidden_size": config.hidden,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "head_dim": config.head_dim,
        "moe_intermediate_size": config.expert_hidden,
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": positions,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def _by_domain(documents: tuple[Document, ...]) -> dict[str, dict[str, int]]:
    n_documents = Counter(document.domain for document in documents)
    n_bytes: Counter[str] = Counter()
    for document in documents:
        n_bytes[document.domain] += len(document.text.encode())
    return {d: {"documents": n_documents[d], "bytes": n_bytes[d]} for d in n_documents}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in values]


def _write_json(path: Path, document: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
