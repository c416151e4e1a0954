"""`moesim reproduce`: published claims beside simulated ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moesim.errors import SimulationError
from moesim.reproduce.claim import Claim
from moesim.reproduce.systems import SYSTEMS, paper_of
from tests.moesim.cli_case import moesim, refused

KEYS = {
    *("system", "claim", "published", "simulated", "low", "high", "inside", "tier", "convention"),
    *("verdict", "note"),
}


def test_every_system_names_its_paper() -> None:
    for name in SYSTEMS:
        assert len(paper_of(name)) > 10, name


def test_a_system_is_reproduced_as_a_list_of_claims() -> None:
    ran = moesim("reproduce", "sn40l", "--json")
    assert ran.code == 0, ran.err
    found = ran.json()
    assert {claim["system"] for claim in found} == {"sn40l"}
    assert all(set(claim) == KEYS for claim in found)
    tier_a = [claim for claim in found if claim["tier"] == "A" and claim["inside"] is not None]
    assert len(tier_a) >= 5
    assert all(claim["inside"] for claim in tier_a)


def test_the_table_counts_what_is_inside(tmp_path: Path) -> None:
    ran = moesim("reproduce", "symbolic-moe", "-o", tmp_path, "--notes")
    assert ran.code == 0, ran.err
    assert "tier A: 2 of 2 claims inside" in ran.out
    assert (tmp_path / "table.csv").read_text().startswith("system,claim,published")


def test_unknown_names_and_no_names_are_refused() -> None:
    refused(moesim("reproduce", "warp-drive"), "warp-drive", "duplex")
    refused(moesim("reproduce"), "--all")
    refused(moesim("reproduce", "sn40l", "--traces", "/nowhere"), "/nowhere")


def test_the_list_says_what_there_is() -> None:
    listed = moesim("reproduce", "--list", "--json").json()
    assert set(listed) == set(SYSTEMS)


def test_a_claim_is_inside_outside_or_shown() -> None:
    def claim(simulated: float, low: float | None, high: float | None) -> Claim:
        return Claim("x", "y", 1.0, simulated, low, high, "C", "paper")

    assert claim(1.0, 0.5, 1.5).verdict == "inside"
    assert claim(2.0, 0.5, 1.5).verdict == "outside"
    assert claim(math.nan, 0.5, 1.5).verdict == "outside"
    assert claim(2.0, None, None).verdict == "shown"
    with pytest.raises(SimulationError, match="both or none"):
        claim(1.0, 0.5, None)
    with pytest.raises(SimulationError, match="above"):
        claim(1.0, 2.0, 1.0)
