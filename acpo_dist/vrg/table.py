"""Prediction error of a network as a function of the noise level: v(sigma) = E |eps_hat - eps|^2 / dim.

K nodes, T training timesteps. sigma = sqrt(1 / alpha_bar - 1).
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
"""Minimum number of nodes. With 12 to 16 nodes, J of the optimised trajectory is within 0.1 % of the best."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorTable:
    """K measured nodes and an interpolating curve.

    Nodes can be given in any order and any real dtype. They are stored sorted by sigma, as read-only float64.

    Interpolation and extrapolation:
      * `log_cubic`: monotone cubic (PCHIP) in (log sigma, log v). Outside the nodes, a power law with the slope of the
        end node limited to [-2, 0], the range of slopes of the irreducible error L / (L + sigma^2) of data with
        variance L.
      * `linear_alpha_bar`: linear in alpha_bar, for comparison with the publication. Below the smallest sigma the first
        segment is extended; above the largest sigma v decreases linearly to 0 at alpha_bar = 0.

    Raises:
        VrgError: too few nodes, columns of different lengths, a value that is not finite or not positive, or two equal
            sigmas.
    """

    sigmas: FloatArray
    v: FloatArray
    """Mean squared error of the predicted noise per element, over images, channels and pixels."""
    standard_errors: FloatArray | None = None
    """Standard errors of v, in the units of v."""
    timesteps: FloatArray | None = None
    """Timesteps in the numbering of the source (0- or 1-based); used by `check_against` and not by the curve."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that describe the source of the table."""
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
        """Hash of the sorted nodes and values, twelve hexadecimal digits; the interpolation is not included."""
        content = np.stack([self.sigmas, self.v]).astype("<f8").tobytes()
        return hashlib.sha256(content).hexdigest()[:12]

    @property
    def alpha_bars(self) -> FloatArray:
        """Cumulative signal fractions of the nodes, decreasing, shape (K,)."""
        return to_alpha_bars(self.sigmas)

    def with_interpolation(self, interpolation: Interpolation) -> "ErrorTable":
        """Return a table with the same nodes and another interpolation."""
        return self if interpolation == self.interpolation else replace(self, interpolation=interpolation)

    def on_schedule(self, alpha_bars_T: ArrayLike, *, first_timestep: int) -> "ErrorTable":
        """Replace the noise levels of the table by the schedule's levels at the table's timesteps.

        This corrects a wrong or rounded alpha_bar column.

        Args:
            alpha_bars_T: alpha_bar by timestep, shape (T,).
            first_timestep: number of the schedule's first timestep in the table, 0 or 1.

        Returns:
            A table with the same v.

        Raises:
            VrgError: the table has no timesteps, or a timestep is outside the schedule.
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
        """Check that the table was measured on this noise schedule (see `acpo_dist.vrg.fit`).

        Args:
            alpha_bars_T: alpha_bar by timestep, shape (T,).

        Raises:
            VrgError: the noise levels differ from the schedule's, the column holds alpha_t instead of alpha_bar, or the
                range of sigma differs from the schedule's.
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
