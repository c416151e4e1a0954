"""`compiled`: numba's njit with its cache on disk, typed so that a function keeps its signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """The function, compiled when first called: arrays in, arrays out, no objects, no I/O.

    The cache on disk notices changes in the function's own file only. After editing a compiled
    function that another file's compiled code calls, run `make test` or delete the *.nbi files.
    """
    fast: _Function = numba.njit(cache=True)(function)
    return fast


def inlined(function: _Function) -> _Function:
    """The same for a function that only compiled code of its own file calls: always inlined.

    Passing many arrays on costs more than most of what such functions do.
    """
    return cast(_Function, _njit_inlined(function))


_njit_inlined = numba.njit(cache=True, error_model="numpy", forceinline=True)
