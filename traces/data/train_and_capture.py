"""Make the bundled trace: corpus, tokenizer, model, training, capture, files. See README.md.

python -m traces.data.train_and_capture
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from traces.data.capture import CapturePlan, capture
from traces.data.corpus import Corpus, gather
from traces.data.model import TinyMoe, TinyMoeConfig
from traces.data.provenance import corpus_record, write_files
from traces.data.tokenizer import BytePairTokenizer, train_tokenizer
from traces.data.training import TrainingPlan, TrainingResult, encode_domains, train

log = logging.getLogger(__name__)

NAME = "tiny-moe-32e"
DOMAIN_BYTES = 1_500_000
HELD_OUT_SHARE = 0.15


def main() -> None:
    """Command line."""
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    options.work.mkdir(parents=True, exist_ok=True)
    corpus = gather(
        options.work / "packages",
        seed=options.seed,
        domain_bytes=DOMAIN_BYTES,
        held_out_share=HELD_OUT_SHARE,
    )
    plan = TrainingPlan(steps=options.steps, seed=options.seed)
    model, tokenizer, result = trained(corpus, plan, options.work / f"{NAME}.pt")
    held_out = encode_domains(corpus.held_out, tokenizer, plan.window + 1)
    requests = CapturePlan()
    started = time.perf_counter()
    trace, domains = capture(model, held_out, requests, NAME)
    log.info("captured %d tokens", trace.n_tokens)
    record: dict[str, Any] = {
        "corpus": corpus_record(corpus),
        "training": {**asdict(plan), **asdict(result), "threads": options.threads},
        "capture": {**asdict(requests), "wall_s": round(time.perf_counter() - started)},
    }
    write_files(options.out, NAME, model, (trace, domains), record)


def trained(
    corpus: Corpus, plan: TrainingPlan, checkpoint: Path
) -> tuple[TinyMoe, BytePairTokenizer, TrainingResult]:
    """The trained model; from the checkpoint when an earlier equal run got that far."""
    config = TinyMoeConfig()
    made_from = {"config": asdict(config), "plan": asdict(plan), "sources": corpus.sources}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["made_from"] == made_from:
            tokenizer = BytePairTokenizer([(left, right) for left, right in saved["merges"]])
            model = TinyMoe(config)
            model.load_state_dict(saved["weights"])
            return model, tokenizer, TrainingResult(**saved["result"])
    tokenizer = train_tokenizer([d.text for d in corpus.train], config.vocab_size)
    documents = encode_domains(corpus.train, tokenizer, plan.window + 1)
    held_out = encode_domains(corpus.held_out, tokenizer, plan.window + 1)
    log.info("%d training tokens", sum(len(d) for ds in documents.values() for d in ds))
    model, result, _ = train(config, plan, documents, held_out)
    log.info("%s", result)
    saved = {"made_from": made_from, "weights": model.state_dict(), "result": asdict(result)}
    torch.save({**saved, "merges": tokenizer.merges}, checkpoint)
    return model, tokenizer, result


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="result folder")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / NAME,
        help="folder for packages and the checkpoint; a second run starts from what is there",
    )
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
