"""Fitted operators that come with the package, one device a file; see docs/costs.md."""
