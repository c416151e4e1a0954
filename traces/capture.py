"""Capture: run a Hugging Face MoE and keep what its routers chose, token by token.

`capture` generates from prompts and gives the trace. `Recorder` is the part below it: a context
manager that listens to every forward pass of a model, whoever calls it:

    with Recorder(model) as recorder:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8)
    trace = recorder.trace()

Padding is what the attention mask says it is and never enters the trace. Needs torch and
transformers only when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.routers import CaptureError, Choice, Router, find_routers, read_output
from traces.routing import DECODE, PREFILL, RoutingTrace

__all__ = ["CaptureError", "Recorder", "capture"]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of one forward pass that are not padding, in the order of the batch.

    kept      int64[kept], their places in the flattened batch of n_rows * n_columns tokens
    request   int32[kept];  position  int32[kept];  phase  of all of them
    """

    n_batch_tokens: int
    kept: npt.NDArray[np.int64]
    request: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    phase: int


@dataclass(frozen=True, slots=True)
class _Pass:
    """One finished forward pass: its tokens and one Choice a layer, as arrays on the host."""

    tokens: _Tokens
    topk: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float16] | None
    scores: npt.NDArray[np.float16] | None


class Recorder:
    """Listens to the routers of a model; every forward pass of the model adds its tokens.

    A pass with an empty cache starts new requests, numbered on, one a batch row. A later pass goes
    on with the rows of the last start; it is decode when it brings one token a row, else prefill
    (in pieces). Positions count the tokens that are not padding. Everything stays in host memory:
    2 * layers * (2 * top_k + experts) bytes a token with scores.
    """

    def __init__(self, model: Any, scores: bool = True) -> None:
        """Find the routers; CaptureError when there are none."""
        self._model = model
        self._routers = find_routers(model)
        self._scores = scores
        self._n_experts = self._routers[0].n_experts
        self._handles: list[Any] = []
        self._passes: list[_Pass] = []
        self._choices: dict[int, Choice] = {}
        self._tokens: _Tokens | None = None
        self._first_request, self._n_rows = 0, 0

    def __enter__(self) -> Recorder:
        """Start to listen."""
        register = self._model.register_forward_pre_hook
        self._handles = [register(self._before, with_kwargs=True)]
        self._handles += [
            router.module.register_forward_hook(self._listener(router)) for router in self._routers
        ]
        self._handles.append(self._model.register_forward_hook(self._after))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop to listen; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def n_requests(self) -> int:
        """Requests seen so far."""
        return self._first_request + self._n_rows

    def trace(self, how: str = "") -> RoutingTrace:
        """All passes so far as one trace, in the order they ran.

        how     a word on the run, put after the versions and the class in the trace's `capture`
        raises  CaptureError when no pass was seen
        """
        if not self._passes:
            raise CaptureError(f"{type(self._model).__name__}: no forward pass was captured")
        tokens = [each.tokens for each in self._passes]
        sizes = [len(each.kept) for each in tokens]
        return RoutingTrace(
            topk=np.concatenate([each.topk for each in self._passes]),
            n_experts=self._n_experts,
            layers=tuple(router.layer for router in self._routers),
            request=np.concatenate([each.request for each in tokens]),
            position=np.concatenate([each.position for each in tokens]),
            phase=np.repeat([each.phase for each in tokens], sizes).astype(np.int8),
            forward=np.repeat(np.arange(len(sizes)), sizes).astype(np.int64),
            weights=_joined([each.weights for each in self._passes]),
            scores=_joined([each.scores for each in self._passes]),
            model=_name(self._model),
            capture=", ".join(filter(None, (_versions(self._model), how))),
        )

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        n_rows, n_columns = _batch_shape(args, kwargs, module)
        mask, past = _mask_and_past(args, kwargs, (n_rows, n_columns))
        if not past:
            self._first_request, self._n_rows = self.n_requests, n_rows
        elif n_rows != self._n_rows:
            raise CaptureError(
                f"{type(module).__name__}: a batch of {n_rows} rows goes on with"
                f" {self._n_rows} requests, expected as many rows"
            )
        phase = DECODE if past and n_columns == 1 else PREFILL
        self._choices = {}
        self._tokens = _tokens_of(mask, n_columns, self._first_request, phase)

    def _listener(self, router: Router) -> Callable[[Any, Any, Any], None]:
        def listen(module: Any, args: Any, output: Any) -> None:
            if self._tokens is None:
                return  # called outside the model's forward pass
            if router.layer in self._choices:
                raise CaptureError(f"router {router.name}: ran twice in one forward pass")
            choice = read_output(router, output, self._tokens.n_batch_tokens)
            if choice.logits is not None:  # more than the config says with zero-work experts
                self._n_experts = max(self._n_experts, int(choice.logits.shape[1]))
            self._choices[router.layer] = _on_host(choice, self._tokens.kept, self._scores)

        return listen

    def _after(self, module: Any, args: Any, output: Any) -> None:
        tokens, self._tokens = self._tokens, None
        silent = [each.name for each in self._routers if each.layer not in self._choices]
        if silent or tokens is None:
            raise CaptureError(
                f"{type(module).__name__}: router {silent[:1]} did not run; a fused kernel may"
                " stand in for its block"
            )
        choices = [self._choices[router.layer] for router in self._routers]
        topk = np.stack([each.indices for each in choices], axis=1)
        weights = _stacked([each.weights for each in choices])
        scores = _stacked([each.logits for each in choices])
        self._passes.append(_Pass(tokens, topk, weights, scores))


