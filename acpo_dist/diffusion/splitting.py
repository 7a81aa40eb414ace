"""Operator splitting for guided sampling: PLMS for the model part, Euler for the guidance part.

High-order multistep methods become unstable with few steps and strong guidance. Splitting applies them to the model
part only. In z = x / sqrt(alpha_bar) and sigma = sqrt(1 / alpha_bar - 1), classifier-free guidance with weight w is

    dz/dsigma = eps_c + (w - 1) (eps_c - eps_u) = model part + guidance part

and each step solves the two parts in sequence. The model part is the conditional branch, so both schemes are equal to
PLMS at w = 1, where the guidance part is zero.

    ltsp   Lie-Trotter: guidance over the whole step, then the model over the whole step.
    stsp   Strang: guidance over half the step, the model over the whole step, guidance over the other half.

The guidance at the end of a step and at the start of the next step are at the same level and use one evaluation. The
schemes differ only in the share of a step's guidance that is applied at each end. Every evaluation is at a level of the
trajectory. The last level has no timestep, so the final half step of `stsp` reuses the last guidance with a constant
score difference, which scales it with sigma; at a clean end it is zero.

Network evaluations for N denoise steps: at each level both branches at the incoming state, then the conditional branch
at the state after guidance. Both schemes take 3 N single-branch evaluations in 2 N calls; guided DDIM or PLMS takes 2 N
in N calls. (Without reuse `stsp` would take 5 N.) At w = 1 both schemes take N calls of the conditional branch.

The history of a multistep method must lie on one solution of its ODE, but guidance changes the state at every level.
The conditional branch is evaluated before and after this change, so the difference is added to the eps of the history.
Without this correction the splitting error of `stsp` would also be of first order.

Order: 1 for `ltsp`. `stsp` is of order 2 in the splitting and in the dependence of guidance on sigma; Euler adds a
first-order error in the dependence of guidance on the state, which is zero if both branches have the same variance.
Where PLMS on the guided eps is stable, it is more accurate than both schemes and needs fewer evaluations.

Source: Wizadwongsa and Suwajanakorn 2023 (LTSP and STSP with classifier guidance and Euler). The classifier-free form,
the reuse of evaluations and the correction of the history are additions. `ltsp` applies guidance first because the
other order would need an evaluation at the end.
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
"""Share of a step's guidance that is applied at the end of the step; the rest is applied at the start."""


@dataclass(frozen=True, kw_only=True)
class GuidedDenoise:
    """The branches of a network for classifier-free guidance."""

    conditional: Denoise
    """The conditional branch only, at half the cost of both."""
    both: DenoiseBoth


def sample_split(
    denoise: GuidedDenoise, start: Tensor, trajectory: Trajectory, prediction_type: str,
    *, guidance_scale: float, scheme: str, visit: Visit | None = None, order: int = MAX_ORDER,
    rule: CleanRule = NO_RULE,
) -> Tensor:  # fmt: skip
    """Sample along a trajectory with guidance by operator splitting.

    Args:
        denoise: both branches; the module docstring states the number of calls.
        start: unit Gaussian noise, shape (B, ...).
        trajectory: noise levels of all steps.
        prediction_type: a name in `prediction.PREDICTION_TYPES`.
        guidance_scale: w of `sampling.guide`; 1 is the conditional branch only, 0 the unconditional branch only.
        scheme: `ltsp` or `stsp`.
        visit: called with the solution at each level; for `stsp` this is between the two half steps of guidance.
        order: maximum order of the model part, 1 to 4.
        rule: the x_0 rule of the model's scheduler. Only supported without guidance, because splitting does not compute
            the guided prediction that a scheduler would clip.

    Returns:
        x at the end of the trajectory, float32, same shape as `start`.

    Raises:
        ValueError: unknown scheme or prediction type, order outside 1..4, guidance together with an x_0 rule, or a
            trajectory that starts without signal.
    """
    if scheme not in SHARE_AT_END:
        raise ValueError(f"unknown splitting scheme {scheme!r}; known: {', '.join(SHARE_AT_END)}")
    if rule.is_active and guidance_scale != 1:
        raise ValueError(
            f"sampler.solver {scheme} does not compute the guided prediction that the model's clip_sample or "
            f"thresholding changes, and sampler.guidance_scale is {guidance_scale:g}: use another sampler.solver"
        )
    if trajectory.alpha_bars[0] == 0:
        raise ValueError(
            f"sampler.solver {scheme} cannot start without signal (alpha_bar 0, as flow models do): its step in "
            "sigma = s / a is infinite there. Use another sampler.solver, such as ddim or dpmpp_2m"
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
