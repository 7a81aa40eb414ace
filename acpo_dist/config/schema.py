"""All keys of a run: type, default and meaning. Relations between keys are in `relations.py`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from acpo_dist.config.guard import GuardConfig
from acpo_dist.config.pipeline import PipelineConfig
from acpo_dist.config.plugins import AlgorithmConfig, MetricConfig, ModelConfig
from acpo_dist.config.pool import HttpConfig, MetricPoolConfig
from acpo_dist.config.roles import RolesConfig
from acpo_dist.config.section import Section, plugin
from acpo_dist.core.errors import hide_passwords
from acpo_dist.core.files import folder_name
from acpo_dist.core.registry import ALGORITHMS, MODELS, REWARDS

Decay = Annotated[float, Field(ge=0, lt=1, strict=True)]


LATE_RATIO = 0.8328
"""s / a of SDXL's schedule at timestep 300."""


class RunConfig(Section):
    """Name, length and folder of the run."""

    name: str = "run"
    """Name in tracking and of the default folder, where `/`, `:` and the like become `_`."""
    dir: Path | None = None
    """Folder of the run; None uses `runs/<name>-<seed>`, or `<name>-<seed>` in the folder that ACPO_RUNS names."""
    iterations: int = Field(default=100, ge=1)
    """Number of rollout, reward, update and publish cycles."""
    seed: int = 0
    """Root seed of all random numbers of the run."""


class DataConfig(Section):
    """Prompts and real images."""

    prompts: str = "toy"
    """`toy` (captions of the toy world), `none` (unconditional), a .txt, .csv, .tsv, .jsonl or .parquet file of
    prompts, or a folder or zip archive of captioned images."""
    prompt_column: str = "prompt"
    """Column of a table of prompts, case-insensitive."""
    prompt_weights: Literal["refuse", "literal"] = "refuse"
    """Prompts with weights such as `(a red car:1.2)`: `refuse` them, or encode them as plain text (`literal`)."""
    path: Path | None = None
    """Real images: a folder (of images or parquet files), a parquet file, a zip archive or an image file. Used by base
    models and metrics set to `train`, by the anchor's forward-noised batch and by the data term."""
    image_column: str = "image"
    """Column of parquet files with the image: encoded bytes, or a struct with the fields `bytes` and `path`."""
    caption_column: str | None = None
    """Column of parquet files and `metadata.jsonl` with the caption of an image; None takes `caption`, `text` or
    `prompt`. Images in folders and zip archives take it from a .txt file of the same name too."""
    flip: bool = False
    """Mirror half of the captioned images, which doubles the cache of latents."""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of the captioned images that does not train and on which `acpo eval` measures the denoising error."""
    latent_cache: Path | None = None
    """Folder of the latents of captioned images, which several runs may share; None is `latents` in the run folder."""
    max_images: int | None = Field(default=None, ge=1)
    """Largest number of images used: the first rows of a parquet file, files spread evenly over a folder."""
    pairs: Path | None = None
    """Parquet file, or a folder of them, with preference pairs in Pick-a-Pic's columns; None pairs the rollouts."""
    absolute_pairs: bool = False
    """Use only pairs whose winner never lost and never drew in the whole file (needs image_0_uid, image_1_uid)."""


