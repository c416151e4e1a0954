"""Run a trace under the policies of the runtime, in a process of its own.

python -m moesim_kernels.offload --routing FILE.npz --options JSON

FILE.npz holds topk[tokens, layers, k] and predicted[tokens, layers, most], as `measure` takes them;
JSON is an object of MeasureOptions, its `spec` one of StackSpec. What happens is told as JSON lines
on stdout: `stack` (bytes, reused), `turn` (round, done, of), and at the end `end` (result: what
`measure` returns).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from moesim_kernels.errors import KernelError
from moesim_kernels.offload.measure import MeasureOptions, measure
from moesim_kernels.offload.stack import StackSpec

TERMINATED = 143


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 2 could not run."""
    asked = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # give back what is held
    try:
        options = options_of(json.loads(asked.options))
        with np.load(asked.routing, allow_pickle=False) as held:
            topk, predicted = held["topk"], held["predicted"]
        result = measure(topk, predicted, options, _tell_stdout)
    except (KernelError, OSError, KeyError, TypeError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    _tell_stdout({"event": "end", "result": result})
    return 0


def options_of(document: Mapping[str, Any]) -> MeasureOptions:
    """Options from a JSON object; TypeError for a name that is none of them."""
    given = dict(document)
    if "spec" in given:
        given["spec"] = StackSpec(**given["spec"])
    if given.get("folder") is not None:
        given["folder"] = Path(given["folder"])
    return MeasureOptions(**given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moesim_kernels.offload", description=__doc__)
    parser.add_argument("--routing", type=Path, required=True)
    parser.add_argument("--options", default="{}")
    return parser


def _tell_stdout(event: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
