"""Print the metrics of an evaluation as tables."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.console

from acpo_dist.evaluation.suites.set_metrics import counts_of, reasons_of
from acpo_dist.tracking.console import Console


def show(report: Mapping[str, Any], folder: Path) -> None:
    """Print the tables to standard output."""
    console = Console(rich_console=rich.console.Console(file=sys.stdout))
    judges, sets = report["judges"], report["sets"]
    compared = any("comparison" in metrics for metrics in judges)
    console.table(*_means(judges, compared))
    _say(console, reasons_of({metrics["judge"]: metrics for metrics in judges}))
    for metrics in judges:
        if metrics["categories"]:
            console.table(*_categories(metrics, compared))
            _say(console, reasons_of(metrics["categories"]))
    console.table(*_sets(sets))
    if "drift" in report:
        console.table(*_drift(report["drift"]))
    if "denoising" in report:
        console.table(*_denoising(report["denoising"]))
    console.message(f"{report['how']['samples']} samples in {folder}; evaluation.json has all metrics")


def _say(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.message(line)


def _means(judges: list[dict[str, Any]], compared: bool) -> tuple[str, list[str], list[list[str]]]:
    rows = [_cells(_name(metrics), metrics, compared) for metrics in judges]
    better = "; a positive difference favours the model" if compared else ""
    return f"mean and 95 % interval over prompts{better}", _head("judge", compared), rows


def _categories(metrics: dict[str, Any], compared: bool) -> tuple[str, list[str], list[list[str]]]:
    rows = [_cells(name, part, compared) for name, part in metrics["categories"].items()]
    return f"{_name(metrics)} by category", _head("category", compared), rows


def _head(first: str, compared: bool) -> list[str]:
    return [first, "model", *(["comparison", "difference", "win rate"] if compared else []), "n"]


def _cells(name: str, metrics: Mapping[str, Any], compared: bool) -> list[str]:
    cells = [name, _mean(metrics["model"])]
    if compared:
        cells.append(_mean(metrics["comparison"]) if "comparison" in metrics else "-")
        paired = metrics.get("paired", {})
        cells += [_interval(paired[key]) if key in paired else "-" for key in ("difference", "win_rate")]
    return [*cells, "\n".join(counts_of(metrics))]


def _sets(sets: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    rows: list[list[str]] = []
    for arm in ("model", "comparison"):
        one = sets.get(arm)
        if not one:
            continue
        count = f"{one['num_images']} images"
        if "not_given" in one:
            rows.append([f"{arm}: features", *_given(one, "", count)])
            continue
        rows.append([f"{arm}: within-prompt distance", *_given(one["within_prompt_diversity"], "mean_distance", count)])
        rows.append([f"{arm}: mean distance", *_given(one["mean_distance"], "value", count)])
        if "vendi" in one:
            rows.append([f"{arm}: Vendi score", *_given(one["vendi"], "value", count)])
    between = sets.get("between")
    if between:
        counts = f"{between['num_model']} against {between['num_comparison']}"
        few = "(few samples: compare only at equal counts)" if between["frechet"].get("few_samples") else ""
        rows.append(["Frechet distance", *_given(between["frechet"], "value", counts + few)])
        subsets = between["kid"].get("subset_size")
        rows.append(["KID", *_given(between["kid"], "mean", f"{counts}, subsets of {subsets}")])
        for name in ("precision", "recall", "density", "coverage"):
            rows.append([name, *_given(between["manifold"], name, counts)])
    source = next((one["features"] for one in sets.values() if "features" in one), "none")
    return f"sets, on {source} features", ["metric", "value", "on"], rows


def _denoising(found: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    model, base = found["by_timestep"]["model"], found["by_timestep"]["base"]
    rows = [[str(t), f"{base[t]:.4g}", f"{model[t]:.4g}", f"{model[t] / base[t]:.3f}"] for t in model]
    rows.append(["mean", f"{found['base']:.4g}", f"{found['model']:.4g}", f"{found['ratio']:.3f}"])
    title = f"denoising error on {found['num_images']} held-out images of {found['images']}"
    return title, ["timestep", "base", "model", "ratio"], rows


def _drift(drift: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    rows = [
        [timestep, f"{drift['anchor'][timestep]:.4g}", f"{drift['base_denoising'][timestep]:.4g}",
         f"{drift['denoising'][timestep]:.4g}"]
        for timestep in drift["anchor"]
    ]  # fmt: skip
    title = (
        f"drift from the base on {drift['num_samples']} samples: rms {drift['rms']:.4g}, path KL "
        f"{drift['path_kl_nats']:.4g} nats"
    )
    return title, ["timestep", "anchor error", "denoising error, base", "denoising error, model"], rows


def _name(metrics: Mapping[str, Any]) -> str:
    remarks = [
        *([] if metrics["higher_is_better"] else ["lower is better"]),
        *([] if metrics["role"] == "judge" else [metrics["role"]]),
    ]
    return metrics["judge"] + (f" ({', '.join(remarks)})" if remarks else "")


def _mean(one: Mapping[str, Any]) -> str:
    """Format value and interval in two lines: side by side, five such columns exceed a terminal's width."""
    if one["mean"] is None:
        return "-"
    return f"{one['mean']:.4g}" + (f"\n{one['low']:.3g}..{one['high']:.3g}" if one["low"] is not None else "")


def _interval(one: Mapping[str, Any]) -> str:
    return f"{one['value']:.4g}\n{one['low']:.3g}..{one['high']:.3g}"


def _given(metric: Mapping[str, Any], key: str, on: str) -> list[str]:
    return ["-", metric["not_given"]] if "not_given" in metric else [f"{metric[key]:.4g}", on]
