"""Splitting for guided sampling: the model by PLMS, the guidance by Euler.

With few steps and strong guidance high-order multistep rules become unstable. Splitting keeps them for the part that
they suit. In z = x / sqrt(alpha_bar) and sigma = sqrt(1 / alpha_bar - 1), classifier-free guidance with weight w is

    dz/dsigma = eps_c + (w - 1) (eps_c - eps_u) = model part + guidance part

and each step solves the two parts one after the other. The model part is the conditional branch, so that both schemes
become the plain PLMS at w = 1, where the guidance part vanishes.

    ltsp   Lie-Trotter: guidance over the whole step, then the model over the whole step.
    stsp   Strang: guidance over half the step, the model over all of it, guidance over the other half.

A guidance part at the end of one step and one at the start of the next stand at the same level, so they are taken
together, from one evaluation: the schemes differ only in how the guidance of a step is shared between its two ends.
Every evaluation is at a level of the trajectory. At the last level the network has no timestep; the half step of `stsp`
that belongs there takes the last guidance with its score difference frozen, which means in proportion to sigma. At a
clean end that is nothing.

Evaluations of the network, N denoise steps: at each level both branches at the arriving state, then the conditional one
at the state that guidance has moved. That is 3 N single-branch evaluations in 2 N calls for either scheme, against 2 N
in N calls for plain guided DDIM or PLMS. (Without reuse `stsp` would solve the guidance twice per step and cost 5 N.)
At w = 1 it is N calls of the conditional branch.

The history of a multistep rule has to lie on one solution of the part that it solves, but guidance jumps at every
level. The conditional branch is known on both sides of each jump, so the remembered eps are moved by its change there.
Without this the coupling of the parts would be of first order for `stsp` too.

Order: 1 for `ltsp`. For `stsp` 2 in the coupling and in how guidance depends on sigma, while Euler leaves a first-order
error in how guidance depends on the state; that is nothing where both branches have the same spread. Where plain PLMS
is stable on the guided eps it is nearer to the exact solution than either scheme, and cheaper.

Source: Wizadwongsa and Suwajanakorn 2023 (LTSP, STSP with classifier guidance, Euler for it). The classifier-free form,
the reuse of evaluations and the moved history are ours; `ltsp` takes guidance first because the other order would need
an evaluation at the end.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from acpo_dist.diffusion.clean_rule import NO_RULE, CleanRule
from acpo_dist.diffusion.plms import MAX_ORDER, Multistep, noise_levels, noise_of
from acpo_dist.diffusion.sampling import Denoise, Visit
from acpo_dist.diffusion.trajectory import Trajectory

DenoiseBoth = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x_t of shape (B, ...), timesteps (B,)) -> (conditional, unconditional) network outputs, each of x_t's shape."""

SHARE_AT_END: dict[str, float] = {"ltsp": 0.0, "stsp": 0.5}
"""Part of a step's guidance that is applied at its end, by scheme; the rest is applied at its start."""


@dataclass(frozen=True, kw_only=True)
class GuidedDenoise:
    """A network under classifier-free guidance, its branches apart."""

    conditional: Denoise
    """The conditional branch alone, at half the cost of both."""
    both: DenoiseBoth


def sample_split(
    denoise: GuidedDenoise, start: Tensor, trajectory: Trajectory, prediction_type: str,
    *, guidance_scale: float, scheme: str, visit: Visit | None = None, order: int = MAX_ORDER,
    rule: CleanRule = NO_RULE,
) -> Tensor:  # fmt: skip
    """Sample along the whole trajectory under guidance from `start` (unit Gaussian noise) and return x at its end.

    Args:
        denoise: both branches; see the top of this file for how often each is called.
        start: shape (B, ...).
        scheme: `ltsp` or `stsp`.
        guidance_scale: w of `sampling.guide`; 1 is the conditional branch alone, 0 the unconditional one.
        order: highest order of the model part, 1 to 4.
        rule: what the model's scheduler does to x0-hat; only without guidance, since splitting never forms the guided
            prediction that a scheduler would clip.
        visit: sees the sampler's solution at each level, which for `stsp` is between the two halves of guidance there.

    Returns:
        x at the end of the trajectory, float32.

    Raises:
        ValueError: unknown scheme or prediction type, order outside 1..4, or guidance together with an x_0 rule.
    """
    if scheme not in SHARE_AT_END:
        raise ValueError(f"unknown splitting scheme {scheme!r}; known: {', '.join(SHARE_AT_END)}")
    if rule.is_active and guidance_scale != 1:
        raise ValueError(
            f"sampler.solver {scheme} never forms the guided prediction that the model's clip_sample or thresholding "
            f"acts on, and sampler.guidance_scale is {guidance_scale:g}: use another sampler.solver"
        )
    share, weight = SHARE_AT_END[scheme], guidance_scale - 1
    sigmas, multistep = noise_levels(trajectory), Multistep(trajectory, order)
    state = start.float()
    guidance = arrived = torch.zeros_like(state)
    for step, timestep in enumerate(trajectory.timesteps):
        level = trajectory.alpha_bars[step]
        signal, at = math.sqrt(level), torch.full((state.shape[0],), timestep, device=state.device)
        if weight != 0:
            arrived, unconditional = (
                noise_of(output, state, level, prediction_type) for output in denoise.both(state, at)
            )
            guidance = weight * (arrived - unconditional)
        before = sigmas[step] - sigmas[step - 1] if step > 0 else 0.0
        state = state + signal * share * before * guidance
        if visit is not None:
            visit(step, state)
        state = state + signal * (1 - share) * (sigmas[step + 1] - sigmas[step]) * guidance
        levels = torch.full((state.shape[0],), level, dtype=torch.float64, device=state.device)
        model_output = rule.apply(denoise.conditional(state, at), state, levels, prediction_type)
        noise = noise_of(model_output, state, level, prediction_type)
        if weight != 0:
            multistep.shift(noise - arrived)
        state = multistep.advance(step, noise, state)
    remaining = share * (sigmas[-1] - sigmas[-2]) * sigmas[-1] / sigmas[-2]
    return state + math.sqrt(trajectory.alpha_bars[-1]) * remaining * guidance
