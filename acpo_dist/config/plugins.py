"""Base sections of the three plug-in kinds: facts of a plug-in that are read without importing its implementation.

A plug-in's own section subclasses one of these. Facts (class variables, or properties if they depend on a key) belong
to the section, so that a configuration is validated without importing the implementation.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from acpo_dist.config.section import Section
from acpo_dist.core.sizes import Size


class MetricConfig(Section):
    """Keys and facts of every reward and judge."""

    type: str
    """Registered name of the metric, or `module:Class` of your own."""
    name: str = ""
    """Name in tracking and of the deployment; empty takes the type."""
    weight: float = Field(default=1.0, gt=0)
    """Weight among the rewards of a run; scores are normalised first, so 1 has the same meaning for every metric."""
    hinge: float | Path | None = None
    """Ceiling beyond which there is no reward and no gradient: a normalised score, or real images (file, folder or
    parquet file with the column `data.image_column`) whose mean score is measured once before training. For
    `rewards.train` only."""

    needs_prompts: ClassVar[bool] = False
    """Whether it compares an image with its prompt."""
    needs_download: ClassVar[bool] = False
    """Whether weights are downloaded on first use, unless a local file or folder is configured."""
    differentiable: ClassVar[bool] = True
    """Whether the score has a usable gradient with respect to the image."""
    gradient_step: ClassVar[float | None] = None
    """Largest measured signed gradient step, in 1/255, that improved nine of ten real images; None if not measured."""
    space: ClassVar[Literal["image", "latent"]] = "image"
    """What it scores: images, or x_0 of a latent model (`latent`), which only a run of that model has. A metric on
    latents drives an update and cannot judge finished images."""
    direction: ClassVar[int] = 1
    """+1 if a higher raw score is better, -1 if a lower one is."""
    score_range: ClassVar[str] = "?"
    """Lowest and highest raw score; `~` means about."""
    minimum_size: ClassVar[int] = 1
    """Smallest height and width of an image, in pixels."""
    licence: ClassVar[str] = "not stated"
    """Licences of code and weights."""
    lightweight: ClassVar[bool] = False
    """Whether its weights are negligible beside a diffusion model (under a million parameters)."""
    note: ClassVar[str] = ""
    """Description for `acpo rewards list`, one line."""

    def model_post_init(self, context: Any, /) -> None:
        """Fill in the name."""
        if not self.name:
            # The section is frozen for users; this is part of its construction.
            object.__setattr__(self, "name", self.default_name())

    def default_name(self) -> str:
        """Default name."""
        return self.type

    def unusable(self) -> str | None:
        """Reason why the metric cannot be built on this machine, or None. Cheap: imports no heavy library."""
        return None

    def unfit(self, model: "ModelConfig", judges: Sequence["MetricConfig"]) -> str | None:
        """Reason why the metric cannot drive the update of this model beside these judges, or None."""
        return None


class ModelConfig(Section):
    """Keys and facts of every model family."""

    type: str
    """Registered name of the family, or `module:Class` of your own."""

    conditional: ClassVar[bool] = True
    """Whether the model takes prompts."""
    pixel_space: ClassVar[bool] = False
    """Whether x_0 is the image itself, so that real images can be noised without an encoder."""
    flow: ClassVar[bool] = False
    """Whether every model of this type is a flow model, whose first level is pure noise."""

    @property
    def sizes(self) -> tuple[tuple[Size, float], ...]:
        """Configured image sizes (width, height) with their shares; empty for the model's own size."""
        return ()


class AnchorConfig(Section):
    """The anchor: how strongly the policy is held to the base model."""

    weight: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Anchor weight; `auto` starts from the budget (and the measured reward gradient, where there is one); 0 is off."""
    budget: float | None = Field(default=0.15, gt=0)
    """Target rms drift, in the units of `space`; None keeps the weight fixed."""
    start: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Factor of the calibrated `auto` weight with which the run starts. That weight is an upper estimate, since the
    network cannot realise every drift; a short run that starts lower spends fewer iterations on lowering it. `auto` is
    1, and 0.02 where the reward's gradient passes through sampler steps (`algorithm.gradient_steps`): the calibration
    measures the gradient of one state, which is too high a start for the gradient of several."""
    rate: float = Field(default=0.15, ge=0)
    """Rate of the drift controller; 0 keeps the weight fixed."""
    headroom: float = Field(default=0.8, gt=0, le=1)
    """Share of the budget that the controller targets; drift is noisy, so small batches need a larger margin."""
    null_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the forward-noised batch that is anchored without its prompt: guidance uses that branch."""
    space: Literal["auto", "eps", "v", "x0"] = "auto"
    """Units of the anchor. `auto` is `v` for v-prediction and `eps` otherwise; `eps` vanishes at zero terminal SNR and
    is rejected there."""


class OptionalAnchorConfig(AnchorConfig):
    """The anchor of an algorithm that has none by default; a budget or a weight switches it on."""

    weight: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Anchor weight; `auto` is 0 without a budget; with one it starts at the scale of the objective."""
    budget: float | None = Field(default=None, gt=0)
    """Target rms drift, in the units of `space`; None without a weight leaves the anchor off."""


class EncoderConfig(Section):
    """Features of the frozen base U-Net in which NCP measures errors."""

    stride: int = Field(default=1, ge=1)
    """Timesteps of the reverse step: 1 is the published method; 20 makes the step ten times as large."""
    output: Literal["down", "middle", "stages"] = "down"
    """Features after the down blocks, after the middle block, or of every stage."""
    deterministic: bool = False
    """Use a DDIM step instead of the posterior with shared noise."""
    checkpointing: bool = False
    """Recompute the encoder in the backward pass: less memory, one more encoder forward."""


class AlgorithmConfig(Section):
    """Keys and facts of every algorithm."""

    type: str
    """Registered name of the algorithm, or `module:Class` of your own."""
    reward_weight: float = Field(default=1.0, ge=0)
    """Weight of the objective relative to the anchor."""
    anchor: OptionalAnchorConfig = OptionalAnchorConfig()
    """The anchor."""

    pathwise: ClassVar[bool] = False
    """Whether it needs the gradient of the reward; otherwise scores are sufficient, and rewards may be black boxes."""
    paired: ClassVar[bool] = False
    """Whether its micro-batches consist of pairs, the winner next to its loser."""
    needs_groups: ClassVar[bool] = False
    """Whether it compares samples of the same prompt, and so needs several per prompt."""
    whole_groups: ClassVar[bool] = False
    """Whether each micro-batch must hold all samples of its prompts."""
    needs_noise: ClassVar[bool] = False
    """Whether rollouts must step stochastically (`sampler.eta` above 0)."""

    draws_with_old: ClassVar[bool] = True
    """Whether the old policy, if the algorithm has one, also draws the rollouts."""

    def old_decay(self, iteration: int) -> float | None:
        """Decay of the old policy, an average of the policy's weights, after an iteration.

        Args:
            iteration: the one just trained, from 0.

        Returns:
            Share of the previous average that stays; 0 is the policy itself. None for algorithms without an old
            policy.
        """
        return None

    @property
    def compares_policies(self) -> bool:
        """Whether the loss compares the policy with the weights that drew the samples."""
        return self.needs_noise or (self.draws_with_old and self.old_decay(0) is not None)

    @property
    def encoder(self) -> EncoderConfig | None:
        """Frozen encoder whose features the algorithm needs, or None."""
        return None

    @property
    def anchor_unit(self) -> float:
        """Initial value of an `auto` anchor weight if no reward gradient is available."""
        return 1.0
