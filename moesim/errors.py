"""The one error of this package."""


class SimulationError(ValueError):
    """A program or a simulation input is inconsistent; the message names the task or field."""
