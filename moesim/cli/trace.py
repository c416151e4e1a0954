"""`moesim trace`: bring traces in, look at them, cut them, make them, capture, check them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output
from moesim.cli.inputs import open_trace
from traces.errors import TraceError

if TYPE_CHECKING:
    from traces.routing import ExpertCounts, RoutingTrace
    from traces.validate import Finding

    Input = RoutingTrace | ExpertCounts

app = typer.Typer(no_args_is_help=True, help="Routing traces: import, look, cut, make, check.")

TraceText = Annotated[
    str, typer.Argument(metavar="TRACE", help="Trace file of any known format, or `bundled`.")
]
ModelText = Annotated[
    str, typer.Option("--model", help="Name or config.json; else from the file or its name.")
]
OutFile = Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same answer.")]


@app.callback()
def trace() -> None:
    """Routing traces: import, look, cut, make, check."""


@app.command("import")
def import_(
    path: Annotated[str, typer.Argument(metavar="PATH", help="File or folder to read.")],
    out: OutFile,
    format_: Annotated[
        str, typer.Option("--format", help="Name of the format; else told from the content.")
    ] = "",
    model: ModelText = "",
    experts: Annotated[
        int, typer.Option(min=0, help="Routed experts of a layer, where the file does not say.")
    ] = 0,
    layers: Annotated[str, typer.Option(help="Absolute layers captured: 3-60, or 1,2,5-8.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Write the file even when checks find errors.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read a trace of any known format, check it, and store it as Parquet."""
    from traces import parquet
    from traces.formats.options import ImportOptions

    output.check_target(out)
    options = ImportOptions(
        format=format_ or None, n_experts=experts or None, layers=layer_list(layers)
    )
    read, _ = open_trace(path, model, options)
    findings = _findings(read)
    refused = _has_errors(findings) and not force
    if not refused:
        parquet.write(read, out)
    document = _about(read) | {
        "file": None if refused else str(out),
        "findings": output.plain(findings),
    }
    if as_json:
        output.emit_json(document)
    else:
        output.facts(path, {k: v for k, v in document.items() if k != "findings"})
        _say_findings(findings)
    if refused:
        output.note("not written: checks found errors; --force writes it all the same")
        raise typer.Exit(1)
    if _has_errors(findings):
        output.note(f"warning: {out} was written although checks found errors (--force)")