class SamplerConfig(Section):
    """Sampling of rollouts."""

    num_steps: int = Field(default=20, ge=2)
    """Denoising steps of a rollout."""
    spacing: Literal["trailing", "leading", "linspace", "karras", "scheduler"] = "trailing"
    """Timestep spacing, by diffusers' names; `scheduler` follows the model's own scheduler_config.json."""
    solver: Literal["ddim", "plms", "euler", "heun", "dpmpp_2m", "dpmpp_3m", "deis", "unipc", "ltsp", "stsp"] = "ddim"
    """Solver of a step, on any trajectory; `heun` calls the network twice per step, `ltsp` and `stsp` split guidance
    off."""
    shift: float | None = Field(default=None, gt=0)
    """Shift of a flow model's sigmas, s sigma / (1 + (s - 1) sigma); None is its scheduler's, 1 is even spacing."""
    trajectory: Path | None = None
    """File of a trajectory that replaces the spacing: written by `acpo vrg optimize`, or the published text format."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Noise of `ddim` steps: 0 is deterministic, 1 equals DDPM's posterior. Policy gradients need a value above 0."""
    stochastic_step: Literal["ddim", "flow_grpo"] = "ddim"
    """Steps with `eta` above 0: `ddim`, or `flow_grpo`, the step of Flow-GRPO for flow models, whose noise level is
    `eta` (0.7 as published)."""
    guidance_scale: float = Field(default=5.0, ge=0)
    """Classifier-free guidance; 1 or less runs only the conditional branch."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """Share of the guided prediction whose standard deviation is reset to the conditional one's; 0.7 is published for
    models with zero terminal SNR, which guidance otherwise over-exposes."""
    t_max: float | None = Field(default=None, gt=0, le=1)
    """Largest training timestep as a share of the noise schedule. None is 0.3, so that only late steps train and
    composition stays; with `eta` above 0 it is 1, since a policy gradient sums over all transitions."""
    k_max: float | None = Field(default=None, gt=0)
    """Largest noise-to-signal ratio s / a of late steps, instead of `t_max`; it means the same for every model. None is
    `t_max`; for flow models without `t_max` it is 0.83, SDXL's at `t_max` 0.3."""
    late_per_sample: int = Field(default=4, ge=1)
    """States kept per sample among the steps at or below t_max, evenly distributed."""
    merge_adapters: bool = False
    """Add LoRA adapters to the rollout workers' weights once per version, instead of running them beside the weights in
    every step. Faster, at the memory of the adapted weights; requires float32 weights, which lose nothing to
    rounding."""

    def latest_share(self, alpha_bars: Sequence[float]) -> float:
        """Largest late timestep as a share of the noise schedule: `t_max`, `k_max`, or their defaults.

        Args:
            alpha_bars: the model's alpha_bar by timestep, shape (T,); the last one is 0 for a flow model.
        """
        if self.t_max is not None:
            return self.t_max
        k_max = self.k_max
        if k_max is None:
            if self.eta > 0:
                return 1.0
            if alpha_bars[-1] > 0:
                return 0.3
            k_max = LATE_RATIO
        within = sum(1 - float(level) <= k_max**2 * float(level) for level in alpha_bars)
        return max(within - 1, 1) / len(alpha_bars)

    def guidance_for(self, *, conditional: bool) -> float:
        """Guidance scale of the rollouts; 1, the conditional branch alone, if guidance does not apply."""
        return self.guidance_scale if conditional and self.guidance_scale > 1 else 1.0


class VrgConfig(Section):
    """Trajectory optimisation on the measured prediction error (Variance-Reduction Guidance)."""

    enabled: bool = False
    """Measure, optimise and validate a trajectory before the first iteration, and again after the model has drifted."""
    search: Literal["best", "vrg", "hso_grid"] = "best"
    """Search of the candidate: `vrg` minimises the measured error near the initial trajectory; `hso_grid` uses the
    noise schedule alone (not for flow models); `best` validates both and adopts the better one."""
    trust: float = Field(default=0.25, gt=0, lt=0.5)
    """`vrg`: largest shift of a level, as a share of the gap to its neighbour in log sigma; the noisy end is fixed."""
    nodes: int = Field(default=14, ge=8, le=64)
    """Noise levels at which the error is measured."""
    batch: int = Field(default=32, ge=2)
    """Samples measured at once."""
    images: int = Field(default=256, ge=8)
    """Largest number of measured samples; fewer if every node's standard error is small enough."""
    standard_error: float = Field(default=0.05, gt=0)
    """Relative standard error per node at which the measurement ends."""
    min_gain: float = Field(default=0.005, ge=0, lt=1)
    """Smallest predicted relative gain in cumulative error for which a trajectory is validated."""
    gate_samples: int = Field(default=32, ge=2)
    """Samples drawn along the old, new and reference trajectories from the same noise, for the validation."""
    reference_steps: int | None = Field(default=None, ge=2)
    """Steps of the reference; None uses 4 times the sampler's, at least 100."""
    halvings: int = Field(default=2, ge=0)
    """Retries of a rejected candidate, each with half the trust region."""
    probe_every: int = Field(default=20, ge=1)
    """Iterations between checks of the error table."""
    probe_images: int = Field(default=64, ge=8)
    """Samples of such a check."""
    max_drift: float = Field(default=0.1, gt=0)
    """Change of log v at any node, beyond the common scale and its noise, after which it is measured again."""


