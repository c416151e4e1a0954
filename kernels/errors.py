"""The one error of this package."""

from __future__ import annotations


class KernelError(ValueError):
    """A tensor, shape, format or configuration the kernels cannot take; the text names it."""
