"""Bridge problems on a grid in 1-D and 2-D, and the splines that carry fields on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import NdBSpline, make_interp_spline

from cdm_ray.errors import ConfigError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """dX = drift(X) dt + sigma dB that is at `end` at time `duration`; drift maps [N, d] to
    [N, d] in float64."""

    drift: Callable[[Array], Array]
    sigma: float
    end: tuple[float, ...]
    duration: float


@dataclass(frozen=True)
class Grid:
    """A box with `points` nodes along each axis; `steps` time steps, `slices` of them kept.

    Both count from the end: slice j = 1..slices is at tau = j duration / slices. `substeps` of
    the convolutions make one step. Raises ConfigError for numbers that do not fit together.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    points: tuple[int, ...]
    steps: int
    slices: int = 100
    substeps: int = 1

    def __post_init__(self) -> None:
        if not len(self.lower) == len(self.upper) == len(self.points) in (1, 2):
            raise ConfigError(
                f"a grid from {self.lower} to {self.upper} with {self.points} points; it needs a "
                "lower end, an upper end and a number of points for each of 1 or 2 axes"
            )
        if any(low >= high for low, high in zip(self.lower, self.upper, strict=True)):
            raise ConfigError(f"a grid from {self.lower} to {self.upper} is empty: swap the ends")
        if min(self.points) < 7:
            raise ConfigError(f"points={self.points} of a grid have to be 7 at least on each axis")
        if min(self.slices, self.steps, self.substeps) < 1 or self.steps % self.slices:
            raise ConfigError(
                f"steps={self.steps}, slices={self.slices}, substeps={self.substeps} of a grid: "
                "they are positive, and steps is a multiple of slices"
            )

    @cached_property
    def axes(self) -> tuple[Array, ...]:
        """The nodes' coordinates along each axis."""
        bounds = zip(self.lower, self.upper, self.points, strict=True)
        return tuple(np.linspace(low, high, n) for low, high, n in bounds)

    @property
    def spacing(self) -> tuple[float, ...]:
        """The distance of neighbours along each axis."""
        return tuple(float(axis[1] - axis[0]) for axis in self.axes)

    @cached_property
    def nodes(self) -> Array:
        """All nodes [N, d], the last axis fastest."""
        return np.stack([c.ravel() for c in np.meshgrid(*self.axes, indexing="ij")], axis=1)

    def every_other(self) -> Grid:
        """The grid of every other node and step; raises ConfigError if it does not exist."""
        if any(n % 2 == 0 for n in self.points) or self.steps % (2 * self.slices):
            raise ConfigError(
                f"points={self.points}, steps={self.steps}, slices={self.slices} of a grid: to "
                "check it with every other node and step, points have to be odd and steps a "
                "multiple of 2 slices"
            )
        points = tuple((n + 1) // 2 for n in self.points)
        return replace(self, points=points, steps=self.steps // 2)

    def field(self, values: Array) -> Array:
        """Values at the nodes, [N] or [N, d], as [*points] or [d, *points]."""
        return values.T.reshape(*values.shape[1:], *self.points)


def spline(grid: Grid, field: Array, degree: int = 3) -> NdBSpline:
    """The interpolating spline of fields [*points, ...], trailing axes apart."""
    knots, coefficients = [], field
    for axis, x in enumerate(grid.axes):
        one = make_interp_spline(x, coefficients, k=degree, axis=axis)
        knots.append(one.t)
        coefficients = np.moveaxis(one.c, 0, axis)
    return NdBSpline(tuple(knots), np.ascontiguousarray(coefficients), degree)


def gradient(grid: Grid, field: Array) -> Array:
    """grad of a smooth field [*points], [d, *points], from its quintic spline."""
    return derivative(grid, field, 1)


def derivative(grid: Grid, field: Array, order: int) -> Array:
    """The derivatives of one order along each axis, error O(dx^(6 - order)) inside."""
    return np.stack(
        [
            np.moveaxis(
                make_interp_spline(x, field, k=5, axis=axis).derivative(order)(x), axis, axis
            )
            for axis, x in enumerate(grid.axes)
        ]
    )


def log_brownian(problem: Problem, x: Array, tau: float) -> Array:
    """log N(end; x, sigma^2 tau I) for x [N, d]."""
    variance = problem.sigma**2 * tau
    miss = ((np.array(problem.end) - x) ** 2).sum(1)
    return -miss / (2 * variance) - x.shape[1] / 2 * np.log(2 * np.pi * variance)


def check_box(problem: Problem, start: tuple[float, ...], grid: Grid) -> None:
    """Refuse states outside of the box."""
    for name, state in (("start", start), ("end", problem.end)):
        if len(state) != len(grid.points):
            raise ConfigError(f"{name}={state} on a grid with {len(grid.points)} axes")
        bounds = zip(grid.lower, state, grid.upper, strict=True)
        if not all(low < value < high for low, value, high in bounds):
            raise ConfigError(
                f"{name}={state} is not inside of the grid's box, {grid.lower} to {grid.upper}: "
                "choose another state or widen the box"
            )


def check_resolution(problem: Problem, start: tuple[float, ...], grid: Grid, drift: Array) -> None:
    """Refuse what can be seen to fail before solving."""
    dt = problem.duration / grid.steps
    # The trapezoidal sum over kernel and h after one step, both this wide, is then good to 1e-6.
    width = problem.sigma * np.sqrt(dt / (2 * grid.substeps))
    needed = tuple(
        2 * int(np.ceil(0.6 * (high - low) / width)) + 1
        for low, high in zip(grid.lower, grid.upper, strict=True)
    )
    if any(n < least for n, least in zip(grid.points, needed, strict=True)):
        raise ConfigError(
            f"a grid with points={grid.points} is too coarse for {grid.steps} steps of "
            f"{grid.substeps}: sigma sqrt(dt) is {width:.3g}; raise points to {needed} at least"
        )
    between = (grid.nodes >= np.minimum(start, problem.end) - grid.spacing) & (
        grid.nodes <= np.maximum(start, problem.end) + grid.spacing
    )
    change = np.stack([gradient(grid, component) for component in grid.field(drift)])
    rate = float(np.abs(change).reshape(-1, len(drift))[:, between.all(1)].max())
    needed_steps = int(np.ceil(rate * problem.duration))
    if grid.steps < needed_steps:
        raise ConfigError(
            f"a grid with steps={grid.steps} is too coarse in time: the drift changes at a rate of "
            f"{rate:.3g} between start and end; raise steps to {needed_steps} at least"
        )
