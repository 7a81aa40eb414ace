"""Drift from the base model by timestep and iteration, from the metrics if recorded, else measured on checkpoints."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acpo_dist.analysis.report.record import RunRecord
from acpo_dist.analysis.report.sample_renderer import REPORT, SampleRenderer
from acpo_dist.core.by_size import Mixed, gather
from acpo_dist.core.errors import UsageError
from acpo_dist.core.files import replace_file
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.evaluation.metrics.drift import output_errors
from acpo_dist.models.family import ModelFamily, copy_weights
from acpo_dist.objective.anchor import drift_unit, loss_space, resolve_space
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import parse_object
from acpo_dist.training.local import default_device
from acpo_dist.workers.learner.checkpoint import Checkpoint

KEY = "drift/at/"
"""Prefix of metrics that hold the mean squared drift at a timestep."""
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)
"""Timesteps at which drift is measured, as shares of the noise schedule."""
_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class DriftMap:
    """Mean squared drift, in the anchor's own units."""

    timesteps: Sequence[int]
    iterations: Sequence[int]
    values: Sequence[Sequence[float | None]]
    """One sequence per timestep, one value per iteration."""
    space: str
    """Units: `eps`, `v` or `x0`."""
    source: str
    """Description of the measurement for the page."""


def from_rows(record: RunRecord) -> DriftMap | None:
    """Return the drift recorded during training, or None."""
    rows = [row for row in record.rows if any(key.startswith(KEY) for key in row)]
    if not rows:
        return None
    timesteps = sorted({int(key.removeprefix(KEY)) for row in rows for key in row if key.startswith(KEY)})
    return DriftMap(
        timesteps=timesteps, iterations=[int(row["iteration"]) + 1 for row in rows],
        values=[[row.get(f"{KEY}{timestep}") for row in rows] for timestep in timesteps], space=anchor_space(record),
        source="recorded during training",
    )  # fmt: skip


def from_checkpoints(record: RunRecord, renderer: SampleRenderer, console: Console) -> DriftMap:
    """Measure every checkpoint on the same re-noised images of the base model; results are cached in files.

    Raises:
        UsageError: a checkpoint is damaged.
    """
    columns: dict[int, dict[int, float]] = {}
    family: ModelFamily | None = None
    clean: Mixed = torch.empty(0)
    groups = renderer.groups[:_SAMPLES]
    plans = [plan for group in groups for plan in group.samples][:_SAMPLES]
    prompts, ids = [plan.prompt for plan in plans], [plan.sample_id for plan in plans]
    for iteration in record.checkpoints:
        checkpoint = renderer.checkpoint(iteration)
        file = renderer.root / REPORT / f"drift-{iteration:06d}.json"
        stamp = _stamp(checkpoint, prompts)
        kept = _read(file, stamp)
        if kept is None:
            if family is None:
                handles = renderer.draw(None, None, groups, label="drift: base images")
                at = {
                    name: row
                    for handle in handles
                    for name, row in zip(handle.sample_ids, handle.payload.latents_BCHW, strict=True)
                }
                clean = gather([at[name] for name in ids])
                renderer.close()
                kind = resolve("model", MODELS, renderer.config.model.type)
                family = kind.load(renderer.config.model, device=default_device(), trainable=True)
            with console.phase(f"drift: iteration {iteration}", None):
                assert family is not None
                kept = _measure(family, checkpoint, clean, prompts, anchor_space(record))
            replace_file(file, json.dumps({"stamp": stamp, "mse": kept}).encode())
        columns[iteration] = kept
    timesteps = sorted({timestep for column in columns.values() for timestep in column})
    return DriftMap(
        timesteps=timesteps, iterations=list(columns),
        values=[[column.get(timestep) for column in columns.values()] for timestep in timesteps],
        space=anchor_space(record),
        source=f"measured for this report on {len(prompts)} images of the base model, noised again",
    )  # fmt: skip


def anchor_space(record: RunRecord) -> str:
    """Return the units of the run's anchor and budget."""
    anchor = (record.config.get("algorithm") or {}).get("anchor") or {}
    return str(anchor.get("space", "auto"))


@torch.no_grad()
def _measure(
    family: ModelFamily, checkpoint: Checkpoint, clean: Mixed, prompts: Sequence[str], space: str
) -> dict[int, float]:
    try:
        copy_weights(family.network, checkpoint.bundle().tensors)
    except ValueError as error:
        raise UsageError(
            f"{checkpoint.folder} belongs to another model than the run's configuration: {error}"
        ) from error
    total = len(family.alpha_bars)
    timesteps = [min(total - 1, round(share * total)) for share in SHARES]
    space = resolve_space(space, family.prediction_type)
    found = output_errors(family, clean, prompts, timesteps).anchor
    if space == loss_space(family.prediction_type):
        return found
    return {
        timestep: value * drift_unit(float(family.alpha_bars[timestep]), space, family.prediction_type)
        for timestep, value in found.items()
    }


def _stamp(checkpoint: Checkpoint, prompts: Sequence[str]) -> dict[str, Any]:
    manifest = json.loads((checkpoint.folder / "manifest.json").read_text(encoding="utf-8"))
    return {
        "weights": manifest["files"]["learner/policy.safetensors"],
        "prompts": list(prompts),
        "shares": list(SHARES),
    }


def _read(file: Path, stamp: Mapping[str, Any]) -> dict[int, float] | None:
    value = parse_object(file.read_bytes()) if file.is_file() else None
    if value is None or value.get("stamp") != stamp:
        return None
    return {int(timestep): float(mse) for timestep, mse in value["mse"].items()}
