"""`moesim trace capture` on tiny models saved as Hugging Face saves them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moesim.cli.trace_capture import read_prompts
from tests.moesim.cli_case import Ran, moesim, refused
from tests.traces.tiny_moes import FAMILIES, one_thread, prompts, tiny_moe
from traces import parquet
from traces.capture import capture
from traces.errors import TraceError
from traces.routing import RoutingTrace, content_hash


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def model_folder(folder: Path, family: str = "mixtral") -> Path:
    path = folder / f"tiny-{family}"
    tiny_moe(family).save_pretrained(path)
    return path


def prompt_file(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"ids": prompt}) + "\n" for prompt in prompts()))
    return path


def run(model: Path, folder: Path, *flags: object) -> Ran:
    """Capture to out.parquet; --prompts is the usual file unless the flags say otherwise."""
    given = flags if "--prompts" in flags else (*flags, "--prompts", prompt_file(folder))
    return moesim("trace", "capture", model, "-o", folder / "out.parquet", *given)


def stored(folder: Path) -> RoutingTrace:
    trace = parquet.read(folder / "out.parquet")
    assert isinstance(trace, RoutingTrace)
    return trace


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_holds_what_the_library_captures(family: str, tmp_path: Path) -> None:
    model = model_folder(tmp_path, family)
    ran = run(model, tmp_path, "--new-tokens", 4, "--batch-size", 2, "--json")
    assert ran.code == 0, ran.err
    expected = capture(tiny_moe(family), prompts(), n_new_tokens=4, batch_size=2)
    trace, document = stored(tmp_path), ran.json()
    for field in ("topk", "request", "position", "phase", "forward"):
        np.testing.assert_array_equal(getattr(trace, field), getattr(expected, field))
    # Weights at another address in memory may be summed in another order: one float16 step.
    np.testing.assert_allclose(trace.scores, expected.scores, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(trace.weights, expected.weights, rtol=2e-3, atol=1e-4)
    assert content_hash(trace) == document["content_sha256"]
    assert trace.model == f"tiny-{family}"
    assert "batches of 2" in document["capture"]
    assert (document["requests"], document["decode"]) == (5, 15)


def test_a_captured_file_goes_on_to_the_other_commands(tmp_path: Path) -> None:
    ran = run(model_folder(tmp_path), tmp_path, "--no-scores")
    assert ran.code == 0, ran.err
    assert "captured" in ran.out
    assert stored(tmp_path).scores is None
    stats = moesim("trace", "stats", tmp_path / "out.parquet", "--json")
    assert stats.code == 0, stats.err
    assert stats.json()["requests"] == 5


def test_dtype_is_that_of_the_run(tmp_path: Path) -> None:
    model = model_folder(tmp_path)
    assert run(model, tmp_path, "--dtype", "bfloat16").code == 0
    half = stored(tmp_path)
    rounded = torch.tensor(half.scores.tolist()).to(torch.bfloat16).to(torch.float16).numpy()
    np.testing.assert_array_equal(half.scores, rounded)


def test_text_prompts_pass_through_the_tokenizer_of_the_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = model_folder(tmp_path)
    words = {word: number for number, word in enumerate(("?", "the", "sun", "is", "red"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(model)
    (tmp_path / "texts.txt").write_text("the sun is red\n\nred\n")
    ran = run(model, tmp_path, "--new-tokens", 2, "--prompts", tmp_path / "texts.txt")
    assert ran.code == 0, ran.err
    expected = capture(tiny_moe("mixtral"), [[1, 2, 3, 4], [4]], n_new_tokens=2)
    np.testing.assert_array_equal(stored(tmp_path).topk, expected.topk)


def test_text_prompts_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("the sun\n")
    ran = run(model_folder(tmp_path), tmp_path, "--prompts", tmp_path / "texts.txt")
    refused(ran, "no tokenizer", "token ids")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_missing_library_is_one_line(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    refused(run(tmp_path, tmp_path), "pip install 'moesim[capture]'", library)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(run(tmp_path / "empty", tmp_path), "empty: cannot be loaded")


def test_a_dense_model_is_refused_by_its_class(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **shape))
    model.save_pretrained(tmp_path / "dense")
    refused(run(tmp_path / "dense", tmp_path), "LlamaForCausalLM", "no router")


def test_weights_in_a_pickle_are_not_read(tmp_path: Path) -> None:
    model = model_folder(tmp_path)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refused(run(model, tmp_path), "cannot be loaded", "safetensors")


def test_a_weight_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    model = model_folder(tmp_path)
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(run(model, tmp_path), "1 weights are missing", "model.norm.weight")


def test_a_damaged_weights_file_is_one_line(tmp_path: Path) -> None:
    model = model_folder(tmp_path)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(run(model, tmp_path), "cannot be loaded")


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    model = tmp_path / "own-code"
    model.mkdir()
    marker = tmp_path / "ran"
    (model / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    refused(run(model, tmp_path), "own-code: cannot be loaded")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--device", "tpu"), "--device 'tpu': expected one of cpu, cuda"),
        (("--dtype", "int8"), "--dtype 'int8': expected one of auto, float32"),
        (("--device", "cuda"), "no CUDA device is available"),
    ],
)
def test_a_flag_that_cannot_be_followed_is_refused(
    flags: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(run(tmp_path / "never-opened", tmp_path, *flags), words)


def test_prompts_are_texts_or_ids(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('"one"\n[1, 2]\n\n{"prompt": "two"}\n{"text": "three"}\n{"input_ids": [3]}\n')
    assert read_prompts(path) == ["one", [1, 2], "two", "three", [3]]
    path = tmp_path / "texts.txt"
    path.write_bytes(b"[1, 2]\r\n\n  \nlast")
    assert read_prompts(path) == ["[1, 2]", "last"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1, true]", "line 2: expected text, a list of token ids"),
        ('{"ids": [1], "prompt": "x"}', "line 2: expected text"),
        ('{"tokens": [1]}', "line 2: expected text"),
        ("[]", "line 2: expected text"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"[1]\n{line}\n")
    with pytest.raises(TraceError, match=words):
        read_prompts(path)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(TraceError, match="no prompts"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(TraceError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.txt")
    refused(run(tmp_path, tmp_path, "--prompts", tmp_path / "absent.txt"), "absent.txt")
