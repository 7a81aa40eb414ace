"""Measure the error table of the current model on its own rollouts, with all rollout workers."""

from collections.abc import Sequence

import numpy as np

from acpo_dist.config.schema import Config
from acpo_dist.core.ports import RolloutPool
from acpo_dist.core.types import PromptGroup
from acpo_dist.data.prompts import sample_prompts, size_mix
from acpo_dist.vrg.levels import FloatArray, finite_levels, to_sigmas
from acpo_dist.vrg.sums import ErrorSums
from acpo_dist.vrg.table import ErrorTable


def measure(
    pool: RolloutPool, config: Config, prompts: Sequence[str], alpha_bars: FloatArray, *, images: int, label: str
) -> ErrorSums:
    """Measure error sums until the standard error of every node is at most `vrg.standard_error` (relative).

    Args:
        pool: the rollout workers.
        config: the run's configuration.
        prompts: the run's prompts.
        alpha_bars: the model's alpha_bar by timestep, shape (T,).
        images: maximum number of images, rounded up to a multiple of `vrg.batch`.
        label: name of the random stream of the samples.

    Returns:
        Error sums at `vrg.nodes` log-spaced nodes.
    """
    vrg = config.vrg
    sigmas_T = to_sigmas(finite_levels(alpha_bars))
    nodes = np.exp(np.linspace(np.log(sigmas_T[0]), np.log(sigmas_T[-1]), vrg.nodes))
    nodes[[0, -1]] = sigmas_T[[0, -1]]
    total: ErrorSums | None = None
    for batch in range(-(-images // vrg.batch)):
        handles = pool.generate(single_samples(config, prompts, vrg.batch, f"vrg_{label}", batch))
        for sums in pool.measure_errors(handles, nodes.tolist()):
            total = sums if total is None else total + sums
        assert total is not None
        if batch and (total.standard_errors <= vrg.standard_error * total.v).all():
            break
    assert total is not None
    return total


def table_drift(old: ErrorTable, sums: ErrorSums) -> float:
    """Return the drift of the error table: largest change of log v over the nodes.

    The median change is subtracted, because a common factor of v does not change the best trajectory; so is twice the
    standard error of the change.

    Args:
        old: the table in use.
        sums: the new measurement.

    Returns:
        Drift in log v, at least 0.
    """
    change = np.log(sums.v / old.value(sums.sigmas))
    noise = sums.standard_errors / sums.v
    if old.standard_errors is not None and np.array_equal(old.sigmas, sums.sigmas):
        noise = np.sqrt(noise**2 + (old.standard_errors / old.v) ** 2)
    return float(np.maximum(np.abs(change - np.median(change)) - 2 * noise, 0).max())


def single_samples(
    config: Config, prompts: Sequence[str], count: int, stream: str, iteration: int
) -> list[PromptGroup]:
    """Sample prompts for one image each. Prompts and seeds do not depend on the policy version.

    Args:
        config: the run's configuration.
        prompts: the run's prompts.
        count: number of prompts.
        stream: name of the random stream.
        iteration: index within the random stream.
    """
    return sample_prompts(
        prompts, iteration=iteration, run_seed=config.run.seed, num_prompts=count, samples_per_prompt=1, stream=stream,
        mix=size_mix(config),
    )  # fmt: skip
