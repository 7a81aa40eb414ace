"""Every key of a run: its type, its only default and what it means. Relations live in `relations.py`."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from acpo_dist.config.guard import GuardConfig
from acpo_dist.config.plugins import AlgorithmConfig, MetricConfig, ModelConfig
from acpo_dist.config.pool import HttpConfig, MetricPoolConfig
from acpo_dist.config.roles import RolesConfig
from acpo_dist.config.section import Section, plugin
from acpo_dist.core.registry import ALGORITHMS, MODELS, REWARDS

Decay = Annotated[float, Field(ge=0, lt=1, strict=True)]


class RunConfig(Section):
    """What the run is called, how long it is and where it is kept."""

    name: str = "run"
    """Name in tracking and of the default folder."""
    dir: Path | None = None
    """Folder of the run; None makes `runs/<name>-<seed>`, or `<name>-<seed>` in the folder that ACPO_RUNS names."""
    iterations: int = Field(default=100, ge=1)
    """Rollout, reward, update and sync cycles."""
    seed: int = 0
    """Root of every random number in the run."""


class DataConfig(Section):
    """Prompts and real images."""

    prompts: str = "toy"
    """`toy` (captions of the closed world), `none` (unconditional), or a text, CSV or TSV file of prompts."""
    prompt_column: str = "prompt"
    """Column of a CSV or TSV file, case-insensitive."""
    path: Path | None = None
    """Real images: a folder (of images or parquet files), a parquet file, a zip archive or an image file. They train a
    base model or metric set to `train`, and feed the anchor's forward-noised batch and the data term."""
    image_column: str = "image"
    """Column of parquet files with the image: encoded bytes, or a struct with the fields `bytes` and `path`."""
    max_images: int | None = Field(default=None, ge=1)
    """Largest number of images used: the first rows of a parquet file, files spread evenly over a folder."""
    pairs: Path | None = None
    """Parquet file, or a folder of them, with preference pairs in Pick-a-Pic's columns; None pairs up the rollouts."""
    absolute_pairs: bool = False
    """Use only pairs whose winner never lost and never drew in the whole file (needs image_0_uid, image_1_uid)."""


class SamplerConfig(Section):
    """How rollouts walk from noise to image."""

    num_steps: int = Field(default=20, ge=2)
    """Denoise steps of a rollout."""
    spacing: Literal["trailing", "leading", "linspace", "karras", "scheduler"] = "trailing"
    """Timestep spacing, by diffusers' names; `scheduler` follows the model's own scheduler_config.json."""
    solver: Literal["ddim", "plms", "euler", "heun", "dpmpp_2m", "dpmpp_3m", "deis", "unipc", "ltsp", "stsp"] = "ddim"
    """Rule of a step, on any trajectory; `heun` asks twice per step, `ltsp` and `stsp` split guidance off."""
    trajectory: Path | None = None
    """File of a trajectory that replaces the spacing: what `acpo vrg optimize` wrote, or the published text format."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Noise of `ddim` steps: 0 deterministic, 1 as much as DDPM's posterior. Policy gradients need it above 0."""
    guidance_scale: float = Field(default=5.0, ge=0)
    """Classifier-free guidance; 1 or less runs the conditional branch alone."""
    t_max: float = Field(default=0.3, gt=0, le=1)
    """Largest training timestep as a share of the noise schedule: late steps only, so that composition stays."""
    late_per_sample: int = Field(default=4, ge=1)
    """States kept per sample among the steps at or below t_max, spread evenly."""

    def guidance_for(self, *, conditional: bool) -> float:
        """The scale that rollouts use: 1, the conditional branch alone, where there is nothing to guide."""
        return self.guidance_scale if conditional and self.guidance_scale > 1 else 1.0


