"""Relations between sections, checked before a run starts. Each message names both keys and both values."""

import importlib.util
from pathlib import Path
from typing import Any

from acpo_dist.config.plugins import MetricConfig
from acpo_dist.config.sampler_relations import check_sampler
from acpo_dist.config.schema import Config
from acpo_dist.config.unused_keys import check_unused
from acpo_dist.core.errors import ConfigError, RewardConfigError, shorten
from acpo_dist.core.packages import installed_versions
from acpo_dist.core.registry import nearest
from acpo_dist.core.sizes import size_text


def check_relations(config: Config) -> None:
    """Check that the sections of a configuration do not contradict each other.

    Raises:
        ConfigError: batch arithmetic, backend or data do not fit together.
        RewardConfigError: a metric cannot play its role.
    """
    _check_backend(config)
    _check_batches(config)
    _check_optimizer(config)
    _check_data(config)
    check_sampler(config)
    _check_algorithm(config)
    _check_anchor(config)
    _check_rewards(config)
    _check_vrg(config)
    _check_pipeline(config)
    check_unused(config)


def _check_batches(config: Config) -> None:
    samples = config.rollout.prompts_per_iteration * config.rollout.samples_per_prompt
    learner, rollout = config.learner, config.rollout
    if rollout.batch_size % rollout.samples_per_prompt:
        raise ConfigError(
            f"rollout.batch_size ({rollout.batch_size}) must be a multiple of rollout.samples_per_prompt "
            f"({rollout.samples_per_prompt}): a chunk holds complete prompt groups. Set rollout.batch_size="
            f"{rollout.samples_per_prompt * max(1, rollout.batch_size // rollout.samples_per_prompt)}."
        )
    if samples % learner.global_batch:
        raise ConfigError(
            f"an iteration draws rollout.prompts_per_iteration x rollout.samples_per_prompt = {samples} samples, "
            f"which is not a multiple of learner.global_batch ({learner.global_batch}). Change one of them."
        )
    step = learner.micro_batch * learner.num_ranks
    if learner.global_batch % step:
        raise ConfigError(
            f"learner.global_batch ({learner.global_batch}) must be a multiple of learner.micro_batch x "
            f"learner.num_ranks ({learner.micro_batch} x {learner.num_ranks} = {step}); the quotient is the gradient "
            f"accumulation. Set learner.global_batch={step * max(1, learner.global_batch // step)} or a smaller "
            "learner.micro_batch."
        )


def _check_backend(config: Config) -> None:
    if config.cluster.backend == "local" and config.learner.num_ranks > 1 and config.pipeline.max_staleness:
        raise ConfigError(
            f"pipeline.max_staleness is {config.pipeline.max_staleness}, and {config.learner.num_ranks} launched "
            "processes draw and train in turns: set pipeline.max_staleness=0, or use --backend ray."
        )
    if config.learner.num_ranks > 1 and config.learner.zero_stage is None and config.cluster.backend != "local":
        raise ConfigError(
            f"learner.num_ranks is {config.learner.num_ranks} but learner.zero_stage is unset: plain torch has one "
            "rank. Set learner.zero_stage to 0, 1, 2 or 3."
        )
    if config.cluster.backend == "local" and config.learner.zero_stage is not None:
        raise ConfigError(
            f"cluster.backend is `local` but learner.zero_stage is {config.learner.zero_stage}: DeepSpeed ranks are "
            "Ray actors. Use --backend ray, or unset learner.zero_stage."
        )


def _check_optimizer(config: Config) -> None:
    learner = config.learner
    if learner.offload_optimizer == "cpu" and learner.zero_stage not in (1, 2):
        raise ConfigError(
            f"learner.offload_optimizer is cpu and learner.zero_stage is {learner.zero_stage}: DeepSpeed offloads the "
            "optimiser of stages 1 and 2 here. Set learner.zero_stage=2, or learner.offload_optimizer=none."
        )
    if learner.zero_stage == 0 and learner.precision == "bfloat16":
        raise ConfigError(
            "learner.zero_stage is 0 and learner.precision is bfloat16: DeepSpeed then has no float32 weights to "
            "save. Set learner.zero_stage=1."
        )
    if learner.optimizer != "adamw_8bit":
        return
    if learner.zero_stage is not None:
        raise ConfigError(
            f"learner.optimizer is adamw_8bit and learner.zero_stage is {learner.zero_stage}: 8-bit moments are not "
            "sharded. Set learner.optimizer=adamw, or unset learner.zero_stage."
        )
    if not installed_versions(["bitsandbytes"]):
        raise ConfigError(
            "learner.optimizer is adamw_8bit, which needs bitsandbytes: `pip install bitsandbytes`, or set "
            "learner.optimizer=adamw."
        )


