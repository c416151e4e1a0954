"""What `moesim trace capture` does: load a Hugging Face model, read prompts, capture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli import output
from traces.errors import TraceError

if TYPE_CHECKING:
    from traces.routing import RoutingTrace

_MAX_PROMPT_BYTES = 256 * 2**20
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class CaptureWish:
    """What the user asked for, as typed.

    model         folder of a model, or its name on the hub
    prompts       file of prompts
    n_new_tokens  to generate per prompt
    """

    model: str
    prompts: Path
    n_new_tokens: int
    batch_size: int
    scores: bool
    device: str
    dtype: str


def captured(wish: CaptureWish) -> RoutingTrace:
    """The trace of a run of the model over the prompts.

    raises  TraceError when the libraries, the model or a prompt will not do
    """
    prompts = read_prompts(wish.prompts)
    _check_device(wish)
    from traces.capture import capture

    with output.progress(None, "load"):
        model = _load(wish)
    ids = _token_ids(prompts, wish)
    with output.progress(len(ids), "capture") as done:
        return capture(model, ids, wish.n_new_tokens, wish.batch_size, wish.scores, done)


def read_prompts(path: Path) -> list[str | list[int]]:
    """Prompts as text or as token ids; empty lines are skipped.

    path    .jsonl: a line is a string, a list of token ids, or an object with one of the keys
            prompt, text (a string) or ids, input_ids (a list); any other file: a line is a prompt
    raises  TraceError naming the line that is none of these
    """
    if (size := path.stat().st_size) > _MAX_PROMPT_BYTES:
        raise TraceError(f"{path}: {size} bytes, expected at most {_MAX_PROMPT_BYTES}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not UTF-8 text ({error.reason})") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise TraceError(f"{path}: no prompts, expected one a line")
    if path.suffix != ".jsonl":
        return [line.rstrip("\r") for _, line in numbered]
    return [_prompt(line, f"{path}, line {number}") for number, line in numbered]


def _prompt(line: str, where: str) -> str | list[int]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: not JSON ({error})") from error
    if isinstance(value, dict):
        found = [value[key] for key in ("prompt", "text", "ids", "input_ids") if key in value]
        value = found[0] if len(found) == 1 else None
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return value
    raise TraceError(
        f"{where}: expected text, a list of token ids, or an object with prompt or ids"
    )


def _check_device(wish: CaptureWish) -> None:
    """Refuse what cannot run before a model is loaded for it."""
    for name, value, known in (("device", wish.device, _DEVICES), ("dtype", wish.dtype, _DTYPES)):
        if value not in known:
            raise TraceError(f"--{name} {value!r}: expected one of {', '.join(known)}")
    try:
        import torch
        import transformers  # noqa: F401 - to find it missing now
    except ImportError as error:
        raise TraceError(
            f"capture needs torch and transformers: pip install 'moesim[capture]' ({error})"
        ) from error
    if wish.device == "cuda" and not torch.cuda.is_available():
        raise TraceError("--device cuda: no CUDA device is available, expected one; or pass cpu")


def _load(wish: CaptureWish) -> Any:
    """The model with the weights of its safetensors files; code that comes with it is never run."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, about = AutoModelForCausalLM.from_pretrained(
            wish.model,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=wish.dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise TraceError(f"{wish.model}: cannot be loaded ({_first_line(error)})") from error
    if missing := sorted(about["missing_keys"]):
        raise TraceError(f"{wish.model}: {len(missing)} weights are missing, first {missing[0]}")
    return model.to(wish.device).eval()


def _token_ids(prompts: list[str | list[int]], wish: CaptureWish) -> list[list[int]]:
    """Token ids of every prompt; a tokenizer is loaded only when a prompt is text."""
    if not any(isinstance(prompt, str) for prompt in prompts):
        return [prompt for prompt in prompts if not isinstance(prompt, str)]
    tokenizer = _tokenizer(wish.model)
    return [
        list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # whatever the library makes of files that are not there
        raise TraceError(
            f"{model}: no tokenizer ({_first_line(error)}); give prompts as token ids in .jsonl"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