class RolloutConfig(Section):
    """Rollout workers, and samples per iteration."""

    num_workers: int = Field(default=1, ge=1)
    """Number of rollout workers on Ray; in process there is one."""
    batch_size: int = Field(default=16, ge=1)
    """Samples drawn at once. Chunks do not depend on the number of workers, so neither do the images."""
    prompts_per_iteration: int = Field(default=32, ge=1)
    """Prompts per iteration."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Samples per prompt; algorithms that compare samples of one prompt need 2 or more."""
    every: int = Field(default=1, ge=1)
    """With `data.pairs`: iterations between two sets of rollouts, which then serve only judges and guard."""
    cpus_per_worker: float = Field(default=1.0, ge=0)
    """CPUs that Ray reserves per rollout worker."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves per rollout worker; with a fraction, workers share a GPU."""


RewardPlugin = plugin("reward", REWARDS, MetricConfig)


class RewardsConfig(Section):
    """Rewards, judges, and how the pool serves them."""

    train: tuple[RewardPlugin, ...] = ()  # pyright: ignore[reportInvalidTypeForm]
    """Metrics that drive the update; may be empty with `data.pairs`."""
    judges: tuple[RewardPlugin, ...] = ()  # pyright: ignore[reportInvalidTypeForm]
    """Held-out metrics: measured, never optimised."""
    combine: Literal["sum", "mean", "pessimistic"] = "sum"
    """Combination of the normalised rewards: weighted sum, weighted mean, or mean minus `spread_weight` times their
    spread."""
    spread_weight: float = Field(default=1.0, ge=0)
    """c of `pessimistic`: penalty per (weighted) standard deviation over the rewards."""
    cut: Literal["latent", "image"] = "latent"
    """Tensor sent to the pool for gradients: x0-hat latents (the pool holds a VAE) or decoded images."""
    latent_crop: int | None = Field(default=None, ge=1)
    """Side, in elements of x0-hat, of a window that is decoded and scored for the gradient instead of the whole image;
    drawn for every micro-batch. For rewards that average over patches; reduces the decoder's memory and time."""
    wire_dtype: Literal["float16", "float32"] = "float16"
    """Precision of tensors and gradients between learner and pool; gradients carry a per-image power-of-two scale."""
    replicas: int = Field(default=1, ge=1)
    """Replicas per metric."""
    cpus_per_replica: float = Field(default=1.0, ge=0)
    """CPUs that Ray reserves per replica."""
    gpus_per_replica: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves per replica, may be fractional."""
    deadline_s: float = Field(default=300.0, gt=0)
    """Seconds without any response from the pool before a request fails; 4 times as long while others succeed."""
    attempt_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds on one batch after which a replica counts as hung: it is replaced, and its requests are sent again."""
    pool: dict[str, MetricPoolConfig] = Field(default={})
    """Replicas, batches, resources and environment by metric name, if they differ from the above."""
    http: HttpConfig = HttpConfig()
    calibration_samples: int = Field(default=256, ge=8)
    """Base-model samples on which every metric is normalised before training."""

    @property
    def spread(self) -> float:
        """c of the composition: 0 unless `combine` is `pessimistic`."""
        return self.spread_weight if self.combine == "pessimistic" else 0.0

    @property
    def image_metrics(self) -> tuple[MetricConfig, ...]:
        """Rewards, then judges, that score images; rewards on latents score the samples of a run only."""
        return tuple(entry for entry in (*self.train, *self.judges) if entry.space == "image")

    def term_weights(self) -> dict[str, float]:
        """Weight of every reward in the composition: as configured in a sum, normalised to a sum of 1 in a mean."""
        whole = 1.0 if self.combine == "sum" else sum(entry.weight for entry in self.train)
        return {entry.name: entry.weight / whole for entry in self.train}

    def pool_of(self, name: str) -> MetricPoolConfig:
        """Return the serving options of a metric with all defaults filled in."""
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
    """Learner ranks and the optimiser."""

    num_ranks: int = Field(default=1, ge=1)
    """Learner ranks; more than one needs Ray."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO stage; None uses plain torch in one rank."""
    micro_batch: int = Field(default=16, ge=1)
    """Samples per forward and backward pass on one rank."""
    global_batch: int = Field(default=32, ge=1)
    """Samples per optimiser step over all ranks; determines the accumulation."""
    inner_epochs: int = Field(default=1, ge=1)
    """Passes over an iteration's samples, each with other states and noise."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    lr_warmup: int = Field(default=0, ge=0)
    """Iterations over which the learning rate rises linearly from 0."""
    lr_decay_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of `run.iterations`, at the end, over which the rate falls to 0; later if resumed with more iterations."""
    lr_decay_type: Literal["linear", "cosine"] = "linear"
    """Shape of that decay."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` stores the moments in 8 bits per element (bitsandbytes), a quarter of the memory; single process."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu` keeps moments and float32 masters in host memory and updates them there (DeepSpeed, ZeRO stage 1 or 2)."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Maximum norm of the gradient of an optimiser step; larger ones are scaled down."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network; formulas, losses and master weights stay float32."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Consecutive optimiser steps that may be skipped for a non-finite loss or gradient; one more ends the run."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the averaged weights per optimiser step; 0 switches averaging off."""
    cpus_per_rank: float = Field(default=1.0, ge=0)
    """CPUs that Ray reserves per learner rank."""
    gpus_per_rank: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves per learner rank."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait in seconds for one learner call."""


