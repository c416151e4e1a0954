"""How fast fitted operators are priced, beside scikit-learn's own trees on the same features.

Run: python benchmarks/operator_costs.py [--small]

CPU seconds of one core, best of three: a million operations of each family in one call, and the
operators of one decode step of 61 layers (DeepSeek-V3's number), one call a family.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from hwmodels.device import Device
from hwmodels.devices import load_device
from hwmodels.fitted import experts
from hwmodels.fitted.model import OperatorModel, fit_model, parts_of, predict

LAYERS = 61


def main() -> None:
    """Print operations a second by family, and the time of a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    n = 20_000 if parser.parse_args().small else 1_000_000
    device, models = load_device("h100"), {}
    for family, draw in WORK.items():
        work = draw(2000)
        floor = sum(parts_of(family, device, work).memory.values()) + 5e-6
        models[family] = fit_model(family, "made up law x", device, work, np.asarray(floor))
    for family, model in models.items():
        _report(family, model, device, n)
    step = {family: draw(LAYERS) for family, draw in WORK.items()}

    def price_step() -> None:
        for family, work in step.items():
            predict(models[family], device, work)

    out = f"one step of {LAYERS} layers, {len(step)} families: {1e3 * _best(price_step):.2f} ms\n"
    sys.stdout.write(out)


def _report(family: str, model: OperatorModel, device: Device, n: int) -> None:
    work = WORK[family](n)
    predict(model, device, {name: column[:10] for name, column in work.items()})  # compile
    ours = n / _best(lambda: predict(model, device, work))
    features = parts_of(family, device, work).features().T[: n // 10]
    peer = HistGradientBoostingRegressor(max_iter=60, max_leaf_nodes=31, max_depth=6)
    peer.fit(features[:2000], np.arange(2000.0))
    theirs = len(features) / _best(lambda: peer.predict(features))
    sys.stdout.write(
        f"{family}: {ours / 1e6:.2f} M operations/s, all in; scikit-learn's trees alone"
        f" {theirs / 1e6:.2f} M/s\n"
    )


def _best(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(3):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return min(taken)


def _sizes(n: int, *ranges: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.exp2(rng.integers(low, high, n)).astype(np.float64) for low, high in ranges]


def _products(n: int) -> dict[str, np.ndarray]:
    m, wide, deep = _sizes(n, (0, 13), (8, 14), (8, 14))
    bits = np.full(n, 16.0)
    return {"m": m, "n": wide, "k": deep, "weight_bits": bits, "activation_bits": bits}


def _layers(n: int) -> dict[str, np.ndarray]:
    rng, ones = np.random.default_rng(0), np.ones(n)
    counts = rng.integers(0, 40, (n, 32))
    counts[:, 0] += 1
    routed = experts.routed(counts)
    return routed | {
        "tokens": routed["copies"], "hidden": 7168 * ones, "intermediate": 2048 * ones,
        "top_k": 8 * ones, "experts": 256 * ones, "local_experts": 32 * ones,
        "weight_bits": 8 * ones, "activation_bits": 8 * ones, "matrices": 3 * ones,
    }  # fmt: skip


def _attention(n: int) -> dict[str, np.ndarray]:
    batch, cached = _sizes(n, (0, 9), (7, 15))
    ones = np.ones(n)
    return {"batch": batch, "new_tokens": ones, "cached_tokens": cached, "heads": 32 * ones,
            "kv_heads": 4 * ones, "head_dim": 128 * ones, "window": 0 * ones, "kv_bits": 16 * ones,
            "activation_bits": 16 * ones}  # fmt: skip


WORK: dict[str, Callable[[int], dict[str, np.ndarray]]] = {
    "gemm": _products, "experts": _layers, "attention_decode": _attention
}  # fmt: skip

if __name__ == "__main__":
    main()