class VrgConfig(Section):
    """Whether the trajectory is optimised on the measured prediction error (Variance-Reduction Guidance)."""

    enabled: bool = False
    """Measure, optimise and prove a trajectory before the first iteration, and again when the model has moved."""
    trust: float = Field(default=0.25, gt=0, lt=0.5)
    """Furthest a level may move, as a share of the gap to its neighbour in log sigma; the noisy end never moves."""
    nodes: int = Field(default=14, ge=8, le=64)
    """Noise levels at which the error is measured."""
    batch: int = Field(default=32, ge=2)
    """Samples measured at once."""
    images: int = Field(default=256, ge=8)
    """Most samples measured; fewer when every node's standard error is small enough."""
    standard_error: float = Field(default=0.05, gt=0)
    """Relative standard error per node at which measuring stops."""
    guidance: bool = False
    """Measure the null branch too, at twice the cost: diagnostics of guidance, not the trajectory, depend on it."""
    min_gain: float = Field(default=0.005, ge=0, lt=1)
    """Smallest promised gain in cumulative error that is worth a proof."""
    gate_samples: int = Field(default=32, ge=2)
    """Samples walked along old, new and reference trajectories, from the same noise."""
    reference_steps: int | None = Field(default=None, ge=2)
    """Steps of the reference; None takes 4 times the sampler's, at least 100."""
    halvings: int = Field(default=2, ge=0)
    """How often a refused candidate is tried again with half the trust region."""
    probe_every: int = Field(default=20, ge=1)
    """Iterations between looks at whether the error table has drifted."""
    probe_images: int = Field(default=64, ge=8)
    """Samples of such a look."""
    max_drift: float = Field(default=0.1, gt=0)
    """Change of log v at any node, beyond the common scale and its noise, that asks for a new measurement."""


class RolloutConfig(Section):
    """Who draws samples, and how many per iteration."""

    num_workers: int = Field(default=1, ge=1)
    """Rollout workers (Ray); one in process."""
    batch_size: int = Field(default=16, ge=1)
    """Samples drawn at once; chunks of this size do not depend on the number of workers, so neither do the images."""
    prompts_per_iteration: int = Field(default=32, ge=1)
    samples_per_prompt: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1.0, ge=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)


RewardPlugin = plugin("reward", REWARDS, MetricConfig)


class RewardsConfig(Section):
    """What is rewarded, who judges, and how the pool serves it."""

    train: tuple[RewardPlugin, ...] = Field(min_length=1)  # pyright: ignore[reportInvalidTypeForm]
    """Metrics that drive the update."""
    judges: tuple[RewardPlugin, ...] = ()  # pyright: ignore[reportInvalidTypeForm]
    """Held-out metrics: measured, never optimised."""
    combine: Literal["sum", "mean", "pessimistic"] = "sum"
    """Of the normalised rewards: weighted sum, weighted mean, or that mean less `spread_weight` times their spread."""
    spread_weight: float = Field(default=1.0, ge=0)
    """c of `pessimistic`: standard deviations (weighted, over the rewards) that disagreement costs."""
    cut: Literal["latent", "image"] = "latent"
    """Where the gradient crosses to the pool: x0-hat latents (the pool owns a VAE) or decoded images."""
    latent_crop: int | None = Field(default=None, ge=1)
    """Side, in elements of x0-hat, of a window that is decoded and scored for the gradient instead of the whole; drawn
    anew for every micro-batch. For rewards that average over patches; memory and time of the decoder shrink with it."""
    wire_dtype: Literal["float16", "float32"] = "float16"
    """Precision of tensors and gradients between learner and pool; gradients carry a per-image power-of-two scale."""
    replicas: int = Field(default=1, ge=1)
    """Replicas per metric."""
    cpus_per_replica: float = Field(default=1.0, ge=0)
    gpus_per_replica: float = Field(default=0.0, ge=0)
    deadline_s: float = Field(default=300.0, gt=0)
    """Longest time in which the pool answers nobody; while it answers others, one attempt may wait 4 times as long."""
    attempt_timeout_s: float = Field(default=60.0, gt=0)
    """A replica that computes longer than this on one batch hangs: it is replaced, its requests go elsewhere."""
    pool: dict[str, MetricPoolConfig] = Field(default={})
    """Replicas, batches, resources and environment by metric name, where they differ from the above."""
    http: HttpConfig = HttpConfig()
    calibration_samples: int = Field(default=256, ge=8)
    """Base-model samples on which every metric is normalised before training."""

    @property
    def spread(self) -> float:
        """c of the composition: 0 unless it is pessimistic."""
        return self.spread_weight if self.combine == "pessimistic" else 0.0

    def term_weights(self) -> dict[str, float]:
        """Weight of every reward in the composition: as configured in a sum, shares of 1 in a mean."""
        whole = 1.0 if self.combine == "sum" else sum(entry.weight for entry in self.train)
        return {entry.name: entry.weight / whole for entry in self.train}

    def pool_of(self, name: str) -> MetricPoolConfig:
        """How one metric is served, with nothing left open."""
        found = self.pool.get(name, MetricPoolConfig())
        fixed = self.replicas if found.replicas is None and found.min_replicas is None else found.replicas
        return found.model_copy(
            update={
                "replicas": fixed,
                "cpus": self.cpus_per_replica if found.cpus is None else found.cpus,
                "gpus": self.gpus_per_replica if found.gpus is None else found.gpus,
            }
        )


