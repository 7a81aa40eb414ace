"""Images of a report: base and tuned model with the same prompts, seeds and trajectory, scored and cached."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from acpo_dist.analysis.report.record import RunRecord
from acpo_dist.config.schema import Config
from acpo_dist.core.by_size import Mixed, by_size, gather
from acpo_dist.core.errors import CheckpointError, UsageError
from acpo_dist.core.files import replace_file
from acpo_dist.core.types import PromptGroup, RolloutHandle
from acpo_dist.data.prompts import run_prompts, sample_prompts, size_mix
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import parse_object
from acpo_dist.training.local import LocalRollouts, default_device
from acpo_dist.training.open_model import open_rollouts
from acpo_dist.training.prepare import prepare
from acpo_dist.training.run_folder import read_run_config
from acpo_dist.training.trajectory.artefact import trajectory_from_mapping
from acpo_dist.workers.learner.checkpoint import Checkpoint, CheckpointStore
from acpo_dist.workers.reward.worker import RewardWorker

logger = logging.getLogger(__name__)

_INDEX = "images.json"
REPORT = "report"
_SEED = 0
"""Seed of the prompts and samples, the same for every run, so that reports of several runs show the same scenes."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its prompt, seed and scores."""

    prompt: str
    seed: int
    file: Path
    scores: dict[str, float]
    """Raw scores by metric."""


class SampleRenderer:
    """Renders samples of a run and caches them in `RUN/report/`; models are loaded only for missing samples.

    Args:
        record: a run with a folder.
        prompts: number of prompts.
        per_prompt: seeds per prompt.
        console: shows progress.

    Raises:
        ResumeError: the folder is no run.
        ConfigError: its configuration does not fit this version.
    """

    def __init__(self, record: RunRecord, *, prompts: int, per_prompt: int, console: Console) -> None:
        assert record.root is not None
        self.root, self._console = record.root, console
        self.config = prepare(read_run_config(self.root), self.root / "base", console)
        texts = run_prompts(self.config)
        self.groups = sample_prompts(
            texts, iteration=0, run_seed=_SEED, stream="report", num_prompts=prompts, samples_per_prompt=per_prompt,
            mix=size_mix(self.config),
        )  # fmt: skip
        self._store = CheckpointStore(self.root / "checkpoints", keep=self.config.checkpoint.keep)
        self._pool: LocalRollouts | None = None
        self._tuned = False
        self._metrics: list[RewardWorker] | None = None

    def checkpoint(self, iteration: int) -> Checkpoint:
        """Open a checkpoint and verify it.

        Raises:
            UsageError: the checkpoint is damaged or missing.
        """
        try:
            return self._store.open(iteration)
        except CheckpointError as error:
            raise UsageError(
                f"{error}. Select another checkpoint with --at, or omit images with --no-samples."
            ) from error

    def samples(self, checkpoint: Checkpoint | None, trajectory: Any) -> list[Sample]:
        """Return images of a checkpoint, or of the base model (None), in the order of the groups.

        Args:
            checkpoint: the checkpoint; None is the base model.
            trajectory: the checkpoint's trajectory as a mapping, used for both models; None is evenly spaced.
        """
        weights = _weights_sum(checkpoint)
        name = "base" if checkpoint is None else f"{checkpoint.iteration:06d}"
        folder = self.root / REPORT / f"{name}-{self._digest(weights, trajectory)}"
        kept = _read(folder)
        if kept is not None:
            return kept
        plans = [plan for group in self.groups for plan in group.samples]
        handles = self.draw(checkpoint, trajectory, self.groups, label=f"images: {name}")
        images = self._open().images(handles, [plan.sample_id for plan in plans])
        scores = self._score(images, [plan.prompt for plan in plans])
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for index, plan in enumerate(plans):
            file = folder / f"{index:03d}.png"
            Image.fromarray(images[index].permute(1, 2, 0).contiguous().numpy()).save(file)
            own = {metric: values[index] for metric, values in scores.items()}
            rows.append({"file": file.name, "prompt": plan.prompt, "seed": plan.seed, "scores": own})
        # Written last, so that an incomplete folder is ignored.
        replace_file(folder / _INDEX, json.dumps({"samples": rows}, indent=1).encode())
        kept = _read(folder)
        assert kept is not None
        return kept

    def draw(
        self, checkpoint: Checkpoint | None, trajectory: Any, groups: Sequence[PromptGroup], *, label: str
    ) -> list[RolloutHandle]:
        """Sample from a checkpoint's weights, or from the base model."""
        # Weights cannot be unloaded, so the base model is loaded again after a tuned one.
        pool = self._open(fresh=checkpoint is None and self._tuned)
        pool.set_trajectory(self._spaced if trajectory is None else trajectory_from_mapping(trajectory))
        if checkpoint is not None:
            pool.load(checkpoint.bundle())
            self._tuned = True
        with self._console.phase(label, sum(len(group.samples) for group in groups)) as advance:
            return pool.generate(groups, advance)

    def close(self) -> None:
        """Free the memory of the models."""
        self._pool = self._metrics = None

    def _open(self, *, fresh: bool = False) -> LocalRollouts:
        if self._pool is None or fresh:
            with self._console.phase("load the model", None):
                self._pool = open_rollouts(self.config, None)
            self._tuned, self._spaced = False, self._pool.trajectory()
        return self._pool

    def _score(self, images: Mixed, prompts: Sequence[str]) -> dict[str, list[float]]:
        entries = {entry.name: entry for entry in self.config.rewards.image_metrics}
        if self._metrics is None:
            self._metrics = [
                RewardWorker(entry, model=None, cut="image", wire_dtype="float32", device=default_device())
                for entry in entries.values()
            ]
        with self._console.phase("images: score", None):
            return {worker.name: _score_all(worker, images, prompts) for worker in self._metrics}

    def _digest(self, weights: str, trajectory: Any) -> str:
        return _digest_of(self.config, weights, trajectory, [plan.seed for g in self.groups for plan in g.samples])


