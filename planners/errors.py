"""The one error of this package."""


class PlanError(ValueError):
    """No plan can be made or written; the message names the constraint and by how much."""
