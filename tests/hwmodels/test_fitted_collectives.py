"""Laws of fitted collectives and expert exchanges, exact small cases, and measured bars."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.devices import load_device
from hwmodels.errors import HardwareError
from hwmodels.fitted import collectives, expert_exchange, formula
from hwmodels.fitted.collective_tables import collective_work, normal_work, rows_of
from hwmodels.fitted.kernels import nearest_kernel
from hwmodels.fitted.model import OperatorModel, parts_of
from hwmodels.fitted.scores import Predicted, cross_validate, fit_groups, predict_groups
from hwmodels.fitted.tables import Table, read_tables
from hwmodels.fitted.trees import NO_TREES

H100, H200, L40S = load_device("h100"), load_device("h200"), load_device("l40s")
TABLES = ("nccl", "deepep_ll", "deepep_normal")
EXCHANGES = ("exchange_low_latency", "exchange_normal")


def message(n_bytes: float, ranks: float, rounds: float = 1) -> dict[str, np.ndarray]:
    return columns(message_bytes=n_bytes, ranks=ranks, element_bytes=2, rounds=rounds)


def exchange(family: str, **changed: float) -> dict[str, np.ndarray]:
    work = columns(**{
        "tokens": 128, "hidden": 7168, "top_k": 8, "experts": 256, "ranks": 8, "nodes": 1,
        "multiprocessors": 20, "element_bits": expert_exchange.FP8_BITS, "sums": 0,
    } | changed)  # fmt: skip
    if family == "exchange_normal":
        return work | expert_exchange.deduplicated_copies(work)
    return work | expert_exchange.single_copies(work)


def columns(**values: float) -> dict[str, np.ndarray]:
    return {name: np.array([float(value)]) for name, value in values.items()}


def priced(family: str, device, work, factor: float = 0.7) -> float:
    """Seconds with every coefficient equal, so that no part hides behind a small one."""
    parts = parts_of(family, device, work)
    names = [*parts.memory, *parts.compute, *parts.serial]
    constants = dict.fromkeys(names, factor) | {"floor_s": 5e-6, "overlap": 1.5}
    return float(formula.seconds(constants, parts)[0])


@given(
    st.integers(0, 1 << 32), st.integers(0, 1 << 30), st.integers(1, 64), st.sampled_from([1, 2])
)
def test_more_bytes_and_more_ranks_never_cost_less(n_bytes, more, ranks, rounds) -> None:
    for device in (H100, L40S):
        least = priced("collective", device, message(n_bytes, ranks, rounds))
        assert priced("collective", device, message(n_bytes + more, ranks, rounds)) >= least
        assert priced("collective", device, message(n_bytes, ranks + 1, rounds)) >= least


def test_zero_bytes_cost_the_floor_and_the_hops_and_one_rank_only_the_floor() -> None:
    parts = collectives.parts(H100, message(0, 8))
    moving = {**parts.memory, **parts.serial}
    assert all(part[0] == 0 for part in moving.values())
    assert parts.compute["hops"][0] == pytest.approx(7 * collectives.HOP_S)
    assert priced("collective", H100, message(1e9, 1)) == pytest.approx(5e-6)


def test_a_rank_sends_seven_eighths_of_the_buffer_in_each_of_its_rounds() -> None:
    one, two = message(8e6, 8), message(8e6, 8, collectives.ROUNDS["all_reduce"])
    assert collectives.wire_bytes(one)[0] == 7e6
    assert collectives.wire_bytes(two)[0] == 14e6
    assert collectives.parts(H100, one).memory["link"][0] == pytest.approx(7e6 / 450e9)


def test_all_reduce_is_no_cheaper_than_its_two_halves_less_a_start() -> None:
    half = priced("collective", H100, message(1e8, 8))
    whole = priced("collective", H100, message(1e8, 8, 2))
    assert half < whole <= 2 * half


@pytest.mark.parametrize(
    ("changed", "names"),
    [({"ranks": np.array([0.0])}, "ranks"), ({"message_bytes": np.array([-1.0])}, "message_bytes"),
     ({"rounds": np.array([0.0])}, "rounds")],
)  # fmt: skip
def test_a_collective_that_cannot_be_is_an_error_that_names_the_column(changed, names) -> None:
    with pytest.raises(HardwareError, match=names):
        collectives.parts(H100, message(1e6, 8) | changed)


def test_a_device_without_any_link_has_no_collective() -> None:
    alone = replace(H100, link_bytes_per_s=0.0, host_link_bytes_per_s=0.0)
    with pytest.raises(HardwareError, match="no link"):
        collectives.parts(alone, message(1e6, 2))


@pytest.mark.parametrize(
    ("experts", "top_k", "groups"), [(8, 2, 4), (8, 3, 2), (6, 4, 3), (8, 1, 8)]
)
def test_distinct_ranks_are_those_of_all_choices_counted_one_by_one(experts, top_k, groups) -> None:
    size = experts // groups
    met = [len({e // size for e in choice}) for choice in combinations(range(experts), top_k)]
    found = expert_exchange.distinct(*(np.array([float(x)]) for x in (groups, top_k, experts)))
    assert found[0] == pytest.approx(np.mean(met))


def test_copies_sent_by_all_ranks_are_the_copies_they_receive() -> None:
    experts, top_k, ranks = 8, 3, 4
    sent, received = np.zeros(ranks), np.zeros(ranks)
    choices = list(combinations(range(experts), top_k))
    for home in range(ranks):
        for choice in choices:
            there = {e // 2 for e in choice} - {home}
            sent[home] += len(there)
            received[list(there)] += 1
    work = exchange(
        "exchange_normal", tokens=len(choices), top_k=top_k, experts=experts, ranks=ranks
    )
    assert work["copies"][0] == pytest.approx(sent[0])
    np.testing.assert_allclose(sent, received)


@given(st.integers(1, 5), st.integers(1, 24), st.sampled_from([8, 16, 64, 160, 512]))
def test_a_deduplicated_token_goes_to_no_more_than_top_k_nor_all_other_ranks(
    nodes, top_k, experts
) -> None:
    top_k, ranks = min(top_k, experts), 8 * nodes
    work = exchange("exchange_normal", tokens=1, top_k=top_k, experts=experts * nodes,
                    ranks=ranks, nodes=nodes)  # fmt: skip
    single = expert_exchange.single_copies(work)["copies"][0]
    assert work["copies"][0] <= min(top_k, ranks - 1, single) * (1 + 1e-12)
    assert work["node_copies"][0] <= min(work["copies"][0], nodes - 1) + 1e-12


@settings(max_examples=60)
@given(
    st.sampled_from(EXCHANGES),
    st.integers(0, 5000),
    st.sampled_from(["tokens", "hidden", "top_k", "element_bits"]),
)
def test_more_tokens_wider_tokens_and_more_experts_of_each_never_cost_less(
    family, tokens, grown
) -> None:
    for sums in (0, 1):
        base = {"tokens": tokens, "hidden": 2048, "top_k": 4, "element_bits": 8.25, "sums": sums}
        larger = base | {grown: base[grown] * 2 + (grown == "tokens")}
        assert priced(family, H100, exchange(family, **larger)) >= priced(
            family, H100, exchange(family, **base)
        ) * (1 - 1e-12)


def test_what_is_dispatched_in_fp8_and_combined_in_bf16_weighs_as_its_formats_do() -> None:
    assert 7168 * expert_exchange.FP8_BITS / 8 == 7168 + 7168 / 128 * 4
    work = exchange("exchange_low_latency", tokens=1, hidden=128, top_k=8)
    link = 7 * 132 / H100.link_bytes_per_s  # 8 copies, 1 of them to the rank itself
    memory = 2 * 8 * 132 / H100.memory_bytes_per_s
    parts = expert_exchange.low_latency_parts(H100, work)
    assert parts.memory["exchange"][0] == pytest.approx(link + memory)


@pytest.mark.parametrize("family", EXCHANGES)
def test_faster_memory_shortens_an_exchange_over_equal_links(family) -> None:
    work = exchange(family, tokens=4096)
    assert priced(family, H200, work) < priced(family, H100, work)


@pytest.mark.parametrize(
    ("family", "changed", "names"),
    [("exchange_normal", {"copies": 128 * 7 + 1.0}, "copies"),
     ("exchange_low_latency", {"copies": 128 * 8 + 1.0}, "copies"),
     ("exchange_normal", {"node_copies": 1e6}, "node_copies"),
     ("exchange_normal", {"multiprocessors": 0.0}, "multiprocessors"),
     ("exchange_low_latency", {"top_k": 300.0}, "top_k"),
     ("exchange_low_latency", {"nodes": 0.0}, "nodes")],
)  # fmt: skip
def test_an_exchange_that_cannot_be_is_an_error_that_names_the_column(
    family, changed, names
) -> None:
    with pytest.raises(HardwareError, match=names):
        parts_of(family, H100, exchange(family) | columns(**changed))


def test_a_table_row_becomes_its_kernels_and_only_nodes_apart_notify() -> None:
    row = {"release": "0.5.6", "node_num": 1, "hidden_size": 128, "num_token": 4, "num_topk": 2,
           "num_experts": 8, "dispatch_sms": 20, "dispatch_transmit_us": 10.0,
           "dispatch_notify_us": 0.0, "combine_sms": 24, "combine_transmit_us": 20.0,
           "combine_notify_us": 0.0}  # fmt: skip
    across = row | {"node_num": 2, "dispatch_notify_us": 5.0, "combine_notify_us": 6.0}
    rows = rows_of(pd.DataFrame([row, across])).set_index("kernel_source")
    assert sorted(rows.index) == [
        "normal_combine", "normal_combine_across", "normal_combine_notify_across",
        "normal_dispatch", "normal_dispatch_across", "normal_dispatch_notify_across",
    ]  # fmt: skip
    assert rows.loc["normal_combine", "milliseconds"] == 0.02
    work = normal_work(rows.loc[["normal_combine"]], "bfloat16")
    assert (work["multiprocessors"][0], work["element_bits"][0], work["sums"][0]) == (24, 16, 1)


def test_a_message_of_the_table_is_read_as_the_full_buffer() -> None:
    row = {"nccl": "2.27.3", "op_name": "all_reduce", "nccl_dtype": "half", "num_gpus": 8,
           "message_size": 512, "bytes": 1024, "latency_ms": 0.01}  # fmt: skip
    work = collective_work(rows_of(pd.DataFrame([row])), "any")
    found = {name: float(column[0]) for name, column in work.items()}
    assert found == {"message_bytes": 1024, "ranks": 8, "element_bytes": 2, "rounds": 2}


def test_the_nearest_version_of_the_same_operator_speaks_for_another_version() -> None:
    empty = np.zeros(0, np.float32)
    models = [
        OperatorModel("collective", f"nccl {name}", "h100", {}, NO_TREES, empty, empty, rows)
        for name, rows in [
            ("2.23 any alltoall", 900),
            ("2.27.3 any alltoall", 10),
            ("2.29.2 any alltoall", 900),
            ("2.26.2 any all_reduce", 900),
        ]
    ]
    found = nearest_kernel(models, "collective", "nccl 2.26.2 half alltoall")
    assert found.kernel == "nccl 2.27.3 any alltoall"
    with pytest.raises(HardwareError, match="broadcast"):
        nearest_kernel(models, "collective", "nccl 2.26.2 half broadcast")


@pytest.fixture(scope="module")
def measured(shared: Path) -> Table:
    files = [shared / "measured" / f"calibration-{name}.parquet" for name in TABLES]
    if not all(path.is_file() for path in files):
        pytest.skip("needs ../shared/measured/calibration-{nccl,deepep_ll,deepep_normal}.parquet")
    return read_tables(files)


@pytest.fixture(scope="module")
def on_h200(shared: Path, measured: Table) -> list[Predicted]:
    files = [shared / "measured" / f"validation-{name}.parquet" for name in TABLES]
    groups = [group for group in measured.groups if group.device == "h100"]
    models = fit_groups(groups, load_device)
    return predict_groups(models, read_tables(files).groups, load_device)


def error_pct(predicted: list[Predicted], family: str, word: str = "") -> float:
    errors = [of.errors for of in predicted if of.rows.family == family and word in of.rows.kernel]
    return 100 * float(np.abs(np.concatenate(errors)).mean())


@pytest.mark.parametrize(
    ("family", "word", "rows", "bar"),
    [("collective", "", 1350, 7), ("collective", "all_reduce", 252, 6.5),
     ("collective", "all_gather", 366, 7), ("collective", "reduce_scatter", 366, 7),
     ("collective", "alltoall", 366, 8.2), ("exchange_low_latency", "", 352, 7.7),
     ("exchange_low_latency", "dispatch", 176, 8.5), ("exchange_low_latency", "combine", 176, 7),
     ("exchange_normal", "", 4968, 3)],
)  # fmt: skip
def test_constants_of_h100_price_what_was_measured_on_h200(
    on_h200: list[Predicted], family: str, word: str, rows: int, bar: float
) -> None:
    scored = [of for of in on_h200 if of.rows.family == family and word in of.rows.kernel]
    assert sum(len(of.errors) for of in scored) == rows
    assert 1 < error_pct(on_h200, family, word) <= bar
    assert all(of.prediction.extrapolated.all() for of in scored)


def test_no_validation_row_is_of_several_nodes(on_h200: list[Predicted]) -> None:
    """The tables repeat one measurement of several nodes for both devices."""
    nodes = [of.rows.work["nodes"] for of in on_h200 if of.rows.family != "collective"]
    assert np.concatenate(nodes).max() == 1


def test_low_latency_exchanges_of_unseen_shapes_are_within_five_per_cent(measured: Table) -> None:
    groups = [group for group in measured.groups if group.family == "exchange_low_latency"]
    found = cross_validate(groups, load_device)
    assert len(found) == 2
    assert 1 < error_pct(found, "exchange_low_latency") <= 5
