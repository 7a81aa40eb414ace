"""The `acpo` command: thin, one file per command."""

from acpo_dist.cli.app import main

__all__ = ["main"]