class CheckpointConfig(Section):
    """Frequency and number of checkpoints."""

    every: int = Field(default=20, ge=1)
    """Iterations between checkpoints; the last iteration is always saved."""
    keep: int = Field(default=3, ge=1)
    """Number of newest checkpoints that are kept."""
    in_memory_gib: float = Field(default=4.0, ge=0)
    """Largest training state in GiB that a run on Ray copies to the driver's object store after every iteration: a lost
    learner rank costs the iteration under way. A larger one costs the work since the checkpoint; 0 copies none."""


class TrackingConfig(Section):
    """Tracking of metrics and images, in addition to `metrics.jsonl`."""

    mlflow: bool = True
    """Also record the run in MLflow."""
    mlflow_uri: str | None = None
    """Tracking URI without a password; None uses MLFLOW_TRACKING_URI, or else SQLite beside the run folder
    (`mlflow.db`)."""
    experiment: str = "acpo"
    """MLflow experiment."""
    tensorboard: bool = False
    """Record in TensorBoard too: event files in `tensorboard` of the run folder."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Record in Weights & Biases too; `offline` writes files in the run folder for `wandb sync`."""
    wandb_project: str = "acpo"
    """Project of Weights & Biases."""
    images_every: int = Field(default=20, ge=1)
    """Iterations between sample grids."""
    num_images: int = Field(default=24, ge=1)
    """Images per grid, always of the same prompts and seeds."""

    @field_validator("mlflow_uri")
    @classmethod
    def _refuse_password(cls, uri: str | None) -> str | None:
        # The configuration is written to the run folder and to MLflow.
        if uri is not None and hide_passwords(uri) != uri:
            raise ValueError(
                "the address holds an account, and configurations are recorded. Set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or put the whole address into MLFLOW_TRACKING_URI."
            )
        return uri


class ClusterConfig(Section):
    """Backend and cluster of the run."""

    backend: Literal["auto", "local", "ray"] = "auto"
    """`local`: one process; `ray`: actors; `auto`: Ray when an address is known or the run needs it, else local."""
    address: str | None = None
    """Ray address; `auto` joins this machine's cluster. None uses RAY_ADDRESS, or starts a cluster for this run."""
    place_timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait in seconds for resources; then the run ends with a list of missing resources."""
    worker_timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait in seconds for one rollout or reward call."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts within a command after the loss of a learner rank, its node or all rollout workers."""
    mixed_software: bool = False
    """Accept workers on nodes with other code or library versions than the driver."""
    roles: RolesConfig = RolesConfig()


class Config(Section):
    """Configuration of a run."""

    run: RunConfig = RunConfig()
    model: plugin("model", MODELS, ModelConfig)  # pyright: ignore[reportInvalidTypeForm]
    data: DataConfig = DataConfig()
    sampler: SamplerConfig = SamplerConfig()
    vrg: VrgConfig = VrgConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig
    algorithm: plugin("algorithm", ALGORITHMS, AlgorithmConfig)  # pyright: ignore[reportInvalidTypeForm]
    guard: GuardConfig = GuardConfig()
    pipeline: PipelineConfig = PipelineConfig()
    learner: LearnerConfig = LearnerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.run.dir or Path(os.environ.get("ACPO_RUNS", "runs")) / folder_name(self.run.name, self.run.seed)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain nested data, as written to `resolved.yaml`."""
        return self.model_dump(mode="json")