class LearnerConfig(Section):
    """Who updates the policy, and the optimiser."""

    num_ranks: int = Field(default=1, ge=1)
    """Learner ranks; more than one needs Ray."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO stage; None updates with plain torch in one rank."""
    micro_batch: int = Field(default=16, ge=1)
    """Samples per forward and backward on one rank."""
    global_batch: int = Field(default=32, ge=1)
    """Samples per optimiser step over all ranks; accumulation follows."""
    inner_epochs: int = Field(default=1, ge=1)
    """How often an iteration's samples are gone over, each time with other states and noise."""
    learning_rate: float = Field(default=3e-4, gt=0)
    lr_warmup: int = Field(default=0, ge=0)
    """Iterations over which the learning rate rises to its height."""
    lr_decay_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of `run.iterations`, at the end, over which it falls to 0; a run resumed to go on longer falls later."""
    lr_decay_type: Literal["linear", "cosine"] = "linear"
    """How it falls."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` holds the moments in 8 bits per element (bitsandbytes), a quarter; one process only."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu` keeps moments and float32 masters in the host's memory and steps there (DeepSpeed, ZeRO stage 1 or 2)."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network; formulas, losses and master weights stay float32."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Optimiser steps in a row that may be left out because a loss or gradient is not finite; one more ends the run."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the averaged weights per optimiser step; 0 switches averaging off."""
    cpus_per_rank: float = Field(default=1.0, ge=0)
    gpus_per_rank: float = Field(default=0.0, ge=0)
    timeout_s: float = Field(default=1800.0, gt=0)
    """Longest time that the driver waits for one learner call."""


class CheckpointConfig(Section):
    """When the run is saved and how much is kept."""

    every: int = Field(default=20, ge=1)
    """Iterations between checkpoints; the last iteration is always saved."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints that are kept."""


class TrackingConfig(Section):
    """Where figures and images go besides `metrics.jsonl`."""

    mlflow: bool = True
    """Record in MLflow too."""
    mlflow_uri: str | None = None
    """Tracking URI; None uses MLFLOW_TRACKING_URI, or else SQLite beside the run folder (`mlflow.db`)."""
    experiment: str = "acpo"
    images_every: int = Field(default=20, ge=1)
    """Iterations between sample grids."""
    num_images: int = Field(default=24, ge=1)
    """Images per grid, always from the same prompts and seeds."""


class ClusterConfig(Section):
    """Where the run lives."""

    backend: Literal["auto", "local", "ray"] = "auto"
    """`local`: one process; `ray`: actors; `auto`: Ray when an address is known or the run needs it, else local."""
    address: str | None = None
    """Ray address; `auto` joins this machine's cluster. None uses RAY_ADDRESS, or starts one for this run alone."""
    place_timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for resources before the run gives up with a list of what is missing."""
    worker_timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for one rollout or reward call."""
    max_restarts: int = Field(default=3, ge=0)
    """How often the run goes on from its newest checkpoint after losing a learner rank, its machine or all rollouts."""
    mixed_software: bool = False
    """Take workers whose machine has other code or other versions of libraries than the driver's."""
    roles: RolesConfig = RolesConfig()


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: plugin("model", MODELS, ModelConfig)  # pyright: ignore[reportInvalidTypeForm]
    data: DataConfig = DataConfig()
    sampler: SamplerConfig = SamplerConfig()
    vrg: VrgConfig = VrgConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig
    algorithm: plugin("algorithm", ALGORITHMS, AlgorithmConfig)  # pyright: ignore[reportInvalidTypeForm]
    guard: GuardConfig = GuardConfig()
    learner: LearnerConfig = LearnerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.run.dir or Path(os.environ.get("ACPO_RUNS", "runs")) / f"{self.run.name}-{self.run.seed}"

    def to_mapping(self) -> dict[str, Any]:
        """Plain nested data, as written to `resolved.yaml`."""
        return self.model_dump(mode="json")
