"""All commands. Heavy modules are imported inside them, so that `acpo --help` is fast."""

from acpo_dist.cli import (
    compare,
    config,
    demo,
    doctor,
    embed,
    eval,
    export,
    follow,
    generate,
    pairs,
    plan,
    promote,
    report,
    rewards,
    rewards_distil,
    rewards_pool,
    rewards_train,
    runs,
    score,
    submit,
    sweep,
    toy,
    train,
    vrg,
)  # fmt: skip

__all__ = [
    "compare", "config", "demo", "doctor", "embed", "eval", "export", "follow", "generate", "pairs", "plan", "promote",
    "report", "rewards", "rewards_distil", "rewards_pool", "rewards_train", "runs", "score", "submit", "sweep", "toy",
    "train", "vrg",
]  # fmt: skip
