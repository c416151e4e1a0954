"""A model of two MoE layers and a trace of it, small enough for every command to run in a blink."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from traces import parquet
from traces.routing import DECODE, PREFILL, ExpertCounts, RoutingTrace, expert_counts

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str
    raised: BaseException | None

    def json(self) -> dict:
        return json.loads(self.out)


def moesim(*arguments: object) -> Ran:
    """Run a command in this process."""
    from moesim.cli.main import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    raised = result.exception if not isinstance(result.exception, SystemExit) else None
    return Ran(result.exit_code, result.stdout, result.stderr, raised)


def refused(ran: Ran, *words: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr with all the words."""
    assert ran.raised is None
    assert (ran.code, ran.out) == (2, ""), ran
    lines = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


def config_file(folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def small_trace(n_tokens: int = 600, seed: int = 0, model: str = "") -> RoutingTrace:
    """Skewed choices of 8 experts, 2 a token, 30 requests, the first half of each prefill."""
    rng = np.random.default_rng(seed)
    keys = rng.gumbel(size=(n_tokens, 2, 8)) + np.log(np.arange(8, 0, -1))
    topk = np.argsort(-keys, axis=2)[:, :, :2].astype(np.int16)
    per_request = n_tokens // 30
    position = np.arange(n_tokens) % per_request
    return RoutingTrace(
        topk=topk,
        n_experts=8,
        layers=(0, 1),
        request=(np.arange(n_tokens) // per_request).astype(np.int32),
        position=position.astype(np.int32),
        phase=np.where(position < per_request // 2, PREFILL, DECODE).astype(np.int8),
        model=model,
    )


def trace_file(folder: Path, trace: RoutingTrace | None = None) -> Path:
    path = folder / "small.parquet"
    parquet.write(trace or small_trace(), path)
    return path


def counts_file(folder: Path) -> Path:
    counts: ExpertCounts = expert_counts(small_trace())
    path = folder / "counts.parquet"
    parquet.write(counts, path)
    return path
