"""The command line."""

from mlodeco.cli.commands import app, main

__all__ = ["app", "main"]