@app.command()
def stats(
    text: TraceText,
    model: ModelText = "",
    plots: Annotated[
        Path | None, typer.Option(help="Folder for pictures of load, reuse, SRP, transitions.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load, balance, reuse, working set, local consistency and cache hits of a trace."""
    from moesim.cli import trace_report
    from traces.stats import summarize, to_json

    read, _ = open_trace(text, model)
    with output.progress(None, "measure"):
        summary = summarize(read)
    if plots is not None:
        for picture in trace_report.write_pictures(read, output.result_folder(plots)):
            output.note(f"wrote {picture}")
    if as_json:
        output.emit_json(to_json(summary))
    else:
        trace_report.show(summary)


@app.command()
def split(
    text: TraceText,
    out: Annotated[
        list[Path],
        typer.Option("--output", "-o", help="Give it twice: the part to plan on, the other."),
    ],
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the tokens in the first part.")
    ] = 0.5,
    by: Annotated[
        str, typer.Option(help="request: requests at random; order: those that come first.")
    ] = "request",
    seed: Seed = 0,
    model: ModelText = "",
    as_json: AsJson = False,
) -> None:
    """Cut a trace in two that share no request: one to plan on, one to judge on."""
    from traces import edit, parquet
    from traces.routing import require_tokens

    if len(out) != 2:
        raise typer.BadParameter(f"give --output twice, not {len(out)} times")
    for path in out:
        output.check_target(path)
    whole = require_tokens(open_trace(text, model)[0], "splitting")
    parts = edit.split(whole, share, by, seed)  # type: ignore[arg-type]  # split checks it
    documents = []
    for part, path in zip((parts.plan, parts.judge), out, strict=True):
        parquet.write(part, path)
        documents.append({"file": str(path)} | _about(part))
    if as_json:
        output.emit_json({"how": parts.how, "parts": documents})
        return
    columns = ("file", "tokens", "requests", "prefill", "decode")
    output.table(f"split by {parts.how}", columns, [_cells(d, columns) for d in documents])


@app.command()
def generate(
    out: OutFile,
    source: Annotated[
        str,
        typer.Argument(metavar="[TRACE]", help="Trace whose statistics are kept."),
    ] = "",
    tokens: Annotated[
        int, typer.Option(min=0, help="Tokens to generate [as many as the source, or 10,000].")
    ] = 0,
    requests: Annotated[
        int, typer.Option(min=0, help="Requests to generate, in place of --tokens.")
    ] = 0,
    zipf: Annotated[
        float | None,
        typer.Option(help="Without TRACE: exponent of popularity, 0 is even [1]."),
    ] = None,
    reuse: Annotated[
        float | None,
        typer.Option(help="Without TRACE: chance that an expert of the token before stays [0]."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Name or config.json: whose layers and experts, without TRACE.")
    ] = "",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Make a trace: with the statistics of another one, or from a popularity law."""
    from moesim.cli.trace_generate import Wish, generated
    from traces import parquet

    output.check_target(out)
    wish = Wish(source, tokens, requests, zipf, reuse, model, seed)
    made = generated(wish)
    parquet.write(made, out)
    document = {"file": str(out)} | _about(made)
    if as_json:
        output.emit_json(document)
    else:
        output.facts("generated", document)


@app.command()
def capture(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face MoE, or its name.")
    ],
    prompts: Annotated[
        Path, typer.Option(help="Prompts, one a line: text, or .jsonl of texts or token ids.")
    ],
    out: OutFile,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate per prompt; the last is never routed.")
    ] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 8,
    scores: Annotated[
        bool, typer.Option(help="Store the router's logits: n_experts numbers a layer and token.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Run a Hugging Face MoE over prompts and store what its routers chose."""
    from moesim.cli.trace_capture import CaptureWish, captured
    from traces import parquet

    output.check_target(out)
    wish = CaptureWish(model, prompts, new_tokens, batch_size, scores, device, dtype)
    made = captured(wish)
    parquet.write(made, out)
    findings = _findings(made)
    document = {"file": str(out)} | _about(made)
    if as_json:
        output.emit_json(document | {"findings": output.plain(findings)})
    else:
        output.facts("captured", document)
        _say_findings(findings)
    if _has_errors(findings):
        output.note(f"warning: {out} was written although checks found errors")


@app.command()
def validate(text: TraceText, model: ModelText = "", as_json: AsJson = False) -> None:
    """Say what is wrong with a capture; exit code 1 when there are errors."""
    read, _ = open_trace(text, model)
    findings = _findings(read)
    if as_json:
        output.emit_json(_about(read) | {"findings": output.plain(findings)})
    else:
        output.facts(text, _about(read))
        _say_findings(findings)
    if _has_errors(findings):
        raise typer.Exit(1)


def layer_list(text: str) -> tuple[int, ...] | None:
    """Layers from "3-60" or "1,2,5-8"; None for "".

    raises  TraceError for anything else, or more than 10,000 layers
    """
    if not text:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash) and len(part) <= 13):
            raise TraceError(f"--layers {text!r}: {part!r}, expected a layer or first-last")
        layers += range(int(first), min(int(last or first) + 1, int(first) + 10_001))
        if len(layers) > 10_000:
            raise TraceError(f"--layers {text!r}: more than 10,000 layers")
    return tuple(layers)


def _findings(read: Input) -> list[Finding] | None:
    """What the checks say; None for counts, which keep no token order to check."""
    from traces.routing import ExpertCounts
    from traces.validate import validate as check

    if isinstance(read, ExpertCounts):
        return None
    with output.progress(None, "check"):
        return check(read)


def _has_errors(findings: list[Finding] | None) -> bool:
    return any(finding.severity == "error" for finding in findings or ())


def _say_findings(findings: list[Finding] | None) -> None:
    for finding in findings or ():
        output.say(str(finding))
    if findings is None:
        output.say("checks: skipped, expert counts keep no token order")
    elif not findings:
        output.say("checks: nothing found")


def _about(read: Input) -> dict[str, Any]:
    """What a trace holds, in the names that `stats` uses."""
    from traces.routing import DECODE, ExpertCounts, content_hash

    about: dict[str, Any] = {
        "model": read.model,
        "capture": read.capture,
        "n_experts": read.n_experts,
        "top_k": read.top_k,
        "layers": len(read.layers),
        "first_layer": read.layers[0] if read.layers else None,
        "last_layer": read.layers[-1] if read.layers else None,
        "content_sha256": content_hash(read),
    }
    if isinstance(read, ExpertCounts):
        return {"kind": "expert_counts"} | about
    decode = int((read.phase == DECODE).sum())
    return (
        {"kind": "routing_trace"}
        | about
        | {
            "tokens": read.n_tokens,
            "requests": len(set(read.request.tolist())),
            "prefill": read.n_tokens - decode,
            "decode": decode,
        }
    )


def _cells(document: dict[str, Any], columns: tuple[str, ...]) -> tuple[object, ...]:
    return tuple(document[column] for column in columns)
