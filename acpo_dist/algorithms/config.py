"""Configuration sections of the algorithms. This module does not import torch, so that validation is fast."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from acpo_dist.config.plugins import AlgorithmConfig, AnchorConfig, EncoderConfig, OptionalAnchorConfig
from acpo_dist.config.section import Section


class AdvantageConfig(Section):
    """How the score of a sample is compared with the other samples of its prompt."""

    limit: float = Field(default=5.0, gt=0)
    """Advantages are clipped to this many standard deviations of the group."""
    min_std: float = Field(default=1e-3, ge=0)
    """Groups whose reward has a smaller standard deviation are dropped; in standard deviations of base samples."""
    std: Literal["group", "global"] = "group"
    """Divide by the standard deviation of the sample's own group, or of all samples of the iteration."""
    veto: bool = False
    """Drop samples that one reward puts above their group's mean and another below it: half of all samples under two
    independent rewards."""
    min_vote: float = Field(default=0.0, ge=0)
    """Smallest distance from the group's mean, in the reward's own group standard deviations, for a reward to vote."""
    drop_constant: bool = True
    """Drop images of one flat colour."""


class WideAnchorConfig(AnchorConfig):
    """The anchor on the reward's own states and on a second batch."""

    uniform: bool = True
    """Also anchor a second batch at uniform timesteps, so that drift at early steps is limited too."""
    source: Literal["rollout", "data"] = "rollout"
    """Source of x_0 for that batch: the rollouts, or real images (`data.path`), which need captions for a model
    with prompts."""


class OptionalWideAnchorConfig(WideAnchorConfig, OptionalAnchorConfig):
    """As `WideAnchorConfig`, but off unless a budget or a weight is set."""

    budget: float | None = Field(default=None, gt=0)
    """Target rms drift, in the units of `space`; None without a weight leaves the anchor off."""


class AcpoConfig(AlgorithmConfig):
    """Shape of the reward, and the anchor."""

    type: Literal["acpo"] = "acpo"
    reward_weight: float = Field(default=1.0, ge=0)
    """Weight of the reward per standard deviation of base samples; 0 trains with the anchor only."""
    shape: Literal["identity", "hinge", "softplus"] = "identity"
    """Minimise -q, max(m - q, 0) or softplus(m - q) of the normalised quality q."""
    target_quantile: float = Field(default=0.9, gt=0, lt=1)
    """m as a quantile of base-model samples, for `hinge` and `softplus`."""
    anchor: WideAnchorConfig = WideAnchorConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    gradient_steps: Annotated[int, Field(ge=1)] | Literal["estimate", "random"] = "estimate"
    """What the reward scores. `estimate`: the x0-hat of one late rollout state; a number K: the final image, with the
    gradient through the last K sampler steps; `random`: as K, which is drawn for every optimiser step."""
    max_gradient_steps: Annotated[int, Field(ge=1)] | None = None
    """Largest K that `random` draws; None allows all steps whose states the rollouts keep."""
    guidance: Literal["conditional", "full"] = "conditional"
    """Branches of an `estimate`: only the conditional one, or both with the rollouts' guidance, each anchored
    separately, for one more forward and backward pass. Sampler steps always use the rollouts' guidance."""
    data_weight: float = Field(default=0.0, ge=0)
    """Weight of the ordinary denoising loss on real images (`data.path`), on the anchor's uniform batch."""
    data_reward_weight: float = Field(default=0.0, ge=0)
    """Weight of the reward on x0-hat of real images noised to late timesteps (up to `sampler.t_max`), beside the reward
    on rollouts."""
    pathwise: ClassVar[bool] = True


