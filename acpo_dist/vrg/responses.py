"""Response of a solver to prediction errors: x0_error = - sum_i W_i e_i, with e_i the error at denoise step i.

N denoise steps from noisy to clean; `sigma_end` is sigma after the last step (0 is clean); leading dimensions are a
batch of trajectories. In z = x / sqrt(alpha_bar) every solver here is linear in the network outputs. The responses
assume "frozen eps": an error at one step does not change the network outputs at later steps.

A step goes from sigma s to sigma t, with D = s - t and h = log(s / t). Solvers approximate the noise (`dpm`) or the
clean estimate (`dpmpp`) by a polynomial in log sigma. For every deterministic solver sum W = s_first - sigma_end,
because a constant error moves z by that amount; with eta > 0 the sum is larger.

Sources: DDIM (Song et al. 2021), DPM-Solver and DPM-Solver++ (Lu et al. 2022). Where diffusers' schedulers differ from
the exact integral of the polynomial (second difference, order 3), the responses follow the schedulers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import FloatArray

Array = NDArray[Any]
"""float64, or complex128 for complex-step differentiation."""
Response = Callable[[Array, float], Array]
"""(sigmas (..., N), sigma_end) -> weights (..., N)."""

LOWER_ORDER_BELOW = 15
"""diffusers lowers the order of the last steps of trajectories shorter than this (`lower_order_final`)."""


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver's name and response."""

    name: str
    respond: Response
    analytic: bool = False
    """Whether `respond` accepts a batch of complex sigmas and is analytic, as complex-step differentiation requires."""


def first_order(sigmas: Array, sigma_end: float) -> Array:
    """Response of DDIM with eta 0, Euler, DPM-Solver-1 and DPM-Solver++ 1: W = D.

    Args:
        sigmas: decreasing, shape (..., N).
        sigma_end: sigma after the last step.

    Returns:
        W, shape (..., N).
    """
    return sigmas - _following(sigmas, sigma_end)


def ddim_response(sigmas: Array, sigma_end: float, *, eta: float) -> Array:
    """Response of stochastic DDIM: W = s - t sqrt(1 - eta^2 (1 - t^2 / s^2)).

    The injected noise does not count as a prediction error.

    Args:
        sigmas: decreasing, shape (..., N).
        sigma_end: sigma after the last step.
        eta: amount of noise, in [0, 1].

    Returns:
        W, shape (..., N).
    """
    following = _following(sigmas, sigma_end)
    return sigmas - following * np.sqrt(1 - eta**2 * (1 - (following / sigmas) ** 2))


def multistep(sigmas: Array, sigma_end: float, *, order: int, clean_form: bool) -> Array:
    """Response of multistep DPM-Solver (noise form) or DPM-Solver++ (clean form), order 2 (midpoint) or 3.

    The order increases from 1 in the first steps and is lowered in the last steps as in diffusers
    (`lower_order_final`).

    Args:
        sigmas: decreasing, shape (..., N).
        sigma_end: sigma after the last step.
        order: 2 or 3.
        clean_form: True for DPM-Solver++, False for DPM-Solver.

    Returns:
        W, shape (..., N).
    """
    orders = _multistep_orders(sigmas.shape[-1], order, sigma_end)
    coefficients = _multistep_coefficients(sigmas, sigma_end, orders, clean_form)
    if clean_form:
        return _clean_form_weights(sigmas, sigma_end, coefficients)
    weights = coefficients[0].copy()
    for lag in (1, 2):
        weights[..., :-lag] += coefficients[lag][..., lag:]
    return weights


def singlestep(sigmas: Array, sigma_end: float, *, order: int) -> Array:
    """Response of single-step DPM-Solver (noise form, midpoint), order 2 or 3: macro steps of `order` calls each.

    The inner nodes of a macro step are nodes of the trajectory. The first inner node of an order-3 step has weight 0.

    Args:
        sigmas: decreasing, shape (..., N).
        sigma_end: sigma after the last step.
        order: 2 or 3.

    Returns:
        W, shape (..., N).
    """
    weights = np.zeros_like(sigmas)
    start = 0
    for size in _singlestep_sizes(sigmas.shape[-1], order, sigma_end):
        outer = sigmas[..., start]
        end = sigmas[..., start + size] if start + size < sigmas.shape[-1] else sigma_end
        fall = outer - end
        inner_weight = 0.0
        if size > 1:
            h = np.log(outer / end)
            fraction = np.log(outer / sigmas[..., start + size - 1]) / h
            inner_weight = fall / (2 * fraction) if size == 2 else (fall / h - end) / fraction
            weights[..., start + size - 1] = inner_weight
        weights[..., start] = fall - inner_weight
        start += size
    return weights


def probe(step_fn: Callable[[int, FloatArray, FloatArray], Any], num_steps: int, *, to_z: float = 1.0) -> FloatArray:
    """Measure the weights of a linear scheduler from one run on a batch of one-hot network outputs.

    Args:
        step_fn: (denoise_step, outputs (N + 1,), states (N + 1,)) -> states after the step. The first states are
            zeros. It is called once per step in order, so it can wrap a stateful scheduler.
        num_steps: N.
        to_z: factor from the final state to z = x / sqrt(alpha_bar): sqrt(1 + sigma_end^2) for a variance-preserving
            scheduler that stops at sigma_end, 1 at the clean end.

    Returns:
        W, shape (N,).

    Raises:
        VrgError: the scheduler is not linear in the network outputs (clipping, thresholding or noise).
    """
    outputs = np.eye(num_steps, num_steps + 1)
    outputs[:, -1] = mixture = 10 * np.cos(1 + np.arange(num_steps))
    states: FloatArray = np.zeros(num_steps + 1)
    for step in range(num_steps):
        states = np.asarray(step_fn(step, outputs[step], states), dtype=np.float64)
    weights = -to_z * states[:-1]
    expected, found = float(mixture @ weights), float(-to_z * states[-1])
    # The tolerance allows float32 rounding in schedulers; clipping or noise causes an error of order one.
    if not abs(found - expected) <= 1e-3 * float(np.abs(mixture * weights).sum()):
        raise VrgError(
            f"the scheduler is not linear in the network's outputs: a mixture should give {expected:g}, "
            f"found {found:g}.\n  Switch clip_sample, thresholding and noise off before probing."
        )
    return weights


