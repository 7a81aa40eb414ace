"""The learning rate of an iteration: a function of the configuration alone, so nothing of it needs to be saved."""

import math

from acpo_dist.config.schema import Config


def learning_rate(config: Config, iteration: int) -> float:
    """Rate of this iteration's steps: warm-up, height, fall, as torchtitan names and shapes them.

    Steps at full rate leave the weights scattered about the optimum by as much as the rate; falling to 0 settles them.
    Warm-up and fall multiply; the last iteration still moves.
    """
    learner, total = config.learner, config.run.iterations
    rise = min((iteration + 1) / (learner.lr_warmup + 1), 1.0)
    falling = learner.lr_decay_ratio * total
    left = min((total - iteration) / falling, 1.0) if falling else 1.0
    if learner.lr_decay_type == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return learner.learning_rate * rise * left
