"""Subjects of an evaluation: a model with its weights and trajectory, or existing images."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import ConfigError, ModelError, UsageError
from acpo_dist.core.ports import RolloutPool
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.types import WeightBundle
from acpo_dist.core.weights import require_acks
from acpo_dist.data.encoded import EncodedImages
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.evaluation.suites.judges import weights_digest
from acpo_dist.models.loading import resolve_path
from acpo_dist.training.open_model import keeps_own_trajectory, prepared, source_config
from acpo_dist.training.trajectory.artefact import configured_trajectory, trajectory_from_mapping
from acpo_dist.workers.learner.checkpoint import Checkpoint, CheckpointStore

BASE = "base"
NEWEST = "newest"
BEST = "best"


@dataclass(frozen=True, kw_only=True)
class ModelSubject:
    """A model to sample from."""

    source: str
    """Name given by the user."""
    config: Config
    facts: dict[str, Any]
    """Provenance of the model, for the plan and the report."""
    run: Path | None = None
    bundle: WeightBundle | None = field(default=None, repr=False)
    """Weights of a run's checkpoint; None samples with the pipeline's own weights."""
    trajectory: Trajectory | None = None
    """Trajectory of the run at the checkpoint; None uses `config.sampler`."""

    @property
    def conditional(self) -> bool:
        """Whether the model takes prompts."""
        return self.config.model.conditional


@dataclass(frozen=True, kw_only=True)
class ImageSubject:
    """Existing images."""

    source: str
    images: EncodedImages = field(repr=False)
    facts: dict[str, Any]


def open_images(source: str, *, image_column: str, caption_columns: Sequence[str]) -> ImageSubject:
    """Open a folder of images, an image, a zip archive, or a parquet file or a folder of them.

    Args:
        source: the path.
        image_column: column of parquet files with the encoded image.
        caption_columns: columns with the caption, see `EncodedImages`.

    Raises:
        DataError: the images cannot be listed.
        UsageError: there are none.
    """
    images = EncodedImages(Path(source), image_column=image_column, caption_columns=caption_columns)
    if not len(images):
        raise UsageError(f"{source} holds no image.")
    return ImageSubject(source=source, images=images, facts={"kind": "images", "source": source})


def open_model(source: str, overrides: Sequence[str], *, checkpoint: str, prompted: bool) -> ModelSubject:
    """Open a run, a configuration or a pipeline folder.

    Args:
        source: run folder, configuration file, pipeline folder or name of an embedded toy.
        overrides: `key=value`; `sampler.num_steps`, `spacing` and `trajectory` also replace the trajectory of a run.
        checkpoint: checkpoint of a run: `newest`, `best` (by its judges), or an iteration.
        prompted: whether the suite has prompts.

    Returns:
        The model.

    Raises:
        UsageError: the model does not exist, or does not match the suite.
        ModelError: the run lacks the checkpoint.
    """
    config, run = _config(source, overrides, prompted=prompted)
    config = prepared(config, run) if run else config
    resolve("model", MODELS, config.model.type).check(config.model)
    subject = ModelSubject(source=source, config=config, run=run, facts=_model_facts(source, config, run))
    if subject.conditional != prompted:
        wrong = "draws from prompts" if subject.conditional else "takes prompts"
        right = "a suite of prompts" if subject.conditional else "--suite none"
        raise UsageError(f"{source} {wrong}: give {right}.")
    if run is None:
        return subject
    found = find_checkpoint(run, config, checkpoint)
    bundle = found.bundle()
    own_sampler = keeps_own_trajectory(overrides)
    return replace(
        subject, bundle=bundle, trajectory=trajectory_from_mapping(found.state["trajectory"]) if own_sampler else None,
        facts=subject.facts
        | {"iteration": found.iteration, "policy_version": bundle.version, "policy_sha256": bundle.checksum},
    )  # fmt: skip


def open_comparison(wanted: str, subject: ModelSubject, *, checkpoint: str) -> ModelSubject:
    """Open the model to compare with; it uses the sampler and the image sizes of the first model.

    Args:
        wanted: a source as in `open_model`, or `base`: the model that a run was tuned from.
        subject: the first model.
        checkpoint: checkpoint of a run, see `open_model`.

    Returns:
        The model.

    Raises:
        UsageError: `wanted` is `base` and `subject` is no run, or the model does not match.
    """
    if wanted == BASE:
        if subject.run is None:
            raise UsageError(
                f"--compare base: {subject.source} is no run, so its base model is unknown. Name the other model: a "
                "run, a pipeline folder or an embedded toy."
            )
        facts = {key: value for key, value in subject.facts.items() if not key.startswith("policy_")}
        return replace(subject, source=BASE, bundle=None, facts=facts | {"source": BASE, "iteration": 0, "kind": BASE})
    other = open_model(wanted, [], checkpoint=checkpoint, prompted=subject.conditional)
    sections: dict[str, Any] = {
        "sampler": subject.config.sampler,
        "rollout": subject.config.rollout,
        "cluster": subject.config.cluster,
    }
    if subject.config.model.sizes and hasattr(other.config.model, "image_size"):
        size = {"image_size": subject.config.model.image_size}
        sections["model"] = other.config.model.model_copy(update=size)
    return replace(other, config=other.config.model_copy(update=sections), trajectory=subject.trajectory)


def settle(pool: RolloutPool, subject: ModelSubject) -> None:
    """Load the subject's weights and trajectory into every worker.

    Raises:
        WeightSyncError: a worker does not hold the weights afterwards.
    """
    if subject.bundle is not None:
        require_acks(subject.bundle.version, subject.bundle.checksum, pool.load(subject.bundle))
    trajectory, sampler = subject.trajectory, subject.config.sampler
    if trajectory is None:
        trajectory = configured_trajectory(sampler.trajectory, sampler.num_steps, pool.alpha_bars().numpy())
    if trajectory is not None:
        pool.set_trajectory(trajectory)


def find_checkpoint(run: Path, config: Config, which: str) -> Checkpoint:
    """Find a checkpoint of a run.

    Args:
        run: run folder.
        config: configuration of the run.
        which: `newest` complete one, `best` by the judges, or an iteration.

    Returns:
        The checkpoint.

    Raises:
        ModelError: the checkpoint does not exist.
        UsageError: `which` is invalid.
    """
    store = CheckpointStore(run / "checkpoints", keep=config.checkpoint.keep)
    newest = store.newest()
    if newest is None:
        raise ModelError(f"{run} has no complete checkpoint yet: wait for one, or name a pipeline folder instead.")
    if which == NEWEST:
        return newest
    if which != BEST and not which.isdigit():
        raise UsageError(f"--checkpoint must be {NEWEST}, {BEST} or an iteration, found `{which}`.")
    iteration = newest.best_iteration if which == BEST else int(which)
    if iteration == newest.iteration:
        return newest
    folder = run / "checkpoints" / f"{iteration:06d}"
    if not folder.is_dir():
        there = ", ".join(sorted(str(int(path.name)) for path in (run / "checkpoints").glob("[0-9]*")))
        said = (
            "no checkpoint scored higher than the base model with the judges"
            if which == BEST and not iteration
            else (f"there is no checkpoint of iteration {iteration}")
        )
        raise ModelError(f"{run}: {said}; kept are {there} (checkpoint.keep, checkpoint.every).")
    return store.open(iteration)


def _config(source: str, overrides: Sequence[str], *, prompted: bool) -> tuple[Config, Path | None]:
    if prompted:
        try:
            # The prompts of a bare pipeline are unknown. The suite provides them; the key must only be consistent.
            config, run = source_config(source, [*overrides, "data.prompts=toy"])
            if run is None:
                return config, run
        except ConfigError:
            pass  # the next attempt, without the key, reports the actual error
    return source_config(source, overrides)


def _model_facts(source: str, config: Config, run: Path | None) -> dict[str, Any]:
    path = resolve_path(config.model.path)
    facts: dict[str, Any] = {
        "kind": "run" if run else "model", "source": source, "family": config.model.type, "path": config.model.path,
    }  # fmt: skip
    if Path(path).exists():
        facts["weights_sha256"] = weights_digest(Path(path))
    else:
        facts["revision"] = getattr(config.model, "revision", None) or _cached_commit(path)
    return facts


def _cached_commit(repository: str) -> str | None:
    """Return the cached commit of a hub repository, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "model_index.json")
    return Path(found).parent.name if isinstance(found, str) else None
