"""Training of the tiny model: domain-stratified batches, AdamW, seeded and repeatable."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from traces.data.corpus import Document
from traces.data.model import Routed, TinyMoe, TinyMoeConfig
from traces.data.tokenizer import BytePairTokenizer

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

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then a cosine to a twentieth."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What training cost and gave; losses in nats per token."""

    tokens_seen: int
    train_loss: float
    validation_loss: float
    wall_s: float


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


def batches(domains: EncodedDomains, plan: TrainingPlan) -> Iterator[Tensor]:
    """Endless int64[rows, tokens + 1]; a document's chance is its length."""
    rng = np.random.default_rng([plan.seed, 1])
    chances = {name: _length_shares(documents) for name, documents in domains.items()}
    step = 0
    while True:
        rows_per_domain, n_tokens = plan.batch_shape(step)
        rows = []
        for name, documents in domains.items():
            for pick in rng.choice(len(documents), size=rows_per_domain, p=chances[name]):
                rows.append(window(documents[pick], n_tokens + 1, rng))
        yield torch.from_numpy(np.stack(rows))
        step += 1


def window(document: np.ndarray, n_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """A random stretch of n_tokens of a document that has at least as many."""
    start = rng.integers(len(document) - n_tokens + 1)
    return document[start : start + n_tokens]


def train(
    config: TinyMoeConfig, plan: TrainingPlan, domains: EncodedDomains, held_out: EncodedDomains
) -> tuple[TinyMoe, TrainingResult]:
    """Train a fresh model; equal inputs and thread count give equal weights."""
    torch.manual_seed(plan.seed)
    model = TinyMoe(config)
    optimizer = _optimizer(model, plan)
    started, seen, losses = time.perf_counter(), 0, []
    for step, batch in zip(range(plan.steps), batches(domains, plan), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        losses.append(train_step(model, optimizer, batch, plan))
        seen += batch[:, 1:].numel()
        if step % 25 == 0 or step == plan.steps - 1:
            rate = seen / (time.perf_counter() - started)
            log.info("step %d loss %.3f, %.0f tokens/s", step, np.mean(losses[-25:]), rate)
    wall_s = time.perf_counter() - started
    final = round(float(np.mean(losses[-50:])), 4)
    validation = round(validation_loss(model, held_out, plan), 4)
    return model, TrainingResult(seen, final, validation, round(wall_s, 1))


def train_step(
    model: TinyMoe, optimizer: torch.optim.Optimizer, batch: Tensor, plan: TrainingPlan
) -> float:
    """One optimizer step on int64[rows, tokens + 1]; the language loss before it."""
    logits, routing = model(batch[:, :-1])
    language = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss = language + router_loss(routing, plan)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip_norm)
    optimizer.step()
    return language.item()


def router_loss(routing: list[Routed], plan: TrainingPlan) -> Tensor:
    """Weighted load-balancing and z losses, sum over layers."""
    balance = torch.stack([routed.balance_loss for routed in routing]).sum()
    z = torch.stack([routed.z_loss for routed in routing]).sum()
    return plan.balance_weight * balance + plan.z_weight * z


@torch.no_grad()
def validation_loss(
    model: TinyMoe, held_out: EncodedDomains, plan: TrainingPlan, n_batches: int = 8
) -> float:
    """Language loss on full windows of held-out documents, each domain weighing the same."""
    rng = np.random.default_rng([plan.seed, 2])
    losses = []
    for _ in range(n_batches):
        rows = [
            window(documents[rng.integers(len(documents))], plan.window + 1, rng)
            for documents in held_out.values()
        ]
        batch = torch.from_numpy(np.stack(rows))
        logits, _ = model(batch[:, :-1])
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item())
    return float(np.mean(losses))


def _length_shares(documents: list[np.ndarray]) -> np.ndarray:
    lengths = np.array([len(document) for document in documents], dtype=np.float64)
    return lengths / lengths.sum()


def _optimizer(model: TinyMoe, plan: TrainingPlan) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": plan.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95))
