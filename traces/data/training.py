"""Training on a CPU or GPU: domain-stratified batches, AdamW, seeded, by steps or by the clock."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from traces.data.corpus import Document
from traces.data.model import Routed, TinyMoe, TinyMoeConfig, grouping_works
from traces.data.tokenizer import BytePairTokenizer
from traces.files import replacing

log = logging.getLogger(__name__)

EncodedDomains = dict[str, list[np.ndarray]]


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How to train; one window of each domain per batch row, so every batch is the same mix."""

    steps: int = 1000
    seed: int = 7
    window: int = 384
    short_window: int = 128  # windows of the first part, cheaper and more documents per batch
    short_share: float = 0.7
    rows_per_domain: int = 1  # of full windows; short ones hold the same number of tokens
    learning_rate: float = 3e-3
    warmup_steps: int = 40
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_weight: float = 0.01
    z_weight: float = 0.001

    def batch_shape(self, step: int) -> tuple[int, int]:
        """Rows per domain and tokens per row at a step."""
        if step >= self.short_share * self.steps:
            return self.rows_per_domain, self.window
        return self.rows_per_domain * self.window // self.short_window, self.short_window

    def rate(self, step: int, done: float | None = None) -> float:
        """Learning rate at a step: linear warm-up, then a cosine to a twentieth.

        done  share of the training behind this step; from the number of steps when not given
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if done is None:
            done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What training cost and gave; losses in nats per token."""

    tokens_seen: int
    train_loss: float
    validation_loss: float
    wall_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """Where and for how long to train; the default is a whole training on the CPU, in float32.

    limit_s       stop and finish the cosine by this many seconds of training, or None: by steps
    rows          rows per domain of every batch where they differ, else the plan's for each
    unfinished    file that holds a training that was cut off, or None to keep none; a training of
                  equal `made_from` goes on from there
    save_every_s  how often that file is written
    grouped       on a GPU, compute experts as grouped products where that works
    """

    device: str = "cpu"
    limit_s: float | None = None
    rows: Mapping[str, int] | None = None
    unfinished: Path | None = None
    save_every_s: float = 240.0
    grouped: bool = True
    made_from: Mapping[str, Any] = field(default_factory=dict)

    def autocast(self) -> torch.autocast:
        """Products in bfloat16 on a GPU; float32 throughout on the CPU."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def place(self, batch: Tensor) -> Tensor:
        """The batch on the device, copied without waiting for it."""
        if self.device != "cuda":
            return batch.to(self.device)
        return batch.pin_memory().to(self.device, non_blocking=True)


CPU_RUN = Run()


@dataclass(slots=True)
class Progress:
    """How far a training is; losses in nats per token, at most the last LAST_LOSSES of them."""

    step: int = 0
    tokens_seen: int = 0
    spent_s: float = 0.0  # by earlier, interrupted runs
    losses: list[Tensor] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)


LAST_LOSSES, LOG_EVERY = 50, 25


def encode_domains(
    documents: Sequence[Document], tokenizer: BytePairTokenizer, min_tokens: int
) -> EncodedDomains:
    """Token arrays (int64) of each domain's documents with at least min_tokens tokens."""
    encoded: EncodedDomains = {}
    for document in documents:
        ids = tokenizer.encode(document.text)
        if len(ids) >= min_tokens:
            encoded.setdefault(document.domain, []).append(np.array(ids))
    return encoded


def batches(
    domains: EncodedDomains,
    plan: TrainingPlan,
    rows: Mapping[str, int] | None = None,
    first_step: int = 0,
) -> Iterator[Tensor]:
    """Endless int64[rows, tokens + 1]; a document's chance is its length.

    rows  of each domain in a batch, or None: as many as the plan says of every domain
    """
    rng = np.random.default_rng([plan.seed, 1, first_step] if first_step else [plan.seed, 1])
    chances = {name: _length_shares(documents) for name, documents in domains.items()}
    step = first_step
    while True:
        rows_per_domain, n_tokens = plan.batch_shape(step)
        picked = []
        for name, documents in domains.items():
            n_rows = rows_per_domain if rows is None else rows[name]
            for pick in rng.choice(len(documents), size=n_rows, p=chances[name]):
                picked.append(window(documents[pick], n_tokens + 1, rng))
        yield torch.from_numpy(np.stack(picked).astype(np.int64, copy=False))
        step += 1