SOLVERS: dict[str, Solver] = {
    name: Solver(name=name, respond=respond, analytic=True)
    for name, respond in {
        "first_order": first_order,
        "dpm_2m": partial(multistep, order=2, clean_form=False),
        "dpm_3m": partial(multistep, order=3, clean_form=False),
        "dpmpp_2m": partial(multistep, order=2, clean_form=True),
        "dpmpp_3m": partial(multistep, order=3, clean_form=True),
        "dpm_single_2": partial(singlestep, order=2),
        "dpm_single_3": partial(singlestep, order=3),
    }.items()
}


def ddim(eta: float) -> Solver:
    """The solver for stochastic DDIM.

    Args:
        eta: amount of noise, in [0, 1].

    Raises:
        VrgError: eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise VrgError(f"eta must be in [0, 1], found {eta}.")
    return Solver(name=f"ddim_eta_{eta:g}", respond=partial(ddim_response, eta=eta), analytic=True)


def as_solver(solver: str | Solver | Response) -> Solver:
    """Convert a name or a response function to a `Solver`.

    Args:
        solver: a name in `SOLVERS`, a `Solver` (returned unchanged), or a response function (differentiated by central
            differences).

    Raises:
        VrgError: unknown name.
    """
    if isinstance(solver, Solver):
        return solver
    if callable(solver):
        return Solver(name=getattr(solver, "__name__", type(solver).__name__), respond=solver)
    if solver not in SOLVERS:
        raise VrgError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}, or a function.")
    return SOLVERS[solver]


def _following(sigmas: Array, sigma_end: float) -> Array:
    return np.concatenate([sigmas[..., 1:], np.full_like(sigmas[..., :1], sigma_end)], axis=-1)


def _multistep_orders(num_steps: int, order: int, sigma_end: float) -> Array:
    orders = np.minimum(np.arange(1, num_steps + 1), order)
    if num_steps < LOWER_ORDER_BELOW:
        orders = np.minimum(orders, np.arange(num_steps, 0, -1))
    if sigma_end == 0:  # log sigma is infinite at the clean end
        orders[-1] = 1
    return orders


def _singlestep_sizes(num_steps: int, order: int, sigma_end: float) -> list[int]:
    """Sizes of the macro steps; remaining calls use a lower order, and order 3 never ends on a full macro step."""
    full, rest = divmod(num_steps, order)
    if rest:
        tail = [rest]
    else:
        full, tail = full - 1, ([2, 1] if order == 3 else [1, 1])
    if sigma_end == 0 and tail[-1] > 1:
        tail = [1] * tail[-1]
    return [order] * full + tail


def _multistep_coefficients(sigmas: Array, sigma_end: float, orders: Array, clean_form: bool) -> list[Array]:
    """Coefficients of the outputs 0, 1 and 2 steps back, for each step."""
    following = _following(sigmas, sigma_end)
    current = sigmas - following
    if clean_form:
        current = current / sigmas
    earlier, earliest = np.zeros_like(current), np.zeros_like(current)
    (second,) = np.nonzero(orders == 2)
    h = np.log(sigmas[..., second] / following[..., second])
    half = current[..., second] * h / (2 * np.log(sigmas[..., second - 1] / sigmas[..., second]))
    current[..., second] += half
    earlier[..., second] -= half
    (third,) = np.nonzero(orders == 3)
    h = np.log(sigmas[..., third] / following[..., third])
    back = np.log(sigmas[..., third - 1] / sigmas[..., third]) / h
    further = np.log(sigmas[..., third - 2] / sigmas[..., third - 1]) / h
    linear, quadratic = _integrals(current[..., third], following[..., third], h, clean_form)
    # Newton's polynomial through the last three outputs, in the divided differences of neighbouring pairs.
    mixed = (linear * back + quadratic) / (back + further)
    near, far = (linear + mixed) / back, mixed / further
    current[..., third] += near
    earlier[..., third] -= near + far
    earliest[..., third] += far
    return [current, earlier, earliest]


def _integrals(constant: Array, following: Array, h: Array, clean_form: bool) -> tuple[Array, Array]:
    """Integrals of the linear and quadratic terms over a step; `constant` is the integral of the constant term."""
    if clean_form:
        linear = 1 - constant / h
        return linear, 0.5 - linear / h
    linear = constant / h - following
    return linear, linear / h - following / 2


def _clean_form_weights(sigmas: Array, sigma_end: float, coefficients: list[Array]) -> Array:
    """W of z' = (t / s) z + sum_j c_j d_j with d = z - s e, by the adjoint recursion from the last step."""
    num_steps = sigmas.shape[-1]
    ratio = _following(sigmas, sigma_end) / sigmas
    pull = np.zeros_like(sigmas)  # d (final z) / d (clean estimate of a step)
    state = np.ones_like(sigmas[..., 0])  # d (final z) / d (z after a step)
    for step in reversed(range(num_steps)):
        for lag in range(min(step, 2) + 1):
            pull[..., step - lag] += coefficients[lag][..., step] * state
        state = ratio[..., step] * state + pull[..., step]
    return sigmas * pull
