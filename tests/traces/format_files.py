"""Small valid files of every external format, written by the tests themselves.

Each `write_*` takes a folder, writes one file (or folder) into it and returns its path. They all
describe the same captured choices (`choices()`), so that a reader's answer can be held against it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from traces import parquet
from traces.model import Attention, ModelSpec
from traces.routing import DECODE, PREFILL, RoutingTrace

N_LAYERS, MOE_LAYERS, N_EXPERTS, TOP_K = 5, (1, 2, 3, 4), 16, 3
PROMPTS, OUTPUTS = (5, 3), (4, 6)  # tokens of the two requests


def model(**changes: Any) -> ModelSpec:
    """The model the files are of: 5 layers, the first dense, 16 experts, top 3."""
    fields: dict[str, Any] = {
        "name": "tiny-moe",
        "n_layers": N_LAYERS,
        "moe_layers": MOE_LAYERS,
        "hidden_size": 8,
        "attention": Attention(n_heads=2, n_kv_heads=2, head_dim=4, v_head_dim=4),
        "n_experts": N_EXPERTS,
        "top_k": TOP_K,
        "expert_intermediate_size": 8,
        "shared_intermediate_size": 0,
        "dense_intermediate_size": 16,
        "vocab_size": 32,
        "kv_layers": N_LAYERS,
    }
    return ModelSpec(**{**fields, **changes})


def choices(n_tokens: int = sum(PROMPTS) + sum(OUTPUTS), seed: int = 0) -> np.ndarray:
    """int16[tokens, 4 layers, 3]: distinct experts of each token and layer."""
    rng = np.random.default_rng(seed)
    order = rng.random((n_tokens, len(MOE_LAYERS), N_EXPERTS)).argsort(axis=2)
    return order[:, :, :TOP_K].astype(np.int16)


def trace() -> RoutingTrace:
    """The choices as a trace of two requests, prefill then decode."""
    lengths = [p + o for p, o in zip(PROMPTS, OUTPUTS, strict=True)]
    position = np.concatenate([np.arange(n) for n in lengths])
    prompt = np.repeat(PROMPTS, lengths)
    return RoutingTrace(
        topk=choices(),
        n_experts=N_EXPERTS,
        layers=MOE_LAYERS,
        request=np.repeat([0, 1], lengths).astype(np.int32),
        position=position.astype(np.int32),
        phase=np.where(position < prompt, PREFILL, DECODE).astype(np.int8),
        model="tiny-moe",
        capture="made by a test",
    )


def counts() -> np.ndarray:
    """int64[4 layers, 16 experts] of the choices."""
    return np.stack([np.bincount(ids.ravel(), minlength=16) for ids in choices().swapaxes(0, 1)])


def all_layers(rows: np.ndarray) -> np.ndarray:
    """The same array [.., 4 layers, ..] on the axis of all 5 layers, dense layer 0 all zero."""
    axis = rows.shape.index(len(MOE_LAYERS))
    pad = [(1, 0) if i == axis else (0, 0) for i in range(rows.ndim)]
    return np.pad(rows, pad)


# --- numpy files -----------------------------------------------------------------------------


def write_parquet(folder: Path) -> Path:
    path = folder / "tiny.parquet"
    parquet.write(trace(), path)
    return path


def write_npz(folder: Path) -> Path:
    path, of = folder / "tiny.npz", trace()
    np.savez_compressed(
        path, topk=of.topk, seq=of.request, phase=of.phase, layers=MOE_LAYERS, n_experts=16
    )
    return path


def write_counts_npz(folder: Path) -> Path:
    path = folder / "tiny-counts.npz"
    np.savez_compressed(path, counts=counts(), layers=MOE_LAYERS)
    return path


def write_logits_npz(folder: Path) -> Path:
    path = folder / "logits.npz"
    np.savez_compressed(path, router_logits=logits(), top_k=TOP_K, layers=MOE_LAYERS)
    return path


def logits() -> np.ndarray:
    """float32[4 layers, tokens, 16]: the chosen experts have the largest, in order."""
    rng = np.random.default_rng(1)
    values = rng.uniform(-1, 0, (len(choices()), 4, 16)).astype(np.float32)
    np.put_along_axis(values, choices().astype(int), np.float32([3.0, 2.0, 1.0]), axis=2)
    return values.swapaxes(0, 1)


def write_routed_npy(folder: Path) -> Path:
    path = folder / "routed.npy"
    np.save(path, all_layers(choices().astype(np.uint8)))
    return path


# --- JSON and CSV ----------------------------------------------------------------------------


def _answers() -> list[np.ndarray]:
    """Rows of each request: all tokens but the last, all layers."""
    of = trace()
    return [all_layers(of.topk[of.request == i][:-1]) for i in (0, 1)]


def write_sglang_responses(folder: Path) -> Path:
    path, lines = folder / "sglang.jsonl", []
    for i, rows in enumerate(_answers()):
        data = base64.b64encode(rows.astype("<i4").tobytes()).decode()
        lines.append(
            {
                "text": "hello",
                "meta_info": {
                    "id": f"r{i}",
                    "prompt_tokens": PROMPTS[i],
                    "completion_tokens": OUTPUTS[i],
                    "routed_experts": data,
                },
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def npy_base64(rows: np.ndarray) -> str:
    """What vLLM puts into a response: a whole npy file in base64."""
    file = io.BytesIO()
    np.save(file, rows)
    return base64.b64encode(file.getvalue()).decode()


def write_vllm_responses(folder: Path) -> Path:
    path = folder / "vllm.json"
    answers = [
        {
            "choices": [{"index": 0, "routed_experts": npy_base64(rows.astype(np.uint8))}],
            "usage": {"prompt_tokens": PROMPTS[i], "completion_tokens": OUTPUTS[i]},
        }
        for i, rows in enumerate(_answers())
    ]
    path.write_text(json.dumps(answers, indent=1))
    return path


def megatron_line(step: int, layer: int, ids: np.ndarray, rank: int = 0, **more: Any) -> str:
    """One line of a router trace."""
    line = {
        "step": step,
        "stage": "pre_dispatch",
        "block": "decoder",
        "layer": layer,
        "rank": rank,
        "num_tokens": len(ids),
        "topk": int(ids.shape[1]),
        "top_indices": ids.tolist(),
        **more,
    }
    return json.dumps(line) + "\n"


def write_megatron(folder: Path) -> Path:
    path, ids = folder / "router_trace_rank0.jsonl", choices()
    path.write_text(
        "".join(
            megatron_line(step, layer, ids[step * 9 : (step + 1) * 9, column])
            for step in (0, 1)
            for column, layer in enumerate(MOE_LAYERS)
        )
    )
    return path


def preplay_records() -> list[dict[str, Any]]:
    """Lines of a preplay file: header, request, its tokens, the next request, ..., footer."""
    of, schema = trace(), "simllm-preplay-trace-v1"
    provenance = {
        "expert_count": 16,
        "top_k": TOP_K,
        "moe_layer_indices": list(MOE_LAYERS),
        "model_id": "maker/Tiny-MoE",
        "runner": "transformers-cpu",
    }
    records: list[dict[str, Any]] = [
        {"row_type": "header", "schema": schema, "provenance": provenance}
    ]
    for i, (prompt, output) in enumerate(zip(PROMPTS, OUTPUTS, strict=True)):
        ids = {"input_token_ids": [7] * prompt, "output_token_ids": [9] * output}
        records.append({"row_type": "request", "request_id": f"r{i}", "schema": schema, **ids})
        for row in np.flatnonzero(of.request == i):
            decode, position = int(of.phase[row]), int(of.position[row])
            routing = [
                {"layer_index": layer, "expert_ids": ids.tolist(), "gate_weights": [0.5, 0.3, 0.2]}
                for layer, ids in zip(MOE_LAYERS, of.topk[row], strict=True)
            ]
            records.append(
                {
                    "row_type": "forward-token",
                    "schema": schema,
                    "request_id": f"r{i}",
                    "phase": "decode" if decode else "prefill",
                    "token_id": 9 if decode else 7,
                    "token_index": position - prompt * decode,
                    "routing": routing,
                }
            )
    footer = {"request_count": 2, "prefill_forward_token_count": sum(PROMPTS)}
    footer["decode_forward_token_count"] = sum(OUTPUTS)
    return [*records, {"row_type": "footer", "schema": schema, **footer}]


def write_preplay(folder: Path) -> Path:
    path = folder / "preplay.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in preplay_records()))
    return path


def write_stat_json(folder: Path) -> Path:
    path = folder / "stat.json"
    path.write_text(json.dumps({"logical_count": all_layers(counts()).tolist()}))
    return path


def write_csv(folder: Path) -> Path:
    path = folder / "counts.csv"
    rows = [
        f"{layer},{expert},{count}"
        for layer, row in zip(MOE_LAYERS, counts(), strict=True)
        for expert, count in enumerate(row)
    ]
    path.write_text("layer,expert,count\n" + "\n".join(rows) + "\n")
    return path


def write_matrix_csv(folder: Path) -> Path:
    path = folder / "matrix.csv"
    rows = [
        ",".join(map(str, [layer, *row])) for layer, row in zip(MOE_LAYERS, counts(), strict=True)
    ]
    path.write_text("layer," + ",".join(map(str, range(16))) + "\n" + "\n".join(rows) + "\n")
    return path


# --- torch and safetensors -------------------------------------------------------------------


def slots_map() -> np.ndarray:
    """int64[5 layers, 18 slots]: experts in reverse, the first two of them twice."""
    return np.tile(np.concatenate([np.arange(16)[::-1], [0, 1]]), (N_LAYERS, 1))


def per_token_records(rank: int = 0) -> list[dict[str, Any]]:
    """The two requests prefilled in one pass, then decoded side by side until each ends."""
    import torch

    of, slot_of = trace(), np.argsort(slots_map()[0][:16])
    slots = np.full((N_LAYERS, of.n_tokens, 8), -1, dtype=np.int32)
    slots[1:, :, :TOP_K] = slot_of[of.topk].transpose(1, 0, 2)
    places = zip(of.request.tolist(), of.position.tolist(), strict=True)
    at = {place: row for row, place in enumerate(places)}
    batches = [[at[r, p] for r in (0, 1) for p in range(PROMPTS[r])]]
    for step in range(max(OUTPUTS)):
        batches.append([at[r, PROMPTS[r] + step] for r in (0, 1) if step < OUTPUTS[r]])
    return [
        {
            "forward_pass_id": number,
            "rank": rank,
            "gatherer_key": "primary",
            "input_ids": [1] * len(rows),
            "positions": of.position[rows].tolist(),
            "extend_seq_lens": None if number else list(PROMPTS),
            "forward_mode": 2 if number else 1,
            "topk_ids_of_layer": torch.from_numpy(slots[:, rows]),
            "misc_objects": [],
        }
        for number, rows in enumerate(batches)
    ]


def save_recorder(path: Path, records: list[dict[str, Any]]) -> Path:
    """A per_pass or per_token dump of one rank."""
    import torch

    torch.save(
        {"records": records, "last_physical_to_logical_map": torch.from_numpy(slots_map())}, path
    )
    return path


def write_per_token(folder: Path) -> Path:
    return save_recorder(folder / "expert_distribution_recorder_1.5_0.pt", per_token_records())


def write_per_pass(folder: Path) -> Path:
    """A folder with the files of two ranks, three passes each; every rank holds half the slots."""
    import torch

    whole = folder / "per_pass"
    whole.mkdir()
    slots = all_layers(counts()[:, slots_map()[0][:16]])
    for rank in (0, 1):
        half = np.zeros((N_LAYERS, 18), dtype=np.int32)
        half[:, rank * 8 : rank * 8 + 8] = slots[:, rank * 8 : rank * 8 + 8]
        records = [
            {
                "forward_pass_id": number,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.from_numpy(half),
            }
            for number in range(3)
        ]
        save_recorder(whole / f"expert_distribution_recorder_1.{rank}_{rank}.pt", records)
    return whole


def write_stat(folder: Path) -> Path:
    import torch

    path = folder / "expert_distribution_recorder_1.5.pt"
    steps = np.zeros((4, N_LAYERS, 16), dtype=np.int32)  # a circular buffer with two empty rows
    steps[0], steps[2] = all_layers(counts()), all_layers(counts())
    content = {"rank": 0, "logical_count": torch.from_numpy(steps)}
    torch.save({**content, "average_utilization_rate_over_window": None}, path)
    return path


def write_logits_pt(folder: Path) -> Path:
    import torch

    path = folder / "logits.pt"
    tensors = tuple(torch.from_numpy(layer.copy()).to(torch.bfloat16) for layer in logits())
    torch.save({"router_logits": tensors, "top_k": TOP_K}, path)
    return path


def write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """The safetensors form: 8 bytes of length, a JSON header, the values."""
    header, data = {}, b""
    for name, array in arrays.items():
        start, data = len(data), data + array.astype("<i8").tobytes()
        shape = list(array.shape)
        header[name] = {"dtype": "I64", "shape": shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_tensorrt(folder: Path) -> Path:
    """Two ranks that each saw half of the counts, over iterations 10 and 11."""
    whole = folder / "expert_statistic"
    whole.mkdir()
    (whole / "meta_info.json").write_text(
        json.dumps({"num_experts": 16, "num_experts_per_token": TOP_K})
    )
    for rank in (0, 1):
        arrays = {
            f"{iteration}_{layer}": counts()[column]
            for iteration in (10, 11)
            for column, layer in enumerate(MOE_LAYERS)
        }
        write_safetensors(whole / f"rank{rank}.safetensors", arrays)
    return whole


TRACE_WRITERS: dict[str, Callable[[Path], Path]] = {
    "parquet": write_parquet,
    "npz": write_npz,
    "sglang per_token": write_per_token,
    "sglang responses": write_sglang_responses,
    "vllm responses": write_vllm_responses,
    "routed npy": write_routed_npy,
    "megatron": write_megatron,
    "preplay": write_preplay,
    "logits npz": write_logits_npz,
    "logits pt": write_logits_pt,
}
COUNT_WRITERS: dict[str, Callable[[Path], Path]] = {
    "counts npz": write_counts_npz,
    "sglang stat": write_stat,
    "sglang stat json": write_stat_json,
    "sglang per_pass": write_per_pass,
    "csv": write_csv,
    "matrix csv": write_matrix_csv,
    "tensorrt": write_tensorrt,
}
