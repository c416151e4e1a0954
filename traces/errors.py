"""The one error of this package."""


class TraceError(ValueError):
    """A trace, model or request file is not what it should be; the message names where and what."""