class DraftConfig(AcpoConfig):
    """As `acpo`, with the gradient through sampler steps; a budget or a weight switches the anchor on."""

    type: Literal["draft"] = "draft"  # pyright: ignore[reportIncompatibleVariableOverride]
    gradient_steps: Annotated[int, Field(ge=1)] | Literal["estimate", "random"] = 1
    """K of DRaFT-K: gradient through the last K sampler steps; `random` is AlignProp's randomised truncation."""
    low_variance_samples: int = Field(default=1, ge=1)
    """n of DRaFT-LV: if above 1, the last step uses n fresh noisings of the rollout's x_0, not from its state."""
    anchor: OptionalWideAnchorConfig = OptionalWideAnchorConfig()


class ReflConfig(AcpoConfig):
    """As `acpo` with a hinge; a budget or a weight switches the anchor on."""

    type: Literal["refl"] = "refl"  # pyright: ignore[reportIncompatibleVariableOverride]
    shape: Literal["identity", "hinge", "softplus"] = "hinge"
    """Minimise -q, max(m - q, 0) or softplus(m - q) of the normalised quality q."""
    anchor: OptionalWideAnchorConfig = OptionalWideAnchorConfig()


class DdpoConfig(AlgorithmConfig):
    """Advantages and the trust region."""

    type: Literal["ddpo"] = "ddpo"
    clip_range: float = Field(default=1e-4, gt=0)
    """Largest deviation of the per-element probability ratio from 1; beyond it a sample passes no gradient."""
    advantage: AdvantageConfig = AdvantageConfig()
    anchor: OptionalAnchorConfig = OptionalAnchorConfig()
    needs_groups: ClassVar[bool] = True
    needs_noise: ClassVar[bool] = True


class TimestepsConfig(Section):
    """Distribution of the timesteps of a loss, over shares of the noise schedule in [0, `t_max`]."""

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """`logit_normal` prefers the middle of the schedule, as flow models are trained (Stable Diffusion 3)."""
    shift: float = Field(default=1.0, gt=0)
    """Shift of the shares, s t / (1 + (s - 1) t); above 1 prefers noisy timesteps, as `sampler.shift` does."""


class NoiseSpaceConfig(AlgorithmConfig):
    """Timesteps of the loss, and the anchor."""

    timesteps: TimestepsConfig = TimestepsConfig()

    t_max: float = Field(default=1.0, gt=0, le=1)
    """Largest timestep for forward noising, as a share of the noise schedule."""
    prompt_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the samples that are trained without their prompt, in place of `anchor.null_share`; 0.2 in the published
    code of Diffusion-DPO."""
    offset_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of an offset per sample and channel that is added to the noise; 0 adds none."""
    anchor: OptionalAnchorConfig = OptionalAnchorConfig()


class NftConfig(NoiseSpaceConfig):
    """Loss, advantages, and the old policy."""

    type: Literal["nft"] = "nft"
    beta: float = Field(default=0.1, gt=0)
    """Distance of the two branches from the old policy: an advantage A moves the prediction by -(A / beta) of its
    error."""
    weighting: Literal["x0", "noise"] = "x0"
    """Branch errors in x0 units, each divided by its own mean absolute value (published), or plain in noise units."""
    old_decay_rate: float = Field(default=0.001, ge=0)
    """Growth per iteration of the old policy's decay; 0 draws with the policy itself."""
    old_decay_max: float = Field(default=0.5, ge=0, lt=1)
    """Largest decay of the old policy."""
    old_decay_start: int = Field(default=0, ge=0)
    """Iterations before the decay grows."""
    advantage: AdvantageConfig = AdvantageConfig(std="global")
    needs_groups: ClassVar[bool] = True

    @property
    @override
    def anchor_unit(self) -> float:
        return self.beta

    @override
    def old_decay(self, iteration: int) -> float | None:
        return min(self.old_decay_max, self.old_decay_rate * max(0, iteration - self.old_decay_start))


