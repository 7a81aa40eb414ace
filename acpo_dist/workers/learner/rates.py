"""Learning rate of an iteration, a function of the configuration only, which needs no state in checkpoints."""

import math

from acpo_dist.config.schema import Config


def learning_rate(config: Config, iteration: int) -> float:
    """Return the learning rate of an iteration: warm-up, constant phase and decay, with torchtitan's definitions.

    At full rate the weights fluctuate around the optimum in proportion to the rate; decay reduces the fluctuation.
    Warm-up and decay factors multiply; the rate of the last iteration is above 0.
    """
    learner, total = config.learner, config.run.iterations
    rise = min((iteration + 1) / (learner.lr_warmup + 1), 1.0)
    falling = learner.lr_decay_ratio * total
    left = min((total - iteration) / falling, 1.0) if falling else 1.0
    if learner.lr_decay_type == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return learner.learning_rate * rise * left
