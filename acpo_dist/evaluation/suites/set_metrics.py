"""Metrics of a finished evaluation: per judge with intervals over prompts, and of the two sets of images."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acpo_dist.core.errors import DataError, ModelError, UsageError
from acpo_dist.data.decoding import at_once, decode_named
from acpo_dist.evaluation.metrics.content import content_statistics
from acpo_dist.evaluation.metrics.distances import SampleError, frechet_distance, kid
from acpo_dist.evaluation.metrics.diversity import mean_pairwise_distance, vendi_of_features, within_prompt_diversity
from acpo_dist.evaluation.metrics.features import Extractor, Features, InceptionFeatures, LowPassPixels, NetworkFeatures
from acpo_dist.evaluation.metrics.manifold import exact_distances, manifold_report
from acpo_dist.evaluation.metrics.paired import bootstrap_mean, compare_paired, prompt_means
from acpo_dist.evaluation.suites.samples import Sample

CONFIDENCE = 0.95
RESAMPLES = 10_000
_KID_SUBSET = 1000
_STACK = 16

Image = tuple[Sample, bytes | None]
"""A sample and its encoded image."""


def judge_metrics(
    judge: str, higher_is_better: bool, rows: Sequence[Sample], others: Sequence[Sample], *, categories: Sequence[str]
) -> dict[str, Any]:
    """Compute the metrics of one judge: means and, with a comparison, paired differences; overall and by category.

    Positive differences favour the model. A missing score excludes both samples of its pair.

    Args:
        judge: name of the judge.
        higher_is_better: direction of the judge's scores.
        rows: samples of the model.
        others: samples of the comparison; empty without one.
        categories: categories to report separately.

    Returns:
        JSON-compatible metrics.
    """
    whole = _judge_once(judge, higher_is_better, rows, others)
    parts = {
        name: _judge_once(judge, higher_is_better, *(_of_category(part, name) for part in (rows, others)))
        for name in categories
    }
    return {"judge": judge, "higher_is_better": higher_is_better, **whole, "categories": parts}


def set_metrics(rows: Iterable[Image], others: Iterable[Image] | None, extractor: Extractor) -> dict[str, Any]:
    """Compute diversity and content of each set, and the distances between the sets.

    Args:
        rows: samples of the model with their encoded images.
        others: samples of the comparison; None without one.
        extractor: feature extractor.

    Returns:
        JSON-compatible metrics; a metric that cannot be computed is replaced by the reason.
    """
    features, report = {}, {}
    for arm, images in (("model", rows), ("comparison", others)):
        if images is not None:
            features[arm], report[arm] = _one_set(images, extractor)
    reference = features.get("comparison") or features["model"]
    bandwidth = _median_distance(reference) if reference is not None else 0.0
    for arm, found in features.items():
        if found is not None and found.noise_blind:
            report[arm]["vendi"] = _or_reason(
                lambda found=found: {"value": vendi_of_features(found, bandwidth=bandwidth), "bandwidth": bandwidth}
            )
    mine, theirs = (found.values if (found := features.get(arm)) else None for arm in ("model", "comparison"))
    if mine is None or theirs is None:
        return report
    fewest = min(len(mine), len(theirs))
    return report | {
        "between": {
            "num_model": len(mine),
            "num_comparison": len(theirs),
            "frechet": _or_reason(lambda: frechet_distance(mine, theirs).to_mapping()),
            "kid": _or_reason(lambda: kid(mine, theirs, subset_size=min(_KID_SUBSET, fewest)).to_mapping()),
            "manifold": _or_reason(lambda: manifold_report(theirs, mine).to_mapping()),
        }
    }


def open_extractor(text: str) -> Extractor:
    """Open a feature extractor by name.

    Args:
        text: `low-pass` or `low-pass:SIZE`, `inception:FILE`, `efficientnet-lite0:FILE`, or
            `network:MODULE:CLASS:FILE`.

    Returns:
        The extractor.

    Raises:
        UsageError: the name is unknown, or the file does not match.
    """
    kind, _, rest = text.partition(":")
    if kind == "low-pass" and (not rest or rest.isdigit()):
        return LowPassPixels(int(rest)) if rest else LowPassPixels()
    if kind == "inception" and rest:
        return InceptionFeatures(Path(rest))
    if kind == "efficientnet-lite0" and rest:
        return NetworkFeatures.load("acpo_dist.evaluation.metrics.efficientnet:EfficientNetLite0", Path(rest))
    if kind == "network" and rest.count(":") >= 2:
        module, name, file = rest.split(":", 2)
        return NetworkFeatures.load(f"{module}:{name}", Path(file))
    raise UsageError(
        f"--features {text}: expected low-pass, low-pass:SIZE, inception:FILE, efficientnet-lite0:FILE or "
        "network:MODULE:CLASS:FILE."
    )


def _judge_once(judge: str, higher_is_better: bool, rows: Sequence[Sample], others: Sequence[Sample]) -> dict[str, Any]:
    metrics: dict[str, Any] = {"model": _mean(judge, rows)}
    if not others:
        return metrics
    metrics["comparison"] = _mean(judge, others)
    by_id = {row.sample_id: row for row in others}
    pairs = [
        (row.prompt_id, row.scores.get(judge), by_id[row.sample_id].scores.get(judge))
        for row in rows
        if row.sample_id in by_id
    ]
    whole = [(unit, mine, theirs) for unit, mine, theirs in pairs if mine is not None and theirs is not None]
    sign = 1.0 if higher_is_better else -1.0
    metrics["paired"] = _or_reason(
        lambda: compare_paired(
            [sign * mine for _, mine, _ in whole], [sign * theirs for _, _, theirs in whole],
            [str(unit) for unit, _, _ in whole], confidence=CONFIDENCE, resamples=RESAMPLES,
        ).to_mapping()
    )  # fmt: skip
    metrics["num_unpaired"] = len(rows) + len(others) - 2 * len(whole)
    return metrics


def _of_category(rows: Sequence[Sample], name: str) -> list[Sample]:
    return [row for row in rows if row.category == name]


def _mean(judge: str, rows: Sequence[Sample]) -> dict[str, Any]:
    """Return the mean over prompts of their sample means, with its interval; None without scores."""
    found = [(str(row.prompt_id), score) for row in rows if (score := row.scores.get(judge)) is not None]
    counts = {"num_samples": len(found), "num_missing": len(rows) - len(found)}
    if not found:
        return {"mean": None, "low": None, "high": None, **counts}
    units = prompt_means(np.asarray([score for _, score in found], dtype=np.float64), [unit for unit, _ in found])
    if len(units) < 2:
        return {"mean": float(units[0]), "low": None, "high": None, **counts}
    interval = bootstrap_mean(units, confidence=CONFIDENCE, resamples=RESAMPLES, seed=0)
    return {"mean": interval.value, "low": interval.low, "high": interval.high, "method": interval.method, **counts}


def _one_set(images: Iterable[Image], extractor: Extractor) -> tuple[Features | None, dict[str, Any]]:
    """Return the features of a set, and its own metrics."""
    parts: list[Features] = []
    prompts: list[str] = []
    sums: dict[str, float] = {}
    refusal: str | None = None
    for stack, ids in _stacks(images):
        try:
            parts.append(extractor(stack))
        except (ValueError, ModelError) as error:
            # For example images too small for the extractor; the judges' metrics must not be lost.
            refusal = f"{error} (--features)"
        prompts += ids
        for name, values in content_statistics(stack).items():
            sums[name] = sums.get(name, 0.0) + float(values.double().sum())
    content = {name: total / len(prompts) for name, total in sums.items()}
    if not parts or refusal:
        return None, {"num_images": len(prompts), "content": content, "not_given": refusal or "no image"}
    features = replace(parts[0], values=torch.cat([part.values for part in parts]))
    return features, {
        "num_images": len(prompts),
        "features": features.source,
        "within_prompt_diversity": _or_reason(lambda: _diversity(features, prompts)),
        "mean_distance": _or_reason(lambda: {"value": mean_pairwise_distance(features.values)}),
        "content": content,
    }


def _stacks(images: Iterable[Image]) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield consecutive images of one size as uint8 (N, 3, H, W), with the ids of their prompts."""
    tensors: list[Tensor] = []
    ids: list[str] = []
    for row, data in images:
        try:
            image = decode_named(data, row.image)
        except DataError:
            continue  # it has no score either, and is counted there
        if tensors and (len(tensors) == at_once(tensors[0], _STACK) or image.shape != tensors[0].shape):
            yield torch.stack(tensors), ids
            tensors, ids = [], []
        tensors.append(image)
        ids.append(str(row.prompt_id))
    if tensors:
        yield torch.stack(tensors), ids