class CrdConfig(NoiseSpaceConfig):
    """Loss, advantages, the old policy, and the KL term."""

    type: Literal["crd"] = "crd"
    beta: float = Field(default=1.0, gt=0)
    """Scale of the implicit reward: the loss is smallest where beta times it equals the advantage in [0, 1]."""
    old_decay_first: float = Field(default=0.25, ge=0, lt=1)
    """Decay of the old policy after the first iteration."""
    old_decay_rate: float = Field(default=0.005, ge=0)
    """Growth of the decay per iteration."""
    old_decay_max: float = Field(default=0.999, ge=0, lt=1)
    """Largest decay of the old policy."""
    kl_weight: float = Field(default=0.1, ge=0)
    """Weight of the squared distance from the guided base model for the best advantage; 0 leaves it out."""
    kl_guidance: float = Field(default=4.5, ge=1)
    """Guidance scale of the base model in the KL term; the policy learns to draw without guidance."""
    kl_adaptive: bool = True
    """Let the KL weight grow with the advantage, from 1e-4 for the worst to `kl_weight` for the best."""
    advantage: AdvantageConfig = AdvantageConfig(std="global")
    needs_groups: ClassVar[bool] = True
    whole_groups: ClassVar[bool] = True
    draws_with_old: ClassVar[bool] = False

    @override
    def old_decay(self, iteration: int) -> float | None:
        return min(self.old_decay_max, self.old_decay_first + self.old_decay_rate * iteration)


class RwrConfig(NoiseSpaceConfig):
    """Advantages, and the temperature of their weights."""

    type: Literal["rwr"] = "rwr"
    temperature: float = Field(default=0.5, gt=0)
    """Temperature of the softmax over a group's advantages: small values select the best sample, large values weight
    all samples equally."""
    advantage: AdvantageConfig = AdvantageConfig()
    needs_groups: ClassVar[bool] = True


class PairingConfig(Section):
    """Which pairs of a prompt's samples are trained on."""

    margin: float = Field(default=0.1, ge=0)
    """Smallest difference of rewards, in standard deviations of base samples."""
    absolute: bool = True
    """Leave out pairs whose loser some reward prefers."""
    duplicates: float = Field(default=0.02, ge=0)
    """Leave out pairs whose images differ by less than this (rms on an 8 x 8 grid, full range 1); 0 keeps them."""
    drop_constant: bool = True
    """Leave out pairs with an image of one flat colour."""


class PreferenceConfig(NoiseSpaceConfig):
    """Error space, preference strength and pairs."""

    space: Literal["eps", "ncp"] = "eps"
    """Errors of the predicted noise, or distances between features of the frozen base U-Net (NCP)."""
    beta: float = Field(default=5000.0, gt=0)
    """Strength of the preference in noise units, with Diffusion-DPO's factor 1/2. For `ncp` it is calibrated on base
    samples to the same scale of logits."""
    ncp: EncoderConfig = EncoderConfig()
    pairs: PairingConfig = PairingConfig()
    paired: ClassVar[bool] = True
    needs_groups: ClassVar[bool] = True

    @property
    @override
    def encoder(self) -> EncoderConfig | None:
        return self.ncp if self.space == "ncp" else None


class DpoConfig(PreferenceConfig):
    """The loss on the logit."""

    type: Literal["dpo"] = "dpo"
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """-log sigmoid, squared distance to 1/2 (IPO), or hinge at 1 (SLiC)."""

    @property
    def anchor_unit(self) -> float:
        """Slope of the loss at the base model, in the unit of the anchor."""
        return self.beta / 4


class CpoConfig(PreferenceConfig):
    """Weight of the winner's term."""

    type: Literal["cpo"] = "cpo"
    sft_weight: float = Field(default=1.0, ge=0)
    """Weight of the winner's own error, in units of beta / 4; at 0 the loss can fall solely by worsening losers."""

    @property
    def anchor_unit(self) -> float:
        """Slope of the loss at the base model, in the unit of the anchor."""
        return self.beta / 4


class SftConfig(PreferenceConfig):
    """Weight of the timesteps."""

    type: Literal["sft"] = "sft"
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """gamma of min-SNR weighting, 5 in the paper; None weights all timesteps equally. For `space: eps`."""
