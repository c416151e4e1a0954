"""The catalogue of models: every file loads, and its counts agree with what was published."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from traces.counting import (
    active_params,
    expert_bytes,
    expert_share,
    kv_bytes_per_token,
    total_params,
)
from traces.errors import TraceError
from traces.models import (
    ROUTERS,
    catalog_entry,
    load_model,
    model_names,
    read_catalog_file,
)

CATALOG = Path(__file__).resolve().parents[2] / "traces" / "catalog"
BUNDLED = "tiny-moe-32e"  # its shape is the config.json beside the bundled trace
NAMES = [name for name in model_names() if name != BUNDLED]

# Recomputed total over published total, where they differ by more than 2 %, and why.
TOTALS_THAT_DIFFER = {
    "glam-64b-64e": "published as 1.2 T; the shape gives 1.16 T, and the 96.6 B active exactly",
    "ernie-4.5-21b-a3b": "published as 21 B, rounded down: the checkpoint holds 21.8 B",
    "granite-3.0-1b-a400m": "published as 1.3 B, rounded: the checkpoint holds 1.33 B",
    "blockffn-1.2b": "published without embeddings: 1.19 B of 1.63 B",
}
# Where the catalogue knows better than the table it was made from, and why.
SHAPES_THAT_DIFFER = {
    "Qwen3-Next-80B-A3B": "the table takes its 36 gated DeltaNet layers for plain attention",
    "openPangu-R-72B-2512": "the table counts 128 for queries and keys that are 192 wide",
    "GLaM-64B/64E": "the table takes the gated dense layers for plain ones",
    "BlockFFN-1.2B": "the table states no active parameters: the router chooses a varying number",
}


PUBLISHED = {name: total for name in NAMES if (total := catalog_entry(name).total_params)}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_shape_gives_the_published_total(name: str) -> None:
    error = abs(total_params(load_model(name)) / PUBLISHED[name] - 1)
    assert (error > 0.02) == (name in TOTALS_THAT_DIFFER), f"{name} is {error:.1%} off"


def test_models_without_a_published_total_are_known_by_name() -> None:
    assert set(NAMES) - set(PUBLISHED) == {"glm-5", "switch-base-16", "switch-base-64"}


def test_active_parameters_are_the_published_ones_where_the_count_is_the_same() -> None:
    for name in ("glam-64b-64e", "mixtral-8x7b", "deepseek-v3", "gpt-oss-120b", "dbrx"):
        published = catalog_entry(name).active_params
        assert published is not None
        assert active_params(load_model(name)) == pytest.approx(published, rel=0.015)


@pytest.mark.parametrize("path", sorted(CATALOG.glob("*.toml")), ids=lambda path: path.stem)
def test_every_file_is_well_formed_and_found_under_each_of_its_names(path: Path) -> None:
    assert re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)*", path.stem)
    entry = catalog_entry(path.stem)
    assert entry.source
    for spelling in (entry.title, *entry.aliases):
        assert catalog_entry(spelling.upper()) == entry


@pytest.mark.parametrize("name", NAMES)
def test_routers_are_among_the_described(name: str) -> None:
    assert load_model(name).router in ROUTERS


def rows(shared: Path) -> list[dict[str, str]]:
    with (shared / "handbook" / "models.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_of_the_table_is_in_the_catalogue_with_its_figures(shared: Path) -> None:
    table = rows(shared)
    assert len(table) == 52
    for row in table:
        entry, spec = catalog_entry(row["model"]), load_model(row["model"])
        assert (entry.title, entry.status, entry.source) == (
            row["model"],
            row["status"],
            row["source"],
        )
        for ours, theirs in (
            (entry.total_params, row["total_params_B_published"]),
            (entry.active_params, row["active_params_B_published"]),
        ):
            assert (ours is None) == (theirs == "")
            if ours is not None:
                assert ours == pytest.approx(float(theirs) * 1e9)
        shape = (
            spec.n_layers,
            spec.n_moe_layers,
            spec.hidden_size,
            spec.n_experts,
            spec.vocab_size,
        )
        columns = ("layers", "moe_layers", "hidden", "routed_experts", "vocab")
        assert shape == tuple(int(row[column]) for column in columns)
        assert spec.kv_layers == int(row["kv_layers"])
        assert spec.n_groups == int(row["n_group"] or 1)


def test_counts_equal_the_tables_to_its_last_digit(shared: Path) -> None:
    differing = set()
    for row in rows(shared):
        spec = load_model(row["model"])
        assert expert_bytes(spec) / 2**20 == pytest.approx(float(row["expert_MiB_bf16"]), abs=0.006)
        counts = (
            abs(total_params(spec) / 1e9 - float(row["total_params_B_computed"])) < 0.006,
            abs(active_params(spec) / 1e9 - float(row["active_params_B_computed"] or 0)) < 0.006,
            abs(expert_share(spec) - float(row["expert_share_of_total"])) < 0.0006,
            kv_bytes_per_token(spec) == int(row["kv_bytes_per_token_bf16"]),
        )
        if not all(counts):
            differing.add(row["model"])
    assert differing == set(SHAPES_THAT_DIFFER)


def test_models_with_captured_traces_are_in_the_catalogue(shared: Path) -> None:
    for trace in json.loads((shared / "traces" / "index.json").read_text()):
        spec = load_model(trace["model"])
        assert (spec.n_experts, spec.top_k) == (trace["num_experts"], trace["top_k"])


def test_the_bundled_model_is_read_from_its_config() -> None:
    if not (CATALOG.parent / "data" / "tiny-moe-32e-config.json").exists():
        pytest.skip("the bundled model has not been trained yet")
    spec = load_model(BUNDLED)
    assert spec.n_experts == 32
    assert spec.n_moe_layers >= 8


def test_an_unknown_model_is_refused_with_the_close_names() -> None:
    with pytest.raises(TraceError, match=r"'mixtrl-8x7b' .* close: mixtral-8x7b, mixtral-8x22b"):
        load_model("mixtrl-8x7b")
    with pytest.raises(TraceError, match=f"{len(model_names())} names are known") as caught:
        catalog_entry("\N{SNOWMAN}" * 5000)
    assert len(str(caught.value)) < 300


GOOD = """
name = "small"
title = "Small"
status = "recalled"
source = "a test"

[shape]
n_layers = 2
moe_layers = { first = 1, step = 1, count = 1 }
hidden_size = 4
n_experts = 2
top_k = 1
expert_intermediate_size = 4
vocab_size = 10
kv_layers = 2

[attention]
n_heads = 1
n_kv_heads = 1
head_dim = 4
v_head_dim = 4
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", None),
        ("top_k = 1", "topk = 1", r"shape\.top_k"),
        ("vocab_size = 10", "vocab_size = 10\nvocab = 10", r"shape\.vocab=10"),
        ("vocab_size = 10", "vocab_size = '10'", r"shape\.vocab_size='10'"),
        ('"recalled"', '"guessed"', "status='guessed'"),
        ('name = "small"', 'name = "other"', "expected the file's name 'small'"),
        ('source = "a test"', 'source = "a test"\nconfig = "x.json"', "either config, or both"),
        ("[attention]", "[attention", "small.toml"),
    ],
)
def test_a_catalogue_file_is_read_closed(
    tmp_path: Path, old: str, new: str, message: str | None
) -> None:
    path = tmp_path / "small.toml"
    path.write_text(GOOD.replace(old, new) if old else GOOD)
    if message is None:
        assert read_catalog_file(path).name == "small"
        return
    with pytest.raises(TraceError, match=message):
        read_catalog_file(path)
