"""Kernels run in Triton's interpreter unless TRITON_INTERPRET=0 asks for a real device.

The variable must be set before triton is imported, which this file, read when the folder is
collected, comes before: no test elsewhere imports triton at its top.
"""

from __future__ import annotations

import os
import sys

import pytest

if os.environ.setdefault("TRITON_INTERPRET", "1") == "1" and "triton" in sys.modules:
    raise pytest.UsageError(
        "triton was imported before tests/kernels set TRITON_INTERPRET=1; import it inside the "
        "test or function that needs it, or set TRITON_INTERPRET=1 in the environment"
    )


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors of the kernel tests live; skips, visibly, where a device is asked for."""
    import torch

    if os.environ["TRITON_INTERPRET"] == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 needs a GPU, and there is none")
    return "cuda"
