"""Fitted operators: the formula recovers a known law, trees what it leaves, and work is checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.devices import load_device
from hwmodels.errors import HardwareError
from hwmodels.fitted import experts, formula, gemm
from hwmodels.fitted.benchmark_routing import rank_counts
from hwmodels.fitted.model import FAMILIES, fit_model, parts_of, predict
from hwmodels.fitted.store import FittedDevice, load, save
from hwmodels.fitted.trees import LEARNING_RATE, MOST_LEVELS, evaluate, grow

H100, H200 = load_device("h100"), load_device("h200")
LAW = {"memory": 1.1, "cache": 0.6, "arithmetic": 1.3, "waves": 0.1, "depth": 0.3,
       "activations": 0.2, "operands": 0.1, "overlap": 1.5, "floor_s": 4e-6}  # fmt: skip


def products(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    size = lambda low, high: np.exp2(rng.integers(low, high, n)).astype(float)  # noqa: E731
    return {"m": size(0, 14), "n": size(6, 14), "k": size(6, 14),
            "weight_bits": np.full(n, 16.0), "activation_bits": np.full(n, 16.0)}  # fmt: skip


def layers(n: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = np.exp2(rng.integers(0, 13, n)).astype(int)
    counts = np.stack([rank_counts(int(t), 64, 8, 4, "power_law_1.2")[0] for t in tokens])
    ones = np.ones(n)
    return {"tokens": tokens.astype(float), "hidden": ones * rng.choice([1024, 4096], n),
            "intermediate": ones * rng.choice([256, 768], n), "top_k": 8 * ones,
            "experts": 64 * ones, "local_experts": 16 * ones, "weight_bits": 16 * ones,
            "activation_bits": 16 * ones, "matrices": 3 * ones,
            **experts.routed(counts)}  # fmt: skip


@pytest.fixture(scope="module")
def fitted():
    work = products(1500)
    return fit_model("gemm", "a 1 bfloat16 b", H100, work, law_seconds(H100, work))


def law_seconds(device, work) -> np.ndarray:
    return formula.seconds(LAW, parts_of("gemm", device, work))


def test_a_fit_to_a_known_law_predicts_it_on_unseen_sizes_and_on_another_device(fitted) -> None:
    unseen = products(300, seed=1)
    for device, bar in ((H100, 0.02), (H200, 0.03)):
        errors = predict(fitted, device, unseen).seconds / law_seconds(device, unseen) - 1
        assert np.abs(errors).mean() < bar


def test_the_formula_alone_recovers_the_rate_of_memory_and_of_arithmetic() -> None:
    parts = parts_of("gemm", H100, products(2000))
    found = formula.fit(parts, formula.seconds(LAW, parts))
    again = formula.seconds(found, parts)
    assert np.abs(again / formula.seconds(LAW, parts) - 1).max() < 0.05
    assert found["memory"] == pytest.approx(LAW["memory"], rel=0.05)


def test_compact_trees_say_what_the_trees_that_were_grown_say() -> None:
    from sklearn.ensemble import HistGradientBoostingRegressor

    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 4)).astype(np.float32)
    y = np.where(x[:, 0] > 0.3, 1.0, -1.0) * x[:, 1] + 0.1 * x[:, 2]
    same = HistGradientBoostingRegressor(
        loss="absolute_error", max_iter=20, learning_rate=LEARNING_RATE, max_leaf_nodes=15,
        min_samples_leaf=20, max_depth=MOST_LEVELS, l2_regularization=1.0, early_stopping=False,
        random_state=0,
    ).fit(x, y)  # fmt: skip
    columns = np.ascontiguousarray(x.T)
    found = evaluate(grow(columns, y, 20, 15), columns)
    differs = np.abs(found - same.predict(x))  # numbers are kept to 11 bits
    assert np.median(differs) < 1e-4
    assert (differs > 0.01).mean() < 0.05
    assert np.abs(found - y).mean() < 0.5 * np.abs(y - np.median(y)).mean()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_missing_column_is_named(family: str) -> None:
    with pytest.raises(HardwareError, match="is missing"):
        parts_of(family, H100, {"unheard": np.ones(3)})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"m": np.array([-1.0, 2.0])}, r"m=-1 must be >= 0"),
        ({"k": np.array([np.nan, 2.0])}, r"k=nan must be >= 0"),
        ({"n": np.ones(3)}, r"shape \(2,\), expected \(3,\)|shape \(3,\), expected \(2,\)"),
    ],
)
def test_work_that_cannot_be_is_refused(changed: dict, said: str) -> None:
    with pytest.raises(HardwareError, match=said):
        gemm.parts(H100, products(2) | changed)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("distinct", 99.0, "distinct=99 is more than local_experts"),
        ("copies", 1e9, "copies=1e\\+09 is more than tokens \\* top_k"),
        ("local_experts", 128.0, "local_experts=128 is more than experts"),
        ("hidden", 0.0, "hidden=0 must be > 0"),
    ],
)
def test_counts_that_no_routing_gives_are_refused(column: str, value: float, said: str) -> None:
    work = layers(50)
    with pytest.raises(HardwareError, match=said):
        experts.parts(H100, work | {column: np.full(50, value)})


def test_a_layer_costs_more_time_with_more_distinct_experts_and_with_more_copies() -> None:
    """The physical parts never fall when a rank gets another token."""
    few = np.zeros((1, 16), int)
    few[0, :3] = 4
    more_tokens, more_experts = few.copy(), few.copy()
    more_tokens[0, 0] += 40
    more_experts[0, 9] = 1
    base = {name: column[:1] for name, column in layers(1).items()} | {"tokens": np.array([64.0])}

    def total(counts: np.ndarray) -> float:
        parts = experts.parts(H100, base | experts.routed(counts))
        sums = [sum(float(v[0]) for v in group.values())
                for group in (parts.memory, parts.compute, parts.serial)]  # fmt: skip
        return sum(sums)

    assert total(more_tokens) > total(few)
    assert total(more_experts) > total(few)


def test_sizes_outside_the_measured_range_and_other_devices_are_marked(fitted) -> None:
    inside = products(50)
    assert not predict(fitted, H100, inside).extrapolated.any()
    assert predict(fitted, H200, inside).extrapolated.all()
    beyond = inside | {"m": np.full(50, 2.0**17)}
    assert predict(fitted, H100, beyond).extrapolated.all()


def test_what_was_saved_predicts_the_same_and_equal_fits_give_equal_bytes(
    fitted, tmp_path: Path
) -> None:
    kept = FittedDevice("h100", (fitted,), ("a.parquet",), "0" * 64, {"gemm": 1.5}, "note")
    save(kept, tmp_path / "one.npz")
    save(kept, tmp_path / "two.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    again = load(tmp_path / "one.npz")
    work = products(100, seed=2)
    (model,) = again.models
    assert (predict(model, H100, work).seconds == predict(fitted, H100, work).seconds).all()
    assert (again.held_out, again.note) == ({"gemm": 1.5}, "note")


def test_a_damaged_file_is_refused_in_one_line(fitted, tmp_path: Path) -> None:
    path = tmp_path / "one.npz"
    save(FittedDevice("h100", (fitted,), (), "", {}), path)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(HardwareError, match="not fitted operators"):
        load(path)
    path.write_text("{}")
    with pytest.raises(HardwareError, match="not fitted operators"):
        load(path)
    loop = replace(fitted.trees, left=np.zeros_like(fitted.trees.left))
    save(FittedDevice("h100", (replace(fitted, trees=loop),), (), "", {}), path)
    with pytest.raises(HardwareError, match="does not go down"):
        load(path)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 3000),
    shape=st.sampled_from([(8, 2), (64, 6), (128, 8), (256, 8), (60, 4)]),
    ranks=st.sampled_from([1, 2, 4]),
    distribution=st.sampled_from(["balanced", "power_law_1.01", "power_law_1.2"]),
)
def test_benchmark_routing_conserves_slots_and_takes_the_busiest_rank(
    tokens: int, shape: tuple[int, int], ranks: int, distribution: str
) -> None:
    n_experts, top_k = shape
    whole = rank_counts(tokens, n_experts, top_k, 1, distribution)
    for counts in whole:
        assert counts.max() <= tokens
        if counts.max() < tokens:
            assert counts.sum() == tokens * top_k
    of_rank = rank_counts(tokens, n_experts, top_k, ranks, distribution)
    share = np.mean([counts.sum() for counts in of_rank]) / (tokens * top_k)
    if distribution != "balanced" and tokens > 20:
        assert share >= 0.95 / ranks


def test_one_token_costs_one_expert_a_rank_when_experts_divide_evenly() -> None:
    (counts,) = rank_counts(1, 256, 8, 8, "balanced")
    assert counts.tolist() == [1] + [0] * 31


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hw": None}, r"t.parquet: not a table of gemm: hw|no known table"),
        ({"m": "many"}, r"t.parquet: not a table of gemm: .*many"),
        ({"m": -4}, None),
    ],
)
def test_a_table_with_wrong_columns_is_refused_in_one_line(
    tmp_path: Path, changed: dict, said: str | None
) -> None:
    import pandas as pd

    from hwmodels.fitted.tables import read_tables

    row = {"hw": "h100_sxm", "framework": "vllm", "version": "1", "gemm_dtype": "bfloat16",
           "kernel_source": "torch", "m": 4, "n": 64, "k": 64, "latency_ms": 0.01}  # fmt: skip
    frame = pd.DataFrame([row | changed]).dropna(axis=1)
    frame.to_parquet(tmp_path / "t.parquet")
    if said is None:
        (group,) = read_tables([tmp_path / "t.parquet"]).groups
        with pytest.raises(HardwareError, match="m=-4 must be >= 0"):
            parts_of(group.family, H100, group.work)
        return
    with pytest.raises(HardwareError, match=said):
        read_tables([tmp_path / "t.parquet"])