def capture(
    model: Any,
    prompts: Sequence[Sequence[int]],
    n_new_tokens: int = 32,
    batch_size: int = 8,
    scores: bool = True,
    done: Callable[[int], None] = lambda n: None,
) -> RoutingTrace:
    """The routing of prompts and of the tokens that the model generates greedily after them.

    prompts       token ids; request i of the trace is prompts[i]
    n_new_tokens  generated per prompt, >= 1, fewer where the model ends the text; the last one is
                  never fed back, so a request has at most n_new_tokens - 1 decode tokens
    batch_size    prompts generated together, padded on the left; 1 for a model whose attention
                  takes no padding mask into account (seen: DeepSeek-V4)
    done          told the number of prompts finished after each batch
    raises        CaptureError for a model without routers or prompts that are not of the model
    """
    _check(model, prompts, n_new_tokens, batch_size)
    stops: list[int] = []
    with Recorder(model, scores) as recorder, _evaluating(model):
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            stops += _generate(model, batch, n_new_tokens)
            done(len(batch))
    trace = recorder.trace(f"greedy, batches of {batch_size}")
    return trace.rows(trace.position < np.array(stops)[trace.request])


def _generate(model: Any, batch: Sequence[Sequence[int]], n_new_tokens: int) -> list[int]:
    """Generate from one batch; of each prompt, the position at which its text has ended.

    Rows that have ended ride along as padding that no mask marks until the last row ends.
    """
    import torch

    pad, ends = _special_tokens(model)
    width = max(map(len, batch))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in batch]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]
    made = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=n_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        disable_compile=True,
        return_dict_in_generate=False,
        pad_token_id=pad,
    )
    new = made[:, width:].tolist()
    return [len(p) + _until_end(row, ends) for p, row in zip(batch, new, strict=True)]


def _until_end(tokens: list[int], ends: frozenset[int]) -> int:
    """Tokens before the first that ends a text; all of them when none does."""
    return next((place for place, token in enumerate(tokens) if token in ends), len(tokens))


def _special_tokens(model: Any) -> tuple[int, frozenset[int]]:
    """The token to pad with, and those that end a text."""
    config = model.generation_config
    ends = config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return max(config.pad_token_id or 0, 0), frozenset(ends)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model without dropout and router noise; its mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check(
    model: Any, prompts: Sequence[Sequence[int]], n_new_tokens: int, batch_size: int
) -> None:
    if not prompts:
        raise CaptureError("prompts: none, expected at least 1")
    for name, value in {"n_new_tokens": n_new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise CaptureError(f"{name}: {value}, expected at least 1")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise CaptureError(f"prompt {place}: empty, expected at least 1 token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise CaptureError(
                f"prompt {place}: token ids {min(prompt)}..{max(prompt)},"
                f" expected 0..{vocabulary - 1}"
            )


def _batch_shape(args: tuple[Any, ...], kwargs: dict[str, Any], module: Any) -> tuple[int, int]:
    """(rows, columns) of the batch that a forward pass was given."""
    for given in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if given is not None:
            return int(given.shape[0]), int(given.shape[1])
    raise CaptureError(f"{type(module).__name__}: called without input_ids or inputs_embeds")


def _mask_and_past(
    args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, int]
) -> tuple[npt.NDArray[np.bool_], int]:
    """(bool[rows, past + columns], past): what is no padding, and the columns already cached."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if mask is None:
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        return np.ones((shape[0], past + shape[1]), dtype=np.bool_), past
    size = tuple(getattr(mask, "shape", ()))
    if len(size) != 2 or size[0] != shape[0] or size[1] < shape[1]:
        raise CaptureError(
            f"attention_mask: {list(size)}, expected [{shape[0]}, {shape[1]} or more columns]"
        )
    return mask.detach().cpu().numpy().astype(np.bool_), size[1] - shape[1]


def _tokens_of(
    mask: npt.NDArray[np.bool_], n_columns: int, first_request: int, phase: int
) -> _Tokens:
    """The tokens of the last n_columns columns that the mask keeps."""
    position = (np.cumsum(mask, axis=1) - 1)[:, -n_columns:]
    keep = mask[:, -n_columns:]
    row = np.nonzero(keep)[0]
    return _Tokens(
        n_batch_tokens=keep.size,
        kept=np.flatnonzero(keep),
        request=(first_request + row).astype(np.int32),
        position=position[keep].astype(np.int32),
        phase=phase,
    )


def _on_host(choice: Choice, kept: npt.NDArray[np.int64], scores: bool) -> Choice:
    """The rows of the tokens kept, as arrays of the trace's types."""
    import torch

    place = torch.from_numpy(kept).to(choice.indices.device)

    def rows(tensor: Any, dtype: Any) -> npt.NDArray[Any]:
        return np.asarray(tensor[place].to(dtype).cpu().numpy())

    return Choice(
        rows(choice.indices, torch.int16),
        None if choice.weights is None else rows(choice.weights, torch.float16),
        None if choice.logits is None or not scores else rows(choice.logits, torch.float16),
    )


def _stacked(parts: Sequence[Any]) -> npt.NDArray[np.float16] | None:
    """One array [tokens, layers, width]; None when a layer has none."""
    return None if any(part is None for part in parts) else np.stack(parts, axis=1)


def _joined(parts: Sequence[Any]) -> npt.NDArray[np.float16] | None:
    """One array over all passes; None when a pass has none."""
    return None if any(part is None for part in parts) else np.concatenate(parts)


def _name(model: Any) -> str:
    """The name on the hub, or that of the folder the model came from."""
    name = getattr(model.config, "name_or_path", "") or ""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _versions(model: Any) -> str:
    import transformers

    return f"transformers {transformers.__version__} {type(model).__name__} forward hooks"
