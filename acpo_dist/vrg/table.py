"""Prediction error of a noise-predicting network against the noise level: v(sigma) = E |eps_hat - eps|^2 / dim.

Legend: K nodes, T training timesteps. sigma = sqrt(1 / alpha_bar - 1).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.fit import check_fit
from acpo_dist.vrg.levels import FloatArray, checked_schedule, to_alpha_bars, to_sigmas

Interpolation = Literal["log_cubic", "linear_alpha_bar"]

MIN_NODES = 8
"""With 12 to 16 nodes the optimised trajectory is within 0.1 % of the best; a table below 8 is taken for a mistake."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorTable:
    """K measured nodes and the curve through them.

    Nodes may come in any order and any real dtype; they are kept sorted by sigma, in float64, read-only.

    Interpolation and its continuation outside the nodes:
      * `log_cubic`: monotone cubic (PCHIP) in (log sigma, log v). Outside, a power law with the slope of the end node,
        limited to [-2, 0]: the irreducible error L / (L + sigma^2) of data with variance L has no other slopes.
      * `linear_alpha_bar`: linear in alpha_bar, as the publication does it, for parity only. Cleaner than the first
        node it goes on along the first segment; noisier than the last it runs to v = 0 at alpha_bar = 0.

    Raises:
        VrgError: too few nodes, lengths that differ, a value that is not finite or not positive, or two equal sigmas.
    """

    sigmas: FloatArray
    v: FloatArray
    """Mean squared error of the predicted noise per element, over images, channels and pixels."""
    standard_errors: FloatArray | None = None
    """Of v, same units."""
    timesteps: FloatArray | None = None
    """As the source names them (0- or 1-based); `check_against` uses them, the curve does not."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: where the numbers are from."""
    interpolation: Interpolation = "log_cubic"

    def __post_init__(self) -> None:
        """Sort and check the nodes."""
        if self.interpolation not in get_args(Interpolation):
            raise VrgError(
                f"unknown interpolation {self.interpolation!r}; known: {', '.join(get_args(Interpolation))}."
            )
        order = np.argsort(np.asarray(self.sigmas, dtype=np.float64), kind="stable")
        for name in ("sigmas", "v", "standard_errors", "timesteps"):
            column = getattr(self, name)
            if column is None:
                continue
            column = np.asarray(column, dtype=np.float64)
            if column.shape != order.shape or column.ndim != 1:
                raise VrgError(
                    f"an error table needs vectors of one length, found {order.shape} sigmas and {column.shape} {name}."
                )
            column = column[order]
            column.setflags(write=False)
            object.__setattr__(self, name, column)
        self._check_nodes()

    def _check_nodes(self) -> None:
        if len(self.sigmas) < MIN_NODES:
            raise VrgError(
                f"an error table needs at least {MIN_NODES} nodes (12 to 16 are good), found {len(self.sigmas)}."
            )
        for name, column, floor in (("sigma", self.sigmas, 0), ("v", self.v, 0)):
            wrong = ~(np.isfinite(column) & (column > floor))
            if wrong.any():
                at = int(np.argmax(wrong))
                raise VrgError(f"every {name} must be finite and positive, found {column[at]:g} at node {at + 1}.")
        if self.standard_errors is not None and not (
            np.isfinite(self.standard_errors).all() and (self.standard_errors >= 0).all()
        ):
            raise VrgError("standard errors must be finite and not negative.")
        same = np.diff(self.sigmas) <= 0
        if same.any():
            at = int(np.argmax(same))
            raise VrgError(f"two nodes share sigma = {self.sigmas[at]:g}: merge them (the file reader does).")

    @cached_property
    def hash(self) -> str:
        """Twelve hexadecimal digits of the sorted nodes and values; the interpolation is not part of it."""
        content = np.stack([self.sigmas, self.v]).astype("<f8").tobytes()
        return hashlib.sha256(content).hexdigest()[:12]

    @property
    def alpha_bars(self) -> FloatArray:
        """Cumulative signal fractions of the nodes, falling, shape (K,)."""
        return to_alpha_bars(self.sigmas)

    def with_interpolation(self, interpolation: Interpolation) -> "ErrorTable":
        """The same nodes with another curve through them."""
        return self if interpolation == self.interpolation else replace(self, interpolation=interpolation)

    def on_schedule(self, alpha_bars_T: ArrayLike, *, first_timestep: int) -> "ErrorTable":
        """The same values on the scheduler's own levels, read off at the table's timesteps.

        Repairs a wrong or coarsely printed alpha_bar column.

        Args:
            first_timestep: how the table names the scheduler's first level: 0, or 1 in files that count from 1.

        Raises:
            VrgError: the table has no timesteps, or one is outside the schedule.
        """
        levels = checked_schedule(alpha_bars_T)
        if self.timesteps is None:
            raise VrgError("the error table names no timesteps, so its levels cannot be read off the schedule.")
        at = self.timesteps - first_timestep
        if at.min() < 0 or at.max() > len(levels) - 1:
            raise VrgError(
                f"the table's timesteps {self.timesteps.min():g} to {self.timesteps.max():g}, counted from "
                f"{first_timestep}, leave the schedule of {len(levels)} timesteps."
            )
        log_sigmas = np.interp(at, np.arange(len(levels)), np.log(to_sigmas(levels)))
        return replace(self, sigmas=np.exp(log_sigmas))

    def value(self, sigmas: ArrayLike) -> FloatArray:
        """v at any sigma > 0, same shape."""
        return self.value_and_slope(sigmas)[0]

    def value_and_slope(self, sigmas: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """v and dv/dsigma at any sigma > 0, same shape."""
        sigmas = np.asarray(sigmas, dtype=np.float64)
        return self._linear(sigmas) if self.interpolation == "linear_alpha_bar" else self._cubic(sigmas)

    def check_against(self, alpha_bars_T: ArrayLike) -> None:
        """Refuse a table that was not made for this schedule (see `acpo_dist.vrg.fit`).

        Raises:
            VrgError: levels that differ from the scheduler's, a column of alpha_t instead of alpha_bar, or a range of
                sigma that is not the scheduler's.
        """
        check_fit(self, checked_schedule(alpha_bars_T))

    @cached_property
    def _curve(self) -> tuple[Any, Any, float, float]:
        curve = PchipInterpolator(np.log(self.sigmas), np.log(self.v))
        slope = curve.derivative()
        ends = np.clip(slope(np.log(self.sigmas[[0, -1]])), -2.0, 0.0)
        return curve, slope, float(ends[0]), float(ends[1])

    def _cubic(self, sigmas: FloatArray) -> tuple[FloatArray, FloatArray]:
        curve, slope, clean_slope, noisy_slope = self._curve
        where = np.log(sigmas)
        inside = np.clip(where, np.log(self.sigmas[0]), np.log(self.sigmas[-1]))
        beyond = where - inside
        slopes = np.where(beyond < 0, clean_slope, np.where(beyond > 0, noisy_slope, slope(inside)))
        values = np.exp(curve(inside) + slopes * beyond)
        return values, values * slopes / sigmas

    @cached_property
    def _segments(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        levels = np.concatenate([[0.0], self.alpha_bars[::-1]])
        values = np.concatenate([[0.0], self.v[::-1]])
        return levels, values, np.diff(values) / np.diff(levels)

    def _linear(self, sigmas: FloatArray) -> tuple[FloatArray, FloatArray]:
        levels, values, slopes = self._segments
        at = to_alpha_bars(sigmas)
        segment = np.clip(np.searchsorted(levels, at, side="right") - 1, 0, len(slopes) - 1)
        # d alpha_bar / d sigma = -2 sigma alpha_bar^2
        return values[segment] + slopes[segment] * (at - levels[segment]), slopes[segment] * (-2 * sigmas * at * at)