def _check_data(config: Config) -> None:
    conditional = config.model.conditional
    if conditional and config.data.prompts == "none":
        raise ConfigError("data.prompts is `none`, but the model takes prompts: set data.prompts to `toy` or a file.")
    if not conditional and config.data.prompts != "none":
        raise ConfigError(
            f"data.prompts is `{config.data.prompts}`, but the model is unconditional: set data.prompts=none."
        )


def _check_algorithm(config: Config) -> None:
    """Check the algorithm's requirements on rollouts and data."""
    algorithm, rollout, learner = config.algorithm, config.rollout, config.learner
    kind = algorithm.type
    if algorithm.old_decay(0) is not None and learner.zero_stage == 3:
        raise ConfigError(
            f"learner.zero_stage is 3 and algorithm `{kind}` evaluates an older policy's weights in the learner, "
            "which ZeRO 3 does not support. Set learner.zero_stage to 0, 1 or 2."
        )
    if config.rollout.every > 1 and config.data.pairs is None:
        raise ConfigError(
            f"rollout.every is {config.rollout.every}, and data.pairs is unset: every iteration then trains on its "
            "own rollouts. Set rollout.every=1, or data.pairs to train on pairs of a file."
        )
    if config.data.absolute_pairs and config.data.pairs is None:
        raise ConfigError("data.absolute_pairs is true, and data.pairs is unset: there are no pairs to filter.")
    if algorithm.reward_weight == 0 and getattr(algorithm, "anchor", None) is not None and _anchor_is_off(algorithm):
        raise ConfigError(
            "algorithm.reward_weight is 0 and the anchor is off: nothing would be trained. Set one of algorithm."
            "reward_weight, algorithm.anchor.budget and algorithm.anchor.weight."
        )
    if config.data.pairs is not None:
        _check_pairs(config)
    elif algorithm.needs_groups and rollout.samples_per_prompt < 2:
        raise ConfigError(
            f"algorithm `{kind}` compares samples of one prompt, and rollout.samples_per_prompt is "
            f"{rollout.samples_per_prompt}: set it to 2 or more (typically 4)."
        )
    if algorithm.whole_groups and learner.micro_batch % rollout.samples_per_prompt:
        raise ConfigError(
            f"algorithm `{kind}` compares the samples of a prompt within a micro-batch: learner.micro_batch is "
            f"{learner.micro_batch}, and not a multiple of rollout.samples_per_prompt, {rollout.samples_per_prompt}. "
            "Change one of the two."
        )
    if algorithm.paired:
        for key, value in (
            ("rollout.samples_per_prompt", 2 if config.data.pairs is not None else rollout.samples_per_prompt),
            ("learner.micro_batch", learner.micro_batch),
        ):
            if value % 2:
                raise ConfigError(f"algorithm `{kind}` trains on pairs, and {key} is {value}: set an even number.")


def _check_pairs(config: Config) -> None:
    if not config.algorithm.paired:
        raise ConfigError(
            f"data.pairs is set, but algorithm `{config.algorithm.type}` does not train on pairs: use dpo, cpo or sft, "
            "or unset data.pairs."
        )
    if not config.model.conditional:
        raise ConfigError(
            "data.pairs holds captioned images, and the model takes no prompts: unset data.pairs to pair the rollouts."
        )
    if len(config.model.sizes) > 1:
        raise ConfigError(
            f"data.pairs is set and model.image_size names {len(config.model.sizes)} sizes: pairs are cropped to one. "
            "Set model.image_size to one size."
        )


