"""Request traces: three public forms, and arrivals for those that have none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.errors import TraceError
from traces.requests import PrefixBlocks, RequestTrace, poisson_arrivals, read_requests

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
VIDUR = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n"


def save(folder: Path, text: str) -> Path:
    path = folder / "requests.txt"  # the suffix decides nothing
    path.write_text(text)
    return path


def test_azure_times_become_seconds_since_the_first(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:18:04.4799600,110,27\r\n"
    found = read_requests(save(tmp_path, text))
    assert found.arrival_s is not None
    np.testing.assert_allclose(found.arrival_s, [0, 60.5], atol=1e-9)
    np.testing.assert_array_equal(found.prompt_tokens, [4808, 110])
    np.testing.assert_array_equal(found.output_tokens, [10, 27])


def test_azure_of_2024_with_time_zones_reads_the_same(tmp_path: Path) -> None:
    text = AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01.009930Z,2399,6\n"
    found = read_requests(save(tmp_path, text))
    assert found.arrival_s is not None
    np.testing.assert_allclose(found.arrival_s, [0, 1], atol=1e-9)


def test_rows_out_of_order_are_put_into_order_and_counted(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 18:00:02,3,1\n2023-11-16 18:00:01,2,1\n2023-11-16 18:00:03,4,1\n"
    found = read_requests(save(tmp_path, text))
    np.testing.assert_array_equal(found.prompt_tokens, [2, 3, 4])
    assert "2 rows put into the order of time" in found.source


def test_mooncake_milliseconds_and_blocks(tmp_path: Path) -> None:
    text = (
        '{"timestamp": 1000, "input_length": 600, "output_length": 3, "hash_ids": [7, 8]}\n'
        '{"timestamp": 1040, "input_length": 512, "output_length": 1, "hash_ids": [7]}\n'
    )
    found = read_requests(save(tmp_path, text))
    np.testing.assert_allclose(found.arrival_s, [0, 0.04])
    assert found.prefix_blocks is not None
    assert found.prefix_blocks.block_tokens == 512
    np.testing.assert_array_equal(found.prefix_blocks.of(0), [7, 8])
    np.testing.assert_array_equal(found.prefix_blocks.of(1), [7])


def test_vidur_lengths_have_no_arrivals_until_they_are_made(tmp_path: Path) -> None:
    found = read_requests(save(tmp_path, VIDUR + "3772,54,3826,69.8\n2015,156,2171,12.9\n"))
    assert found.arrival_s is None
    made = poisson_arrivals(found, rate_per_s=2.0, seed=1)
    assert made.arrival_s is not None
    assert made.arrival_s[0] == 0
    np.testing.assert_array_equal(made.prompt_tokens, found.prompt_tokens)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32), st.floats(1e-3, 1e3))
def test_poisson_gaps_have_the_mean_and_spread_of_an_exponential(seed: int, rate: float) -> None:
    """Law: the mean gap is 1/rate and so is its standard deviation (5 sigma at n = 4000)."""
    n = 4000
    lengths = np.ones(n, dtype=np.int32)
    made = poisson_arrivals(RequestTrace(None, lengths, lengths), rate, seed)
    assert made.arrival_s is not None
    gaps = np.diff(made.arrival_s) * rate
    assert abs(gaps.mean() - 1) < 5 / np.sqrt(n)
    assert abs(gaps.std() - 1) < 5 * np.sqrt(2 / n)
    again = poisson_arrivals(made, rate, seed)
    np.testing.assert_array_equal(again.arrival_s, made.arrival_s)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_no_rate_is_refused(rate: float) -> None:
    lengths = np.ones(2, dtype=np.int32)
    with pytest.raises(TraceError, match="rate_per_s"):
        poisson_arrivals(RequestTrace(None, lengths, lengths), rate, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header '', expected columns"),
        ("a,b,c\n1,2,3\n", "header 'a,b,c', expected columns"),
        (AZURE, "0 rows"),
        (AZURE + "2023-11-16 18:00:02,3\n", "row 2: 2 cells, expected 3"),
        (AZURE + "yesterday,3,1\n", "TIMESTAMP: 'yesterday' in row 2"),
        (AZURE + "2023-13-41 18:00:02,3,1\n", "TIMESTAMP truncated or damaged"),
        (AZURE + "2023-11-16 18:00:02,0,1\n", "ContextTokens: '0' in row 2, .* >= 1"),
        (AZURE + "2023-11-16 18:00:02,3,-1\n", "GeneratedTokens: '-1' in row 2, .* >= 0"),
        (AZURE + "2023-11-16 18:00:02,99999999999,1\n", "ContextTokens: '99999999999'"),
        ("num_prefill_tokens,other\n1,2\n", "expected columns num_prefill_tokens, num_decode"),
        ('{"timestamp": 0, "input_length": 3}\n', "line 1: field output_length: Field required"),
        ('{"timestamp": -1, "input_length": 3, "output_length": 1}\n', "field timestamp"),
        (
            '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}\n',
            "line 1: 1 hash_ids, expected 2: one for each 512 of 600",
        ),
        ('{"timestamp": 0, "inp', "line 1: JSON truncated or damaged"),
    ],
)
def test_a_request_file_that_does_not_fit_is_refused_with_its_row(
    text: str, message: str, tmp_path: Path
) -> None:
    path = save(tmp_path, text)
    with pytest.raises(TraceError, match=message) as caught:
        read_requests(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        read_requests(tmp_path / "none.csv")


@pytest.mark.parametrize(
    "fields",
    [
        {"arrival_s": np.array([1.0, 0.5])},
        {"arrival_s": np.array([0.0, np.nan])},
        {"arrival_s": np.zeros(3)},
        {"output_tokens": np.ones(3, np.int32)},
        {"output_tokens": np.array([1, -1], np.int32)},
        {"prompt_tokens": np.array([0, 1], np.int32)},
    ],
)
def test_a_trace_checks_itself(fields: dict[str, np.ndarray]) -> None:
    lengths = np.ones(2, dtype=np.int32)
    sound = {"arrival_s": np.zeros(2), "prompt_tokens": lengths, "output_tokens": lengths}
    assert RequestTrace(**sound).n_requests == 2
    with pytest.raises(TraceError, match="expected"):
        RequestTrace(**{**sound, **fields})


def test_blocks_that_do_not_cut_the_ids_are_refused() -> None:
    with pytest.raises(TraceError, match="offsets do not cut 3 ids"):
        PrefixBlocks(np.arange(3), np.array([0, 2]), 512)


# --- the development data --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "n", "first", "seconds"),
    [
        ("AzureLLMInferenceTrace_code.csv", 8819, (4808, 10), 3435.948),
        ("AzureLLMInferenceTrace_conv.csv", 19366, (374, 44), 3501.722),
        ("mooncake_synthetic_trace.jsonl", 3993, (40160, 6), 1022.025),
        ("vidur_arxiv_summarization_lengths.csv", 28257, (3772, 54), None),
    ],
)
def test_the_shared_request_files_come_in_whole(
    file: str, n: int, first: tuple[int, int], seconds: float | None, shared: Path
) -> None:
    found = read_requests(shared / "requests" / file)
    assert found.n_requests == n
    assert (found.prompt_tokens[0], found.output_tokens[0]) == first
    if seconds is None:
        assert found.arrival_s is None
    else:
        assert found.arrival_s is not None
        assert found.arrival_s[-1] == pytest.approx(seconds, abs=1e-3)


def test_mooncake_requests_do_share_prefixes(shared: Path) -> None:
    blocks = read_requests(shared / "requests" / "mooncake_synthetic_trace.jsonl").prefix_blocks
    assert blocks is not None
    assert len(np.unique(blocks.ids)) < len(blocks.ids)