def window(document: np.ndarray, n_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """A random stretch of n_tokens of a document that has at least as many."""
    start = rng.integers(len(document) - n_tokens + 1)
    return document[start : start + n_tokens]


def train(
    config: TinyMoeConfig,
    plan: TrainingPlan,
    domains: EncodedDomains,
    held_out: EncodedDomains,
    run: Run = CPU_RUN,
) -> tuple[TinyMoe, TrainingResult, list[dict[str, float]]]:
    """Train a fresh model, or go on with an unfinished one; the loss curve comes third.

    On the CPU equal inputs and thread count give equal weights.
    """
    torch.manual_seed(plan.seed)
    model = TinyMoe(config).to(run.device)
    model.group_experts(run.device == "cuda" and run.grouped and _groups(config, run.device))
    optimizer = _optimizer(model, plan, run.device)
    progress = _resumed(model, optimizer, run)
    spent_s = _train_on(model, optimizer, plan, (domains, run, progress))
    final = round(float(np.mean([float(loss) for loss in progress.losses])), 4)
    validation = round(validation_loss(model, held_out, plan, run=run), 4)
    result = TrainingResult(progress.tokens_seen, final, validation, round(spent_s, 1))
    return model, result, progress.curve


def _train_on(
    model: TinyMoe,
    optimizer: torch.optim.Optimizer,
    plan: TrainingPlan,
    state: tuple[EncodedDomains, Run, Progress],
) -> float:
    """Step until the plan's steps or the run's seconds are over; seconds spent in all."""
    domains, run, progress = state
    started = time.perf_counter() - progress.spent_s
    saved_s = progress.spent_s
    stream = batches(domains, plan, run.rows, progress.step)
    while progress.step < plan.steps:
        spent_s = time.perf_counter() - started
        done = None if run.limit_s is None else spent_s / run.limit_s
        if done is not None and done >= 1:
            break
        if run.unfinished is not None and spent_s - saved_s >= run.save_every_s:
            _save(model, optimizer, run, progress, spent_s)
            saved_s = spent_s
        batch = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(progress.step, done)
        loss = train_step(model, optimizer, run.place(batch), plan, run)
        progress.losses = [*progress.losses[1 - LAST_LOSSES :], loss]
        progress.tokens_seen += batch[:, 1:].numel()
        if progress.step % LOG_EVERY == 0:
            _note(progress, time.perf_counter() - started)
        progress.step += 1
    if progress.losses:
        _note(progress, time.perf_counter() - started, last=True)
    return time.perf_counter() - started


def _note(progress: Progress, spent_s: float, last: bool = False) -> None:
    """Log the mean loss of the last steps; reading it waits for the device.

    raises  ArithmeticError when it is not finite: more steps would be for nothing
    """
    step = progress.step - last
    recent = float(np.mean([float(loss) for loss in progress.losses[-LOG_EVERY:]]))
    if not math.isfinite(recent):
        raise ArithmeticError(f"step {step}: loss is {recent}, expected a finite number")
    rate = progress.tokens_seen / spent_s
    spent, loss = round(spent_s, 1), round(recent, 4)
    point = {"step": step, "tokens": progress.tokens_seen, "spent_s": spent, "loss": loss}
    if not progress.curve or progress.curve[-1]["step"] != step:
        progress.curve.append(point)
    log.info("step %d loss %.3f, %.0f tokens/s", step, recent, rate)


def _groups(config: TinyMoeConfig, device: str) -> bool:
    works = grouping_works(device, config.hidden, config.expert_hidden)
    log.info("experts: %s", "grouped products" if works else "one after another")
    return works


def _save(
    model: TinyMoe, optimizer: torch.optim.Optimizer, run: Run, progress: Progress, spent_s: float
) -> None:
    if run.unfinished is None:
        return
    content = {
        "made_from": dict(run.made_from),
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": {
            "step": progress.step,
            "tokens_seen": progress.tokens_seen,
            "spent_s": spent_s,
            "losses": [loss.cpu() for loss in progress.losses],
            "curve": progress.curve,
        },
    }
    with replacing(run.unfinished) as beside:
        torch.save(content, beside)


def _resumed(model: TinyMoe, optimizer: torch.optim.Optimizer, run: Run) -> Progress:
    """Where an interrupted equal run was; a fresh start without one."""
    if run.unfinished is None or not run.unfinished.exists():
        return Progress()
    saved = torch.load(run.unfinished, weights_only=True, map_location=run.device)
    if saved["made_from"] != run.made_from:
        return Progress()
    model.load_state_dict(saved["weights"])
    optimizer.load_state_dict(saved["optimizer"])
    log.info("going on from step %d", saved["progress"]["step"])
    return Progress(**saved["progress"])


def train_step(
    model: TinyMoe,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    plan: TrainingPlan,
    run: Run = CPU_RUN,
) -> Tensor:
    """One optimizer step on int64[rows, tokens + 1]; the language loss before it, a scalar."""
    with run.autocast():
        logits, routing = model(batch[:, :-1])
        language = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss = language + router_loss(routing, plan)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip_norm)
    optimizer.step()
    return language.detach()


def router_loss(routing: list[Routed], plan: TrainingPlan) -> Tensor:
    """Weighted load-balancing and z losses, sum over layers."""
    balance = torch.stack([routed.balance_loss for routed in routing]).sum()
    z = torch.stack([routed.z_loss for routed in routing]).sum()
    return plan.balance_weight * balance + plan.z_weight * z


@torch.no_grad()
def validation_loss(
    model: TinyMoe,
    held_out: EncodedDomains,
    plan: TrainingPlan,
    n_batches: int = 8,
    run: Run = CPU_RUN,
) -> float:
    """Language loss on full windows of held-out documents, each domain weighing the same."""
    rng = np.random.default_rng([plan.seed, 2])
    losses = []
    for _ in range(n_batches):
        rows = [
            window(documents[rng.integers(len(documents))], plan.window + 1, rng)
            for documents in held_out.values()
        ]
        batch = run.place(torch.from_numpy(np.stack(rows).astype(np.int64, copy=False)))
        with run.autocast():
            logits, _ = model(batch[:, :-1])
            losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item())
    return float(np.mean(losses))


def _length_shares(documents: list[np.ndarray]) -> np.ndarray:
    lengths = np.array([len(document) for document in documents], dtype=np.float64)
    return lengths / lengths.sum()


def _optimizer(model: TinyMoe, plan: TrainingPlan, device: str) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": plan.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=device == "cuda"
    )
