"""`moesim reproduce`: what was published, what the simulator gives, and whether they agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output
from moesim.errors import SimulationError

if TYPE_CHECKING:
    from moesim.reproduce.claim import Claim

COLUMNS = ("claim", "published", "simulated", "band", "verdict", "tier", "convention")
CSV_COLUMNS = (
    *("system", "claim", "published", "simulated", "low", "high", "verdict", "tier"),
    *("convention", "note"),
)
ANSWERED_NO = 1


def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(help="Published systems, by name.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All systems.")] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Only say which systems there are.")
    ] = False,
    traces: Annotated[
        Path | None,
        typer.Option(help="Folder of captured traces; without one routing is synthetic."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a captured trace.")] = 20_000,
    jobs: Annotated[int, typer.Option(min=1, help="Systems simulated at a time.")] = 1,
    notes: Annotated[bool, typer.Option("--notes", help="Print what a figure rests on.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 when a claim falls outside its band.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answer.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the record and the table.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Check published claims of offload, cache, PIM and tiered-memory systems by simulation.

    Every figure says its tier: A is an identity and must be exact, B a replay of a captured trace
    of the right model, C a trend. A figure without a band is shown only, such as the claim against
    a stronger baseline than the paper's.
    """
    from moesim.reproduce.sources import Sources
    from moesim.reproduce.systems import all_claims, check_names, paper_of

    chosen = check_names(tuple(names or ()))
    if listed:
        _list(chosen, paper_of, as_json)
        return
    if not names and not every:
        raise SimulationError("name a system, or pass --all (--list says which there are)")
    if traces is not None and not traces.is_dir():
        raise SimulationError(f"--traces {traces}: no such folder")
    folder = output.result_folder(out) if out else None
    sources = Sources(traces, seed, tokens)
    found: list[Claim] = []
    with output.progress(len(chosen), "systems") as advance:
        for _, claims in all_claims(chosen, sources, jobs):
            found += claims
            advance(1)
    if folder:
        output.write_json(folder / "result.json", [document(claim) for claim in found])
        output.write_csv(folder / "table.csv", CSV_COLUMNS, [_full(claim) for claim in found])
    if as_json:
        output.emit_json([document(claim) for claim in found])
    else:
        _show(found, notes)
    if strict and any(claim.inside is False for claim in found):
        raise typer.Exit(ANSWERED_NO)


def document(claim: Claim) -> dict[str, Any]:
    """The keys that scripts rely on."""
    return asdict(claim) | {"inside": claim.inside, "verdict": claim.verdict}


def _list(names: tuple[str, ...], paper_of: Any, as_json: bool) -> None:
    papers = {name: paper_of(name) for name in names}
    if as_json:
        output.emit_json(papers)
    else:
        output.facts("", papers)


def _show(found: list[Claim], notes: bool) -> None:
    for system in dict.fromkeys(claim.system for claim in found):
        rows = [claim for claim in found if claim.system == system]
        output.table(system, COLUMNS, [_line(claim) for claim in rows])
        for claim in rows if notes else ():
            if claim.note:
                output.say(f"  {claim.claim} ({claim.convention}): {claim.note}")
    for tier in "ABC":
        counts = Counter(claim.verdict for claim in found if claim.tier == tier)
        judged = counts["inside"] + counts["outside"]
        output.say(f"tier {tier}: {counts['inside']} of {judged} claims inside their band")


def _line(claim: Claim) -> list[object]:
    low, high = claim.low, claim.high
    band = "-" if low is None or high is None else _band(low, high)
    return [
        claim.claim, claim.published, claim.simulated, band, claim.verdict, claim.tier,
        claim.convention,
    ]  # fmt: skip


def _band(low: float, high: float) -> str:
    if low == high:
        return output.shown(float(low))
    ends = ("" if bound in (float("-inf"), float("inf")) else output.shown(float(bound))
            for bound in (low, high))  # fmt: skip
    return " to ".join(ends).strip()


def _full(claim: Claim) -> list[object]:
    return [document(claim)[column] for column in CSV_COLUMNS]