def _score_all(worker: RewardWorker, images: Mixed, prompts: Sequence[str]) -> list[float]:
    scores = dict[int, float]()
    for indices, part in by_size(images):
        scores |= zip(indices, worker.score(part, [prompts[index] for index in indices]), strict=True)
    return [scores[index] for index in range(len(images))]


def chosen_iteration(record: RunRecord, at: str) -> int | None:
    """Return the iteration of the checkpoint that a report shows; None if the run has no checkpoint.

    Args:
        record: the run.
        at: `export` (the last, or the best after a roll-back), `last`, `best` (by the judges), or an iteration.

    Raises:
        UsageError: the checkpoint does not exist.
    """
    known = list(record.checkpoints)
    if not known:
        return None
    ended = record.guard_end
    if at == "best":
        wanted = _best(record)
    elif at == "export" and ended is not None and ended.get("action") == "roll_back":
        wanted = int(ended["best_iteration"])
    elif at in ("export", "last"):
        wanted = known[-1]
    elif at.isdigit():
        wanted = int(at)
    else:
        raise UsageError(f"--at must be export, last, best or the number of an iteration, found `{at}`")
    if wanted not in known:
        raise UsageError(
            f"{record.root} has no checkpoint of iteration {wanted}; found {', '.join(map(str, known))}. Select one "
            "of them with --at."
        )
    return wanted


def _best(record: RunRecord) -> int:
    """Return the best checkpoint, as selected by `acpo eval` and `acpo promote`.

    Raises:
        UsageError: there is none.
    """
    assert record.root is not None
    newest = CheckpointStore(record.root / "checkpoints", keep=1).newest()
    if newest is None:
        raise UsageError(f"{record.root} has no complete checkpoint, so no best one: omit images with --no-samples.")
    best = newest.best_iteration
    if best == 0 and 0 not in record.checkpoints:
        raise UsageError(
            f"{record.root}: no checkpoint scored higher than the base model with the judges. Select another one "
            "with --at."
        )
    return best


def read_pixels(samples: Sequence[Sample]) -> Mixed:
    """Return images as uint8 (N, 3, H, W), or N images of several sizes."""
    arrays = [np.array(Image.open(sample.file).convert("RGB")) for sample in samples]
    return gather([torch.from_numpy(array).permute(2, 0, 1).contiguous() for array in arrays])


def _weights_sum(checkpoint: Checkpoint | None) -> str:
    """Return the checksum of the weights, from the manifest that was just verified."""
    if checkpoint is None:
        return "base"
    manifest = json.loads((checkpoint.folder / "manifest.json").read_text(encoding="utf-8"))
    return str(manifest["files"]["learner/policy.safetensors"])


def _digest_of(config: Config, weights: str, trajectory: Any, seeds: Sequence[int]) -> str:
    """Return a digest of all settings that affect an image or a score."""
    whole = config.to_mapping()
    metrics = [whole["rewards"]["train"], whole["rewards"]["judges"]]
    parts = [whole["model"], whole["sampler"], metrics, whole["data"], weights, trajectory, list(seeds)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _read(folder: Path) -> list[Sample] | None:
    file = folder / _INDEX
    value = parse_object(file.read_bytes()) if file.is_file() else None
    if value is None or "samples" not in value or not all((folder / row["file"]).is_file() for row in value["samples"]):
        return None
    return [
        Sample(prompt=row["prompt"], seed=row["seed"], file=folder / row["file"], scores=row["scores"])
        for row in value["samples"]
    ]
