"""Open a model in this process from a run folder, a configuration file or a pipeline folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acpo_dist.config.load import load_config, validate
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import ModelError, UsageError
from acpo_dist.core.json_text import read_object
from acpo_dist.models.checkpoint_files import inspect
from acpo_dist.models.loading import CHECKPOINT_SUFFIXES, resolve_path
from acpo_dist.training.local import LocalRollouts, default_device
from acpo_dist.training.prepare import TRAIN
from acpo_dist.training.run_folder import RESOLVED, read_run_config
from acpo_dist.training.trajectory.artefact import configured_trajectory, trajectory_from_mapping
from acpo_dist.workers.learner.checkpoint import CheckpointStore

_FAMILIES = {
    "StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15", "DDPMPipeline": "ddpm",
    "StableDiffusion3Pipeline": "sd3", "ZImagePipeline": "zimage", "Flux2KleinPipeline": "flux2_klein",
}  # fmt: skip


def source_config(source: str, overrides: Sequence[str]) -> tuple[Config, Path | None]:
    """Return the configuration of a run folder, a configuration file, a pipeline folder, or a checkpoint file.

    Returns:
        (configuration, the run's folder or None).

    Raises:
        UsageError: none of these, or a pipeline of a class that no model family loads.
    """
    path = Path(source)
    if (path / RESOLVED).is_file():
        if overrides:
            return load_config(path / RESOLVED, overrides), path
        return read_run_config(path), path
    checkpoint = path.suffix in CHECKPOINT_SUFFIXES and path.is_file()
    if checkpoint or (path / "model_index.json").is_file() or source.startswith("toy-"):
        return _bare_config(source, overrides), None
    if path.is_dir():
        raise UsageError(
            f"{source} is neither a run (no {RESOLVED}) nor a pipeline (no model_index.json). Give a folder that "
            "`acpo train` or `save_pretrained` wrote, or a configuration file."
        )
    return load_config(source, overrides), None


def keeps_own_trajectory(overrides: Sequence[str]) -> bool:
    """Return whether the trajectory of a run's checkpoint applies: no override sets another one."""
    keys = {text.partition("=")[0].strip() for text in overrides}
    return not keys & {"sampler", "sampler.num_steps", "sampler.spacing", "sampler.trajectory"}


def open_rollouts(config: Config, run: Path | None, *, own_sampler: bool = True) -> LocalRollouts:
    """Return a rollout pool in this process, with the weights and the trajectory of the run's newest checkpoint.

    Args:
        own_sampler: use the trajectory of the checkpoint; False uses the trajectory of the configuration.

    Raises:
        ModelError: the run has no complete checkpoint.
        VrgError: `sampler.trajectory` is unreadable, or not this model's.
    """
    pool = LocalRollouts(prepared(config, run) if run is not None else config, device=default_device())
    if run is not None:
        checkpoint = CheckpointStore(run / "checkpoints", keep=config.checkpoint.keep).newest()
        if checkpoint is None:
            raise ModelError(f"{run} has no complete checkpoint yet: wait for one, or name a pipeline folder instead.")
        pool.load(checkpoint.bundle())
        if own_sampler:
            pool.set_trajectory(trajectory_from_mapping(checkpoint.state["trajectory"]))
            return pool
    sampler = config.sampler
    given = configured_trajectory(sampler.trajectory, sampler.num_steps, pool.alpha_bars().numpy())
    if given is not None:
        pool.set_trajectory(given)
    return pool


def prepared(config: Config, run: Path) -> Config:
    """Return the run's configuration with every `train` replaced by the path of the trained files.

    Raises:
        ModelError: the run has not trained its base model yet.
    """
    if getattr(config.model, "path", None) == TRAIN:
        folder = run / "base" / "ddpm"
        if not (folder / "model_index.json").is_file():
            raise ModelError(f"{run} has not finished training its base model: {folder} does not exist.")
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})
    rewards = {
        role: tuple(_trained(entry, run) for entry in getattr(config.rewards, role)) for role in ("train", "judges")
    }
    return config.model_copy(update={"rewards": config.rewards.model_copy(update=rewards)})


def _trained(entry: Any, run: Path) -> Any:
    if getattr(entry, "weights", None) != TRAIN:
        return entry
    return entry.model_copy(update={"weights": str(run / "base" / f"{entry.name}.safetensors")})


def _bare_config(source: str, overrides: Sequence[str]) -> Config:
    """Return schema defaults for a pipeline folder or checkpoint file; reward and algorithm are placeholders."""
    from acpo_dist.config.overrides import merge_overrides

    path = Path(resolve_path(source))
    if path.is_file():
        family = inspect(path).family
    else:
        name = str(read_object(path / "model_index.json").get("_class_name"))
        if name not in _FAMILIES:
            raise UsageError(f"{source} holds a {name}; known pipelines: {', '.join(_FAMILIES)}.")
        family = _FAMILIES[name]
    mapping = {
        "model": {"type": family, "path": source},
        # A real model must not use the toy's captions by accident: `none` is refused until prompts are set.
        "data": {"prompts": "toy" if source.startswith("toy-") and family != "ddpm" else "none"},
        "rewards": {"train": [{"type": "two_stream"}]},
        "algorithm": {"type": "acpo"},
    }
    return validate(merge_overrides(mapping, overrides, Config), source)
