"""DDPO: policy gradient on the rollouts' stochastic steps with PPO's clipped surrogate; needs scores only."""

import torch
from torch import Tensor

from acpo_dist.algorithms.base import (
    BaseAlgorithm,
    Loss,
    MicroBatch,
    Network,
    RewardGradient,
)
from acpo_dist.algorithms.branches import both_branches
from acpo_dist.algorithms.config import DdpoConfig
from acpo_dist.algorithms.grouping import advantages_of, grouped_selection
from acpo_dist.core.types import ScoredGroups, Selection
from acpo_dist.diffusion.sampling import guide
from acpo_dist.objective.anchor import anchor_error, output_drift
from acpo_dist.objective.policy_gradient import Transition, clipped_surrogate, transition


class Ddpo(BaseAlgorithm):
    """DDPO with one random transition per sample and optimiser step; `learner.inner_epochs` sets the passes.

    Log-probabilities are means over the elements of a latent, in nats (see `objective.policy_gradient`).
    """

    Config = DdpoConfig

    def __init__(self, config: DdpoConfig) -> None:
        """Store the configuration."""
        self.config = config

    def select(self, scored: ScoredGroups) -> Selection:
        """Select all samples with their advantages, in standard deviations, as weights."""
        advantages = advantages_of(scored, self.config.advantage)
        return grouped_selection(scored, advantages.values, advantages.counts)

    def prepare(self, batch: MicroBatch, network: Network) -> Tensor | None:
        """Return the log-probability (B,) of the transitions under the weights that drew them, nats per element.

        It is computed here and not in the rollout, because other batch shapes and lower precision change it by more
        than the clip range.
        """
        with network.old():
            conditional, unconditional = branches(batch, network)
        _, step = taken(batch, network, conditional, unconditional)
        return step

    def loss(
        self, batch: MicroBatch, network: Network, reward: RewardGradient, anchor_weight: float,
        prepared_B: Tensor | None = None,
    ) -> Loss:  # fmt: skip
        """Compute the clipped surrogate, and the anchor on both branches at the same states.

        Raises:
            RuntimeError: called without the result of `prepare`.
        """
        if prepared_B is None:
            raise RuntimeError("DDPO needs the log-probabilities that `prepare` computes before the first step")
        late, kind = batch.late, network.prediction_type
        conditional, unconditional = branches(batch, network)
        with torch.no_grad(), network.anchored():
            base_conditional, base_unconditional = branches(batch, network)
        space = self.config.anchor.space
        drift = anchor_error(output_drift(conditional, base_conditional, late.alpha_bars_B, kind, space))
        metrics = {"anchor/conditional": drift.detach()}
        if unconditional is not None and base_unconditional is not None:
            # Each branch is anchored separately, since drifts of opposite sign can cancel in the guided sum.
            null = anchor_error(output_drift(unconditional, base_unconditional, late.alpha_bars_B, kind, space))
            metrics["anchor/null"] = null.detach()
            drift = (drift + null) / 2
        metrics["anchor/late"] = drift.detach()
        _, log_prob = taken(batch, network, conditional, unconditional)
        term = clipped_surrogate(log_prob, prepared_B, batch.weights_B, self.config.clip_range)
        # Excluded samples have no advantage and do not count towards the clipped share.
        seen = batch.weights_B != 0
        metrics |= {
            "ddpo/ratio": term.ratio_B[seen], "ddpo/clipped": term.is_clipped_B.float()[seen],
            "ddpo/log_prob": log_prob.detach()[seen], "ddpo/log_ratio_abs": term.ratio_B.log().abs()[seen],
        }  # fmt: skip
        return Loss(per_sample=self.config.reward_weight * term.loss_B + anchor_weight * drift, metrics=metrics)


def branches(batch: MicroBatch, network: Network) -> tuple[Tensor, Tensor | None]:
    """Return the conditional output of the rollouts' states, and the unconditional one under guidance."""
    return both_branches(network, batch.late, batch.prompts, batch.guidance_scale)


def taken(
    batch: MicroBatch, network: Network, conditional: Tensor, unconditional: Tensor | None
) -> tuple[Transition, Tensor]:
    """Return the Gaussian of the step, and the log-density (B,) of the state after it."""
    late = batch.late
    if late.following is None or late.following_alpha_bars_B is None:
        raise RuntimeError("the rollouts kept no transitions: they must step stochastically (sampler.eta above 0)")
    scale, rescale = batch.guidance_scale, batch.guidance_rescale
    model_output = conditional if unconditional is None else guide(conditional, unconditional, scale, rescale)
    step = transition(
        model_output,
        late.latents,
        late.alpha_bars_B,
        late.following_alpha_bars_B,
        network.prediction_type,
        eta=batch.eta,
        kind=batch.stochastic_step,
        rule=network.clean_rule,
    )
    return step, step.log_prob(late.following)
