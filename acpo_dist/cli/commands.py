"""All commands. Heavy modules are imported inside them, so that `acpo --help` is quick."""

from acpo_dist.cli import config, demo, score, toy, train

__all__ = ["config", "demo", "score", "toy", "train"]
