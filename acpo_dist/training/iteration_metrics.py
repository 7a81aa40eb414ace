"""Metrics of one iteration that the driver computes from scores and from the learner's report."""

from collections.abc import Mapping

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import NonFiniteError
from acpo_dist.core.types import Normaliser, ScoreTable
from acpo_dist.objective.composition import compose
from acpo_dist.training.calibration import names_of


def score_metrics(config: Config, scores: ScoreTable, normalisers: Mapping[str, Normaliser]) -> dict[str, float]:
    """Compute mean, minimum, maximum and gain of every reward and judge, and the mean of the composed reward.

    Args:
        scores: raw scores of the iteration's samples by metric and sample id.
        normalisers: by metric name.

    Returns:
        `reward/<name>/<statistic>` and `judge/<name>/<statistic>`. `gain` is in standard deviations of base samples,
        higher is better whatever the metric's own direction.
    """
    metrics: dict[str, float] = {}
    for kind, entries in (("reward", config.rewards.train), ("judge", config.rewards.judges)):
        for name in names_of(entries):
            values = list(scores[name].values())
            metrics[f"{kind}/{name}/mean"] = sum(values) / len(values)
            metrics[f"{kind}/{name}/min"] = min(values)
            metrics[f"{kind}/{name}/max"] = max(values)
            metrics[f"{kind}/{name}/gain"] = sum(map(normalisers[name].normalise, values)) / len(values)
            ceiling = normalisers[name].ceiling
            if kind == "reward" and ceiling is not None:
                reached = [normalisers[name].normalise(value) >= ceiling for value in values]
                metrics[f"reward/{name}/at_hinge"] = sum(reached) / len(values)
    weights = config.rewards.term_weights()
    if len(weights) > 1:
        rows = zip(*(map(normalisers[name].reward, scores[name].values()) for name in weights), strict=True)
        combined = [compose(row, list(weights.values()), config.rewards.spread) for row in rows]
        metrics["reward/combined/mean"] = sum(combined) / len(combined)
    return metrics


def drift_of(config: Config, metrics: Mapping[str, float]) -> float:
    """Return the largest mean squared drift in the learner's metrics.

    Args:
        metrics: `TrainReport.metrics` of an iteration in which the weights changed.

    Raises:
        NonFiniteError: the metrics hold no drift, so the drift budget cannot be enforced.
    """
    found = [metrics[name] for name in ("anchor/late", "anchor/uniform") if name in metrics]
    if not found:
        raise NonFiniteError(
            f"algorithm `{config.algorithm.type}` reported no drift: its metrics lack anchor/late and anchor/uniform, "
            "or no sample of this iteration could be read"
        )
    return max(found)
