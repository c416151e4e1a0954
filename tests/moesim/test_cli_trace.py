"""`moesim trace`: import, stats, split, generate, validate on a tiny trace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.cli.trace import layer_list
from tests.moesim.cli_case import counts_file, moesim, refused, small_trace, trace_file
from traces import parquet
from traces.errors import TraceError
from traces.routing import RoutingTrace, content_hash


def stored(path: Path) -> RoutingTrace:
    trace = parquet.read(path)
    assert isinstance(trace, RoutingTrace)
    return trace


def npz_file(folder: Path, trace: RoutingTrace) -> Path:
    path = folder / "capture.npz"
    np.savez(path, topk=trace.topk, seq=trace.request, phase=trace.phase, pos=trace.position)
    return path


def test_import_stores_what_it_read(tmp_path: Path) -> None:
    trace, out = small_trace(), tmp_path / "out.parquet"
    ran = moesim("trace", "import", npz_file(tmp_path, trace), "-o", out, "--experts", 8, "--json")
    assert ran.code == 0, ran.err
    np.testing.assert_array_equal(stored(out).topk, trace.topk)
    np.testing.assert_array_equal(stored(out).phase, trace.phase)
    document = ran.json()
    assert document["tokens"] == 600
    assert document["file"] == str(out)
    assert document["findings"] == []
    assert document["content_sha256"] == content_hash(stored(out))


def test_import_takes_layers_from_a_flag(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    source = npz_file(tmp_path, small_trace())
    ran = moesim("trace", "import", source, "-o", out, "--experts", 8, "--layers", "3,7")
    assert ran.code == 0, ran.err
    assert stored(out).layers == (3, 7)
    assert "600" in ran.out


def bad_capture() -> RoutingTrace:
    """A hook that recorded its first layer twice."""
    trace = small_trace()
    return replace(trace, topk=np.repeat(trace.topk[:, :1], 2, axis=1))


def test_a_bad_capture_is_not_stored_unless_forced(tmp_path: Path) -> None:
    source, out = npz_file(tmp_path, bad_capture()), tmp_path / "out.parquet"
    flags = ("trace", "import", source, "-o", out, "--experts", 8)
    ran = moesim(*flags)
    assert ran.code == 1
    assert "copy of layer 0" in ran.out
    assert not out.exists()
    assert moesim(*flags, "--json").json()["file"] is None

    forced = moesim(*flags, "--force")
    assert forced.code == 0
    assert "warning: " in forced.err
    assert stored(out).n_tokens == 600


def test_validate_says_no_to_a_bad_capture(tmp_path: Path) -> None:
    ran = moesim("trace", "validate", trace_file(tmp_path, bad_capture()), "--json")
    assert ran.code == 1
    found = ran.json()["findings"]
    assert [finding["severity"] for finding in found][0] == "error"
    assert found[0]["where"] == "layer 1"


def test_validate_says_yes_to_a_good_one_and_nothing_of_counts(tmp_path: Path) -> None:
    good = moesim("trace", "validate", trace_file(tmp_path))
    assert (good.code, good.out.splitlines()[-1]) == (0, "checks: nothing found")
    counts = moesim("trace", "validate", counts_file(tmp_path), "--json")
    assert counts.code == 0
    assert counts.json()["findings"] is None


def test_stats_are_those_of_the_library_and_equal_bytes_each_time(tmp_path: Path) -> None:
    from traces.stats import summarize

    path = trace_file(tmp_path)
    first, second = (moesim("trace", "stats", path, "--json") for _ in range(2))
    assert first.out == second.out
    document, summary = first.json(), summarize(small_trace())
    assert document["max_over_mean"]["per_layer"] == list(summary.max_over_mean.per_layer)
    assert document["tokens"] == 600
    assert len(document["windows"]) == 3


def test_stats_show_a_row_per_layer_and_write_pictures(tmp_path: Path) -> None:
    ran = moesim("trace", "stats", trace_file(tmp_path), "--plots", tmp_path / "plots")
    assert ran.code == 0, ran.err
    rows = [line.split()[0] for line in ran.out.splitlines() if line.strip()]
    assert {"0", "1", "mean"} <= set(rows)
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {
        "expert_load.png", "popularity.png", "reuse.png", "srp.png", "transitions.png",
    }  # fmt: skip


def test_counts_have_the_statistics_that_need_no_order(tmp_path: Path) -> None:
    ran = moesim("trace", "stats", counts_file(tmp_path), "--json", "--plots", tmp_path / "plots")
    assert ran.code == 0, ran.err
    assert ran.json()["reuse_ratio"] is None
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"expert_load.png", "popularity.png"}


@pytest.mark.parametrize("by", ["request", "order"])
def test_split_shares_no_request_and_loses_no_token(tmp_path: Path, by: str) -> None:
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    source = trace_file(tmp_path)
    ran = moesim("trace", "split", source, "-o", a, "-o", b, "--by", by, "--share", 0.3, "--json")
    assert ran.code == 0, ran.err
    first, second = stored(a), stored(b)
    assert not set(first.request) & set(second.request)
    assert first.n_tokens + second.n_tokens == 600
    assert first.n_tokens == pytest.approx(180, abs=20)
    assert [part["tokens"] for part in ran.json()["parts"]] == [first.n_tokens, second.n_tokens]


def test_the_seed_decides_the_split(tmp_path: Path) -> None:
    source = trace_file(tmp_path)

    def first_part(seed: int) -> str:
        out = ("-o", tmp_path / "a.parquet", "-o", tmp_path / "b.parquet")
        ran = moesim("trace", "split", source, *out, "--seed", seed, "--json")
        return str(ran.json()["parts"][0]["content_sha256"])

    assert first_part(1) == first_part(1)
    assert first_part(1) != first_part(2)


def test_split_needs_two_files_and_token_order(tmp_path: Path) -> None:
    once = moesim("trace", "split", trace_file(tmp_path), "-o", tmp_path / "a")
    assert once.code == 2
    assert "--output twice" in once.err
    out = ("-o", tmp_path / "a", "-o", tmp_path / "b")
    refused(moesim("trace", "split", counts_file(tmp_path), *out), "splitting needs token order")
    refused(moesim("trace", "split", trace_file(tmp_path), *out, "--by", "day"), "by='day'")
    assert not (tmp_path / "a").exists()


def test_generate_keeps_the_statistics_of_its_source(tmp_path: Path) -> None:
    source, out = trace_file(tmp_path, small_trace(6000)), tmp_path / "made.parquet"
    ran = moesim("trace", "generate", source, "-o", out, "--tokens", 3000, "--json")
    assert ran.code == 0, ran.err
    made = stored(out)
    assert made.n_tokens == ran.json()["tokens"] == 3000
    share = [np.bincount(t.topk[:, 0].ravel(), minlength=8) / t.topk[:, 0].size
             for t in (small_trace(6000), made)]  # fmt: skip
    np.testing.assert_allclose(share[0], share[1], atol=0.03)


def test_generate_without_a_source_draws_from_a_law(tmp_path: Path) -> None:
    def made(*flags: object) -> RoutingTrace:
        out = tmp_path / "made.parquet"
        flags = ("--model", "mixtral-8x7b", "--tokens", 2000, *flags)
        ran = moesim("trace", "generate", "-o", out, *flags)
        assert ran.code == 0, ran.err
        return stored(out)

    def busiest(trace: RoutingTrace) -> float:
        counts = np.bincount(trace.topk[:, 0].ravel(), minlength=8)
        return float(counts.max() / counts.mean())

    assert busiest(made("--zipf", 0)) < 1.2 < 1.5 < busiest(made("--zipf", 1.5))
    assert content_hash(made("--seed", 3)) == content_hash(made("--seed", 3))
    assert content_hash(made("--seed", 3)) != content_hash(made("--seed", 4))


def test_generate_makes_as_many_requests_as_asked(tmp_path: Path) -> None:
    out = tmp_path / "made.parquet"
    for source in ((trace_file(tmp_path),), ("--model", "mixtral-8x7b")):
        ran = moesim("trace", "generate", *source, "-o", out, "--requests", 7)
        assert ran.code == 0, ran.err
        assert len(np.unique(stored(out).request)) == 7


def test_generate_refuses_what_it_cannot_make(tmp_path: Path) -> None:
    out = tmp_path / "made.parquet"
    both = ("--tokens", 5, "--requests", 5)
    refused(moesim("trace", "generate", "-o", out, *both, "--model", "mixtral-8x7b"), "one of them")
    refused(moesim("trace", "generate", "-o", out), "--model says how many layers")
    refused(moesim("trace", "generate", "-o", out, "--model", "nope"), "'nope'")
    law = ("--model", "mixtral-8x7b", "--reuse", 1.5)
    refused(moesim("trace", "generate", "-o", out, *law), "reuse=1.5, expected a chance in 0..1")
    source = trace_file(tmp_path)
    refused(moesim("trace", "generate", source, "-o", out, "--zipf", 1), "leave TRACE out")
    refused(moesim("trace", "generate", counts_file(tmp_path), "-o", out), "needs token order")
    assert not out.exists()


def test_bad_files_are_refused_in_one_line_that_names_them(tmp_path: Path) -> None:
    whole = trace_file(tmp_path).read_bytes()
    cut, text, empty = (tmp_path / name for name in ("cut.parquet", "words.txt", "empty.npz"))
    cut.write_bytes(whole[: len(whole) // 2])
    text.write_text("not a trace")
    empty.write_bytes(b"")
    out = tmp_path / "out.parquet"
    for path in (cut, text, empty, tmp_path / "missing.npz", tmp_path):
        for command in (("stats", path), ("validate", path), ("import", path, "-o", out)):
            refused(moesim("trace", *command), str(path))
    assert not out.exists()


def test_wrong_numbers_are_refused_with_the_field(tmp_path: Path) -> None:
    trace = small_trace()
    negative = tmp_path / "negative.npz"
    np.savez(negative, topk=np.where(trace.topk == 3, -7, trace.topk), n_experts=8)
    refused(moesim("trace", "stats", negative), "negative.npz", "-7", "0..7")
    source = npz_file(tmp_path, trace)
    out = ("-o", tmp_path / "out.parquet")
    refused(moesim("trace", "import", source, *out, "--experts", 4), "expected 0..3")
    refused(
        moesim("trace", "import", source, *out, "--model", "deepseek-v3"), "2 layers, expected 58"
    )
    refused(moesim("trace", "import", source, *out, "--format", "x"), "format 'x' is unknown")
    refused(moesim("trace", "import", source, "-o", tmp_path / "no" / "out"), "does not exist")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("text", "layers"),
    [("", None), ("3-5", (3, 4, 5)), ("1,2,5-8", (1, 2, 5, 6, 7, 8)), ("0", (0,))],
)
def test_layers_are_read_as_lists_and_ranges(text: str, layers: tuple[int, ...] | None) -> None:
    assert layer_list(text) == layers


@pytest.mark.parametrize("text", ["a", "1-", "-3", "1--2", "1,,2", "0-99999999", "1.5", "²"])
def test_other_layer_texts_are_refused(text: str) -> None:
    with pytest.raises(TraceError, match="--layers"):
        layer_list(text)


def test_the_json_of_every_command_is_one_document(tmp_path: Path) -> None:
    ran = moesim("trace", "stats", trace_file(tmp_path), "--json")
    assert json.dumps(json.loads(ran.out), indent=1, sort_keys=True) + "\n" == ran.out