def _check_anchor(config: Config) -> None:
    """Check the anchor's source of data and its units."""
    anchor = getattr(config.algorithm, "anchor", None)
    if anchor is None:
        return
    optional = type(anchor).model_fields["budget"].default is None
    if anchor.weight == "auto" and anchor.budget is None and not optional:
        raise ConfigError(
            "algorithm.anchor.weight is `auto`, which is computed from algorithm.anchor.budget, and the budget is "
            "null. Set the budget, or a weight; algorithm.anchor.weight=0 switches the anchor off."
        )
    from_data = getattr(anchor, "source", "rollout") == "data"
    if getattr(config.algorithm, "data_weight", 0) > 0 and not from_data:
        raise ConfigError(
            f"algorithm.data_weight is {config.algorithm.data_weight}, and the denoising loss needs a batch of real "
            "images: set algorithm.anchor.source=data and data.path."
        )
    if getattr(config.algorithm, "data_reward_weight", 0) > 0 and not from_data:
        raise ConfigError(
            f"algorithm.data_reward_weight is {config.algorithm.data_reward_weight}, which needs a batch of real "
            "images: set algorithm.anchor.source=data and data.path."
        )
    for key in ("flip", "held_out"):
        value = getattr(config.data, key)
        if value and config.model.pixel_space:
            raise ConfigError(
                f"data.{key} is {value}, which applies to the captioned images of latent models, and "
                f"`{config.model.type}` works on pixels. Leave it out."
            )


def _anchor_is_off(algorithm: Any) -> bool:
    anchor = algorithm.anchor
    return anchor.weight == 0 or (anchor.weight == "auto" and anchor.budget is None)


def _check_vrg(config: Config) -> None:
    vrg, steps = config.vrg, config.sampler.num_steps
    if vrg.reference_steps is not None and vrg.reference_steps < 4 * steps:
        raise ConfigError(
            f"vrg.reference_steps is {vrg.reference_steps} and sampler.num_steps is {steps}: the reference must be "
            f"much finer than the trajectories that it validates. Set vrg.reference_steps={4 * steps} or more, or "
            "omit it."
        )


def _check_pipeline(config: Config) -> None:
    memory = getattr(config.model, "memory", None)
    if config.pipeline.max_staleness and memory is not None and memory.offload:
        raise ConfigError(
            f"pipeline.max_staleness is {config.pipeline.max_staleness}, and model.memory.offload is true, which saves "
            "memory where rollouts and learner take turns. Set one of them to its default."
        )
    staleness, algorithm = config.pipeline.max_staleness, config.algorithm
    if staleness == 0:
        return
    if config.data.pairs is not None:
        raise ConfigError(
            f"pipeline.max_staleness is {staleness}, and data.pairs is set: the learner trains on pairs of a file, so "
            "no rollouts can be drawn ahead for it. Set pipeline.max_staleness=0."
        )
    if config.learner.zero_stage == 3 and algorithm.compares_policies:
        raise ConfigError(
            f"pipeline.max_staleness is {staleness}, learner.zero_stage is 3, and algorithm `{algorithm.type}` runs "
            "the weights that drew the samples in the learner, which ZeRO 3 cannot do with sharded parameters. Set "
            "learner.zero_stage to 0, 1 or 2, or pipeline.max_staleness=0."
        )


