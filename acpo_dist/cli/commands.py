"""All commands. Heavy modules are imported inside them, so that `acpo --help` is quick."""

from acpo_dist.cli import config, demo, generate, rewards, score, toy, train, vrg

__all__ = ["config", "demo", "generate", "rewards", "score", "toy", "train", "vrg"]
