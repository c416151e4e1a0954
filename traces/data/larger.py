"""A larger model than the bundled one, in three steps on two machines. See README.md.

    python -m traces.data.larger prepare    text to token numbers, where packages can be fetched
    python -m traces.data.larger train      training and capture, where the GPU is
    python -m traces.data.larger finish     the routing file to a trace and its provenance

Each step starts from the file that the one before left in the work folder, and a step run again
goes on from what is there. `train` needs torch, numpy and that one file.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from traces.data.capture import CapturePlan, capture_together, draw_requests
from traces.data.corpus import LARGER_PACKAGES, Corpus, gather
from traces.data.encoded import EncodedCorpus, file_digest, read_corpus, write_arrays, write_corpus
from traces.data.model import TinyMoe, TinyMoeConfig, flop_per_token
from traces.data.tokenizer import train_tokenizer
from traces.data.training import Run, TrainingPlan, TrainingResult, encode_domains, train
from traces.errors import TraceError
from traces.files import replacing

log = logging.getLogger(__name__)

NAME = "small-moe-64e"
DOMAIN_BYTES = 24_000_000
HELD_OUT_SHARE = 0.04
MAX_CORPUS_BYTES = 55_000_000  # what a copy of the checkout to a GPU machine leaves room for


@dataclass(frozen=True, slots=True)
class Scale:
    """What to train and capture.

    rows  of one batch; each domain has its part, as the square root of its tokens
    """

    name: str
    config: TinyMoeConfig
    plan: TrainingPlan
    rows: int
    requests: CapturePlan


LARGER = Scale(
    name=NAME,
    config=TinyMoeConfig(
        vocab_size=8192,
        hidden=512,
        n_layers=16,
        n_heads=8,
        n_experts=64,
        top_k=8,
        expert_hidden=256,
    ),
    plan=TrainingPlan(
        steps=100_000,  # the clock ends it
        window=512,
        short_window=512,
        short_share=0.0,
        learning_rate=1e-3,
        warmup_steps=100,
    ),
    rows=128,
    requests=CapturePlan(
        requests_per_domain=10, prompt_tokens=(64, 384), decode_tokens=(32, 128), seed=11
    ),
)


def main() -> None:
    """Command line."""
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    corpus, routing = options.work / f"{NAME}-corpus.npz", options.work / f"{NAME}-routing.npz"
    if options.step == "prepare":
        prepare(corpus, LARGER, options.work / "packages")
    elif options.step == "train":
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        run = Run(
            device=device,
            limit_s=60 * options.minutes,
            unfinished=options.work / f"{NAME}-unfinished.pt",
            grouped=not options.loop,
        )
        train_and_capture(options.corpus or corpus, routing, LARGER, run)
    else:
        from traces.data.finish import finish  # the only step that needs more than torch

        finish(options.routing or routing, options.out, options.max_mb * 10**6)


# --- prepare -----------------------------------------------------------------------------------


def prepare(path: Path, scale: Scale, packages: Path) -> None:
    """Fetch text, train a tokenizer, write the encoded corpus; nothing when an equal one is there.

    raises  TraceError when the file is larger than MAX_CORPUS_BYTES
    """
    wanted = {
        "seed": scale.plan.seed,
        "domain_bytes": DOMAIN_BYTES,
        "vocab": scale.config.vocab_size,
    }
    if path.exists() and read_corpus(path).record.get("wanted") == wanted:
        log.info("%s is there already", path)
        return
    corpus = gather(
        packages,
        seed=scale.plan.seed,
        domain_bytes=DOMAIN_BYTES,
        held_out_share=HELD_OUT_SHARE,
        packages=LARGER_PACKAGES,
    )
    encoded = encode_corpus(corpus, scale)
    write_corpus(replace(encoded, record={"wanted": wanted, **encoded.record}), path)
    log.info("%s: %d bytes", path, path.stat().st_size)
    for name, n_tokens in encoded.train_tokens().items():
        log.info("%s: %d training tokens", name, n_tokens)
    if path.stat().st_size > MAX_CORPUS_BYTES:
        raise TraceError(
            f"{path}: {path.stat().st_size} bytes, expected at most {MAX_CORPUS_BYTES};"
            " lower DOMAIN_BYTES"
        )


def encode_corpus(corpus: Corpus, scale: Scale) -> EncodedCorpus:
    """A corpus as token numbers of a tokenizer trained on its training documents."""
    from traces.data.provenance import corpus_record

    tokenizer = train_tokenizer([d.text for d in corpus.train], scale.config.vocab_size)
    log.info("tokenizer: %d ids", tokenizer.vocab_size)
    least = scale.plan.window + 1
    return EncodedCorpus(
        train=encode_domains(corpus.train, tokenizer, least),
        held_out=encode_domains(corpus.held_out, tokenizer, least),
        merges=np.array(tokenizer.merges, dtype=np.int32),
        record=corpus_record(corpus),
    )


# --- train -------------------------------------------------------------------------------------


def train_and_capture(corpus_path: Path, routing: Path, scale: Scale, run: Run) -> None:
    """Train, or take the finished training beside the routing file; then capture and write it."""
    corpus = read_corpus(corpus_path)
    made_from = {
        "corpus": file_digest(corpus_path),
        "config": asdict(scale.config),
        "plan": asdict(scale.plan),
        "rows": scale.rows,
        "limit_s": run.limit_s,
    }
    rows = domain_rows(corpus.train_tokens(), scale.rows)
    run = replace(run, rows=rows, made_from=made_from)
    model, training = trained(corpus, routing.with_name(f"{scale.name}.pt"), scale, run)
    started = time.perf_counter()
    requests = draw_requests(corpus.held_out, scale.requests)
    arrays = capture_together(model, requests, scale.requests, run)
    names = list(corpus.held_out)
    arrays["domain"] = np.array([names.index(r.domain) for r in requests], dtype=np.int16)
    wall_s = round(time.perf_counter() - started, 1)
    log.info("captured %d tokens in %.0f s", len(arrays["topk"]), wall_s)
    record = {
        "name": scale.name,
        "config": asdict(scale.config),
        "positions": scale.plan.window,
        "domains": names,
        "torch": torch.__version__,
        "device": _device_name(run.device),
        "corpus": corpus.record,
        "training": training,
        "capture": {**asdict(scale.requests), "wall_s": wall_s},
    }
    write_arrays(routing, arrays, record)
    log.info("%s: %d bytes", routing, routing.stat().st_size)


def trained(
    corpus: EncodedCorpus, checkpoint: Path, scale: Scale, run: Run
) -> tuple[TinyMoe, dict[str, Any]]:
    """The trained model and what to say of its training; from the checkpoint of an equal run."""
    if scale.config.vocab_size < corpus.vocab_size:
        raise TraceError(
            f"corpus has {corpus.vocab_size} token ids, the model {scale.config.vocab_size}"
        )
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=run.device)
        if saved["made_from"] == run.made_from:
            log.info("taking the trained model of %s", checkpoint)
            model = TinyMoe(scale.config).to(run.device)
            model.load_state_dict(saved["weights"])
            model.group_experts(saved["grouped"])
            return model, saved["training"]
    model, result, curve = train(scale.config, scale.plan, corpus.train, corpus.held_out, run)
    training = training_record(corpus, scale, run, (result, curve))
    saved = {
        "made_from": run.made_from,
        "weights": model.state_dict(),
        "grouped": model.blocks[0].experts.grouped,
        "training": training,
    }
    with replacing(checkpoint) as beside:
        torch.save(saved, beside)
    if run.unfinished is not None:
        run.unfinished.unlink(missing_ok=True)
    return model, training


def training_record(
    corpus: EncodedCorpus,
    scale: Scale,
    run: Run,
    outcome: tuple[TrainingResult, list[dict[str, float]]],
) -> dict[str, Any]:
    """How the training went; `passes` is how often the training text was seen, by domain."""
    result, curve = outcome
    log.info("%s", result)
    rows = run.rows or {}
    total = sum(rows.values())
    passes = {
        name: round(result.tokens_seen * rows[name] / total / n_tokens, 2)
        for name, n_tokens in corpus.train_tokens().items()
    }
    plan = {**asdict(scale.plan), "steps": curve[-1]["step"] + 1}
    flop_per_s = (
        flop_per_token(scale.config, scale.plan.window)
        * result.tokens_seen
        / max(result.wall_s, 0.1)  # rounded to tenths: a tiny run took 0.0
    )
    log.info("%.1f TFLOP/s", flop_per_s / 1e12)
    stopped = {"limit_s": run.limit_s, "rows_by_domain": dict(rows), "passes": passes}
    thinned = curve[:: max(1, len(curve) // 40)]
    kept = thinned if thinned[-1:] == curve[-1:] else [*thinned, curve[-1]]
    return {**plan, **asdict(result), **stopped, "flop_per_s": round(flop_per_s), "curve": kept}


def domain_rows(tokens: dict[str, int], n_rows: int) -> dict[str, int]:
    """Rows of each domain in a batch of n_rows, as the square root of its tokens, at least one.

    Between the same for all (small domains would be learnt by heart) and by size (large ones
    would rule the router). Parts of a row go to the largest remainders.

    raises  TraceError when there are fewer rows than domains
    """
    if n_rows < len(tokens):
        raise TraceError(f"rows={n_rows}: expected at least one for each of {len(tokens)} domains")
    roots = np.sqrt(np.array(list(tokens.values()), dtype=np.float64))
    exact = 1 + (n_rows - len(tokens)) * roots / roots.sum()
    rows = np.floor(exact).astype(np.int64)
    rows[np.argsort(rows - exact, kind="stable")[: n_rows - rows.sum()]] += 1
    return dict(zip(tokens, rows.tolist(), strict=True))


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("prepare", "train", "finish"))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / NAME,
        help="folder for packages, the corpus, checkpoints and the routing",
    )
    parser.add_argument("--corpus", type=Path, help="train: corpus file, else the work folder's")
    parser.add_argument("--minutes", type=float, default=8.0, help="train: time for the steps")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="train: else cuda if there is one"
    )
    parser.add_argument("--loop", action="store_true", help="train: experts one after another")
    parser.add_argument("--routing", type=Path, help="finish: file, else the work folder's")
    parser.add_argument("--out", type=Path, default=Path(), help="finish: result folder")
    parser.add_argument(
        "--max-mb", type=float, default=4.0, help="finish: a trace beyond this drops gate weights"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
