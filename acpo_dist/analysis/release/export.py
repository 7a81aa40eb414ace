"""Export a checkpoint as a LoRA file or as the merged model, each with a model card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acpo_dist.analysis.release.model_card import CardFacts, loading_code, model_card
from acpo_dist.analysis.release.verdict import guard_ending
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import ModelError, UsageError
from acpo_dist.core.sizes import size_text
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.export import FORMATS, Format, default_format, write_schedule, write_weights
from acpo_dist.training.open_model import prepared
from acpo_dist.training.run_folder import METRICS, git_commit, read_run_config
from acpo_dist.workers.learner.checkpoint import Checkpoint, CheckpointStore, open_checkpoint

WEIGHTS = {"raw": "policy", "ema": "ema"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of an export."""

    folder: Path
    file: Path
    """The LoRA file, the checkpoint file, or the pipeline's index."""
    layout: Format
    card: Path
    schedule: Path | None
    """Trajectory used in training, for standard schedulers; None if the pipeline takes no trajectory."""
    iteration: int
    checksum: str
    """SHA-256 of the tuned weights, as published by the run."""
    guard: str | None
    """How the guard ended the run, and whether these weights are the ones it kept; None if it did not end the run."""


def export(
    source: Path, out: Path, *, layout: Format | None = None, weights: str = "raw", dtype: str = "fp32"
) -> Exported:
    """Write a checkpoint's weights.

    Args:
        source: a run folder or a checkpoint folder. For a run: the newest checkpoint, or the best by the judges if the
            guard rolled the run back, as in the run's own export.
        out: folder to write; must be empty or not exist.
        layout: a name in `FORMATS`; None is the layout of the run's own export.
        weights: `raw` (last step) or `ema` (average over steps).
        dtype: `fp32`, `fp16` or `bf16`.

    Returns:
        Paths, iteration and checksum of the export.

    Raises:
        UsageError: unknown layout, weights or data type, or `out` is not empty.
        ResumeError: `source` is no run.
        ModelError: no complete checkpoint, the checkpoint after a roll-back is missing, or the model takes no LoRA.
        CheckpointError: the checkpoint is damaged.
    """
    if layout is not None and layout not in FORMATS:
        raise UsageError(f"unknown --format {layout}; known: {', '.join(FORMATS)}")
    if weights not in WEIGHTS:
        raise UsageError(f"unknown --weights {weights}; known: {', '.join(WEIGHTS)}")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out: {out} is not empty; name a folder that does not exist yet")
    run, config, checkpoint = _find(source)
    bundle, layout = checkpoint.bundle(WEIGHTS[weights]), layout or default_format(config)
    file = write_weights(
        config, bundle, out, layout=layout, dtype=dtype, weights=weights, iteration=checkpoint.iteration,
        made=checkpoint.made,
    )  # fmt: skip
    schedule = write_schedule(config, checkpoint.state, out)
    card = out / "README.md"
    guard = _guard(run, checkpoint)
    facts = CardFacts(
        config=config, name=config.run.name, iteration=checkpoint.iteration, metrics=_metrics(run, checkpoint),
        provenance=_provenance(config, bundle.checksum, weights), guard=guard or "It did not end the run.",
        code=loading_code(
            config, file=None if layout == "merged" else file.name, whole=layout == "single-file",
            schedule=schedule.name if schedule else None,
        ),
    )  # fmt: skip
    text = model_card(facts)
    card.write_text(text, encoding="utf-8")
    return Exported(
        folder=out, file=file, layout=layout, card=card, schedule=schedule, iteration=checkpoint.iteration,
        checksum=bundle.checksum, guard=guard,
    )  # fmt: skip


def _find(source: Path) -> tuple[Path, Config, Checkpoint]:
    if source.parent.name == "checkpoints":
        run = source.parent.parent
        return run, prepared(read_run_config(run), run), open_checkpoint(source)
    config = prepared(read_run_config(source), source)
    store = CheckpointStore(source / "checkpoints", keep=config.checkpoint.keep)
    found = store.newest()
    if found is None:
        raise ModelError(f"{source} has no complete checkpoint yet: wait for one (checkpoint.every).")
    ending = guard_ending(source, _done(source))
    if ending is None or ending.action != "roll_back":
        return source, config, found
    if not (source / "checkpoints" / f"{ending.best:06d}").is_dir():
        liked = "the base model" if ending.best == 0 else f"iteration {ending.best}"
        raise ModelError(
            f"{source}: {ending.text}. The run was rolled back to {liked}, whose checkpoint does not exist. To "
            f"export anyway, name a checkpoint, such as {found.folder}."
        )
    return source, config, store.open(ending.best)


def _done(run: Path) -> int:
    """Return the iteration of the newest checkpoint, complete or not."""
    return max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))


def _guard(run: Path, checkpoint: Checkpoint) -> str | None:
    ending = guard_ending(run, _done(run))
    if ending is None:
        return None
    if ending.action != "roll_back":
        return ending.text
    held = "is what it went back to" if checkpoint.iteration == ending.best else f"is not: it went to {ending.best}"
    return f"{ending.text}; iteration {checkpoint.iteration} {held}"


def _metrics(run: Path, checkpoint: Checkpoint) -> dict[str, float]:
    """Return the metrics of the iteration before the checkpoint, and gains if the checkpoint is the run's last."""
    path = run / METRICS
    rows = read_metrics(path) if path.is_file() else []
    chosen = [row for row in rows if row.get("iteration") in (checkpoint.iteration - 1, checkpoint.iteration)]
    merged: dict[str, Any] = {}
    for row in chosen:
        # The row after the last iteration holds only the gain; any other later row belongs to newer weights.
        if row["iteration"] < checkpoint.iteration or all(n.startswith(("gain/", "iteration")) for n in row):
            merged |= row
    return {name: value for name, value in merged.items() if isinstance(value, float)}


def _provenance(config: Config, digest: str, weights: str) -> dict[str, str]:
    commit = git_commit()
    return {
        "run": config.run.name,
        "weights": "averaged over optimiser steps" if weights == "ema" else "of the last optimiser step",
        **_drawn_with(config),
        "weights sha256": digest,
        **({"code": commit} if commit else {}),
    }


def _drawn_with(config: Config) -> dict[str, str]:
    """Return settings of the run's images that differ from a pipeline's defaults."""
    said = {
        "revision of the base model": getattr(config.model, "revision", None),
        "image size": ", ".join(size_text(size) for size, _ in config.model.sizes) or None,
        "negative prompt": getattr(config.model, "negative_prompt", None),
    }
    return {name: str(value) for name, value in said.items() if value is not None}
