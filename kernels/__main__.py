"""`python kernels [OP ...] --minutes M --out DIR`: the benchmarks from a bare checkout.

`python kernels tune --minutes M --out DIR` tunes the grouped GEMM. Nothing need be installed but
torch, triton and numpy.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

NAME = "moesim_kernels"


def register() -> None:
    """Make this folder importable as `moesim_kernels`, unless that is installed."""
    if importlib.util.find_spec(NAME) is not None:
        return
    here = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        NAME, here / "__init__.py", submodule_search_locations=[str(here)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = package
    spec.loader.exec_module(package)


def main(arguments: list[str]) -> int:
    """Exit code of the runner, or of the tuner where the first argument is `tune`."""
    # `python kernels` puts this folder first on the path, where `runner` and others would be found.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    register()
    if arguments[:1] == ["tune"]:
        from moesim_kernels.bench import tune

        return tune.main(arguments[1:])
    from moesim_kernels import runner

    return runner.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