def _check_rewards(config: Config) -> None:
    names = [entry.name for entry in (*config.rewards.train, *config.rewards.judges)]
    for name in names:
        if names.count(name) > 1:
            raise RewardConfigError(f"two rewards or judges have the name `{name}`: give each its own `name`.")
    for name in config.rewards.pool:
        if name not in names:
            raise RewardConfigError(
                f"rewards.pool.{name}: no reward or judge has this name.{nearest(name, names)} "
                f"Known: {', '.join(names)}."
            )
    if not config.rewards.train and config.data.pairs is None:
        raise RewardConfigError(
            f"rewards.train is empty, and `{config.algorithm.type}` learns from rewards: name a metric, as in "
            "rewards.train=[{type: two_stream}], or train on pairs of a file with data.pairs."
        )
    if not names:
        raise RewardConfigError(
            "rewards.train and rewards.judges are empty: the rollouts of the run would not be scored. Name a metric in "
            "rewards.judges, as in rewards.judges=[{type: two_stream}]."
        )
    pathwise = config.algorithm.pathwise
    for index, entry in enumerate(config.rewards.train):
        reason = _unusable(entry, config)
        if reason is None and pathwise and not entry.differentiable:
            reason = (
                f"has no usable gradient, and `{config.algorithm.type}` needs one. Move it to rewards.judges, or "
                "choose an algorithm that needs only scores"
            )
        reason = reason or _bad_latent_reward(entry, config) or entry.unfit(config.model, config.rewards.judges)
        if reason := reason or _bad_hinge(entry):
            raise RewardConfigError(f"rewards.train.{index} (`{entry.name}`): {reason}.")
    if config.rewards.latent_crop is not None and not pathwise:
        raise RewardConfigError(
            f"rewards.latent_crop is {config.rewards.latent_crop}, and `{config.algorithm.type}` uses no gradient of "
            "a score: remove it."
        )
    if config.rewards.combine == "pessimistic" and len(config.rewards.train) < 2:
        raise RewardConfigError(
            f"rewards.combine is `pessimistic` and rewards.train holds only {names[0]}: one reward has no spread. "
            "Add another, or set rewards.combine=sum."
        )
    default = type(config.rewards).model_fields["spread_weight"].default
    if config.rewards.spread_weight != default and config.rewards.combine != "pessimistic":
        raise RewardConfigError(
            f"rewards.spread_weight is {config.rewards.spread_weight:g}, which only rewards.combine=pessimistic "
            f"uses; found {config.rewards.combine}."
        )
    for index, entry in enumerate(config.rewards.judges):
        reason = _unusable(entry, config)
        if reason is None and entry.space == "latent":
            reason = "scores latents and cannot judge finished images. Name the metric that it estimates"
        if reason is None and entry.hinge is not None:
            reason = "has a `hinge`, and a judge is never optimised. Move the hinge to an entry of rewards.train"
        if reason:
            raise RewardConfigError(f"rewards.judges.{index} (`{entry.name}`): {reason}.")


def _unusable(entry: MetricConfig, config: Config) -> str | None:
    if entry.needs_prompts and not config.model.conditional:
        return (
            "compares images with their prompts, and the model takes no prompts. Choose a metric that scores images "
            "only, or a model that takes prompts"
        )
    # Of several sizes the run would draw one that is too small only after some iterations.
    small = [size_text(size) for size, _ in config.model.sizes if min(size) < entry.minimum_size]
    if small:
        return (
            f"needs images of at least {entry.minimum_size} x {entry.minimum_size}, and model.image_size has "
            f"{shorten(', '.join(small))}. Choose larger sizes (for buckets: {{buckets: SIDE}} with a larger SIDE), or "
            "another metric"
        )
    return entry.unusable()


def _bad_latent_reward(entry: MetricConfig, config: Config) -> str | None:
    if entry.space != "latent":
        return None
    for key, value, other in (
        ("rewards.cut", config.rewards.cut if config.rewards.cut == "image" else None, "rewards.cut=latent"),
        ("rewards.latent_crop", config.rewards.latent_crop, "rewards.latent_crop=null"),
        ("guard.action", "none" if config.guard.action == "none" else None, "guard.action=warn or stop"),
    ):
        if value is not None:
            return f"scores whole latents and needs the guard, and {key} is {value}. Set {other}"
    if isinstance(entry.hinge, Path):
        return f"scores latents, and `hinge` is the images `{entry.hinge}`. Give a normalised score as a number"
    return None


def _bad_hinge(entry: MetricConfig) -> str | None:
    hinge = entry.hinge
    if not isinstance(hinge, Path):
        return None
    if not hinge.exists():
        return (
            f"`hinge` is `{hinge}`, and there is no such file or folder. Give real images (file, folder, parquet "
            "file), or a normalised score as a number"
        )
    if entry.needs_prompts:
        return (
            f"`hinge` is `{hinge}`, but `{entry.type}` compares images with prompts, which real images do not have. "
            "Give a normalised score as a number"
        )
    return None


def module_available(name: str) -> bool:
    """Return whether an optional dependency is installed, without importing it."""
    return importlib.util.find_spec(name) is not None
