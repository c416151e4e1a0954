"""The one error of this package."""


class HardwareError(ValueError):
    """A device, link or system is unknown or inconsistent; the message names the figure."""