def _diversity(features: Features, prompts: Sequence[str]) -> dict[str, Any]:
    if len(set(prompts)) == len(prompts):
        raise SampleError("one sample of each prompt; set --samples-per-prompt to 2 or more")
    whole = within_prompt_diversity(features.values, prompts).to_mapping()
    return {key: value for key, value in whole.items() if key != "by_prompt"}


def _median_distance(features: Features) -> float:
    wide = features.values.double()
    distances = exact_distances(wide, wide)
    upper = distances[tuple(torch.triu_indices(len(wide), len(wide), 1))]
    return float(upper.median()) if len(upper) else 0.0


def _or_reason(compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return a metric, or the reason why it cannot be computed."""
    try:
        return dict(compute())
    except SampleError as error:
        return {"not_given": str(error)}


def counts_of(metrics: Mapping[str, Any]) -> list[str]:
    """Describe the counts behind a judge's metrics: samples, missing scores, pairs, and unpaired samples."""
    missing = sum(metrics[arm]["num_missing"] for arm in ("model", "comparison") if arm in metrics)
    unpaired = metrics.get("num_unpaired", 0)
    return [
        f"{metrics['model']['num_samples']} samples",
        *([f"{missing} missing"] if missing else []),
        *([f"{metrics['paired']['num_samples']} pairs"] if "num_samples" in metrics.get("paired", {}) else []),
        *([f"{unpaired} unpaired"] if unpaired else []),
    ]


def reasons_of(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the reasons for missing paired comparisons.

    Args:
        metrics: name -> metrics of a judge, or of one of its categories, see `judge_metrics`.

    Returns:
        One line per reason.
    """
    names: dict[str, list[str]] = {}
    for name, one in metrics.items():
        if reason := one.get("paired", {}).get("not_given"):
            names.setdefault(reason, []).append(name)
    return [f"no difference for {', '.join(those)}: {reason}" for reason, those in names.items()]


def total_missing(judges: Iterable[Mapping[str, Any]]) -> int:
    """Return the number of missing scores over all judges and arms."""
    return sum(metrics[arm]["num_missing"] for metrics in judges for arm in ("model", "comparison") if arm in metrics)
