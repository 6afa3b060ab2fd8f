"""The truth of a bridge whose h has no closed form, from grids in 1-D and 2-D, cached."""

from __future__ import annotations

import hashlib
import logging
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import NdBSpline
from torch import Tensor

from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.backward_grid import (
    Array,
    Grid,
    Problem,
    check_box,
    check_resolution,
    gradient,
    log_brownian,
    spline,
)
from cdm_ray.evaluation.grid_schemes import finite_differences, kernel_convolutions
from cdm_ray.evaluation.npz import Arrays, read_cache, short_digest, write_cache
from cdm_ray.processes.references import ReferenceProcess
from cdm_ray.storage import AnyPath

log = logging.getLogger(__name__)

VERSION = 1  # of the schemes and of the cache's content
TOLERANCE = 1e-3
COVERAGE = 0.99
PATHS = 256


class GridTruth:
    """log h and g = grad log h of the backward equation on a grid, for states in its box.

    What is kept is the smooth part of log h (see `grid_schemes`), so that values have no
    singularity to interpolate: cubic splines in x, cubic polynomials in t, the heat kernel's
    expansion at the end. Outside of the box the smooth part is that of the nearest point, and
    nothing is trusted. Results have the dtype and device of the states that are given.

    `action` [*points] and `rate` [1 + slices, *points] as `finite_differences` returns them;
    `agrees` [slices, *points] where both schemes agree; `coverage` is the trusted part of the
    states on bridges from the start.
    """

    def __init__(
        self,
        problem: Problem,
        grid: Grid,
        *,
        action: Array,
        rate: Array,
        agrees: NDArray[np.bool_],
        coverage: float,
    ) -> None:
        self.problem, self.grid, self.agrees, self.coverage = problem, grid, agrees, coverage
        self._action = spline(grid, action)
        self._rate = spline(grid, np.moveaxis(rate, 0, -1))

    def log_density(self, x: Tensor, t: float) -> Tensor:
        """log p(X_T = end | X_t = x), [N]; raises ValueError unless 0 <= t < T."""
        states, tau = _numpy(x), self._time_left(t)
        smooth = self._smooth(states, tau, (0,) * len(self.grid.points))
        return torch.from_numpy(smooth + log_brownian(self.problem, states, tau)).to(x)

    def score(self, x: Tensor, t: float) -> Tensor:
        """g = grad_x log p(X_T = end | X_t = x), [N, d]; raises ValueError unless 0 <= t < T."""
        states, tau = _numpy(x), self._time_left(t)
        orders = np.eye(len(self.grid.points), dtype=int)
        smooth = np.stack([self._smooth(states, tau, tuple(order)) for order in orders], axis=1)
        to_end = np.array(self.problem.end) - states
        return torch.from_numpy(smooth + to_end / (self.problem.sigma**2 * tau)).to(x)

    def trusted(self, x: Tensor, t: float) -> Tensor:
        """Where the schemes agree at all nodes around x and t, bool [N]: in log h to 1e-3, in g to
        1e-3 max(1, |g|)."""
        grid, states = self.grid, _numpy(x)
        position = self._time_left(t) / self.problem.duration * grid.slices
        first, last = max(1, int(np.floor(position))), max(1, int(np.ceil(position)))
        cell = np.floor((states - grid.lower) / grid.spacing)
        inside = np.all((cell >= 0) & (cell < np.array(grid.points) - 1), axis=1)
        corner = np.where(inside[:, None], cell, 0).astype(int)
        for offset in np.ndindex(*(2,) * len(grid.points)):
            index = tuple((corner + offset).T)
            for j in {first, last}:
                inside &= self.agrees[(j - 1, *index)]
        return torch.from_numpy(inside).to(x.device)

    def _time_left(self, t: float) -> float:
        if not 0 <= t < self.problem.duration:
            raise ValueError(f"t={t}; a bridge has a score for 0 <= t < {self.problem.duration}")
        return self.problem.duration - t

    def _smooth(self, x: Array, tau: float, order: tuple[int, ...]) -> Array:
        """A derivative of log h - log k = A + tau q at x [N, d]; at most order 1."""
        inside = np.clip(x, self.grid.lower, self.grid.upper)
        first, weights = _lagrange(tau / self.problem.duration * self.grid.slices, self.grid.slices)
        nearby = np.ascontiguousarray(self._rate.c[..., first : first + len(weights)])
        rate = NdBSpline(self._rate.t, nearby, 3)(inside, nu=order) @ weights
        return self._action(inside, nu=order) + tau * rate


def solve(
    process: ReferenceProcess,
    start: Tensor,
    end: Tensor,
    duration: float,
    grid: Grid,
    cache_folder: AnyPath,
) -> GridTruth:
    """The bridge from `start` [d] to `end` [d] in `duration`, from the cache if it is there.

    Raises ConfigError if sigma depends on time, a state is outside of the box, the drift is not
    finite on it, or the grid is too coarse: a kernel narrower than the nodes' distance, steps
    longer than the drift changes in, or schemes that disagree where the bridge goes.
    """
    problem = _problem(process, end, duration)
    begin = tuple(start.double().tolist())
    check_box(problem, begin, grid)
    drift = problem.drift(grid.nodes)
    if not np.isfinite(drift).all():
        bad = grid.nodes[~np.isfinite(drift).all(1)][0]
        raise ConfigError(f"the drift is not finite at {bad} in the grid's box: make it smaller")
    check_resolution(problem, begin, grid, drift)

    bounds = (grid.lower, grid.upper, grid.points, grid.steps, grid.slices, grid.substeps)
    values = hashlib.sha256(drift.tobytes()).hexdigest()
    key = (VERSION, problem.sigma, begin, problem.end, duration, bounds, values)
    path = cache_folder / f"bridge_{short_digest(repr(key))}.npz"

    def parse(arrays: Arrays) -> GridTruth:
        action, rate, agrees = arrays["action"], arrays["rate"], arrays["agrees"]
        shapes = (grid.points, (1 + grid.slices, *grid.points), (grid.slices, *grid.points))
        if (action.shape, rate.shape, agrees.shape) != shapes or agrees.dtype != bool:
            raise ValueError("arrays of other shapes")
        coverage = float(arrays["coverage"])
        return GridTruth(problem, grid, action=action, rate=rate, agrees=agrees, coverage=coverage)

    cached = read_cache(path, parse)
    if cached is not None:
        return cached
    log.info("solving the backward equation on %s nodes, %d steps", grid.points, grid.steps)
    arrays = _solve(problem, begin, grid)
    write_cache(path, arrays)
    return parse(arrays)


def _solve(problem: Problem, start: tuple[float, ...], grid: Grid) -> Arrays:
    action, rate = finite_differences(problem, grid)
    other = kernel_convolutions(problem, grid)
    if not np.isfinite(other).all():
        raise ConfigError(
            f"the drift leads out of the grid's box, {grid.lower} to {grid.upper}, to where it is "
            f"not finite: make the box smaller or raise steps={grid.steps}"
        )
    agrees = np.stack(
        [_agreement(problem, grid, action, rate[j + 1], log_h, j) for j, log_h in enumerate(other)]
    )
    truth = GridTruth(problem, grid, action=action, rate=rate, agrees=agrees, coverage=0.0)
    coverage = _coverage(truth, start)
    if coverage < COVERAGE:
        raise ConfigError(
            f"the grid's two schemes differ by more than {TOLERANCE} at {1 - coverage:.1%} of the "
            f"states on bridges from {start} to {problem.end}: it is too coarse or its box too "
            f"small; raise points={grid.points} and steps={grid.steps}, or widen {grid.lower} to "
            f"{grid.upper}"
        )
    return {"action": action, "rate": rate, "agrees": agrees, "coverage": np.array(coverage)}


def _agreement(
    problem: Problem, grid: Grid, action: Array, rate: Array, log_h: Array, slice_index: int
) -> NDArray[np.bool_]:
    tau = (slice_index + 1) / grid.slices * problem.duration
    log_k = grid.field(log_brownian(problem, grid.nodes, tau))
    difference = action + tau * rate + log_k - log_h
    to_end = grid.field(np.array(problem.end) - grid.nodes)
    score = gradient(grid, action + tau * rate) + to_end / (problem.sigma**2 * tau)
    size = np.sqrt((score**2).sum(0))
    error = np.sqrt((gradient(grid, difference) ** 2).sum(0))
    agrees = (np.abs(difference) < TOLERANCE) & (error < TOLERANCE * np.maximum(1, size))
    return cast(NDArray[np.bool_], agrees)


def _coverage(truth: GridTruth, start: tuple[float, ...]) -> float:
    """The trusted part of the states of simulated bridges (Euler-Maruyama, b + sigma^2 g)."""
    problem, steps = truth.problem, truth.grid.steps
    rng = np.random.default_rng(0)
    x, dt = np.tile(np.array(start), (PATHS, 1)), problem.duration / steps
    trusted = []
    for step in range(steps):
        state = torch.from_numpy(x)
        trusted.append(truth.trusted(state, step * dt).double().mean().item())
        bridge = problem.drift(x) + problem.sigma**2 * truth.score(state, step * dt).numpy()
        x = x + bridge * dt + problem.sigma * np.sqrt(dt) * rng.standard_normal(x.shape)
    return float(np.mean(trusted))


def _problem(process: ReferenceProcess, end: Tensor, duration: float) -> Problem:
    if not 0 < duration < np.inf:
        raise ConfigError(f"duration={duration} of a bridge has to be positive")
    sigma = process.sigma(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64) * duration)
    if (sigma != sigma[0]).any():
        raise ConfigError(f"sigma varies in time, {sigma.tolist()}; grids need it constant")

    def drift(x: Array) -> Array:
        with torch.no_grad():
            return process.drift(torch.from_numpy(np.ascontiguousarray(x))).double().numpy()

    return Problem(drift, sigma[0].item(), tuple(end.double().tolist()), duration)


def _lagrange(position: float, last: int) -> tuple[int, Array]:
    """First of up to four neighbours among 0..last, and the weights of the polynomial's value."""
    count = min(4, last + 1)
    first = int(np.clip(np.floor(position) - 1, 0, last + 1 - count))
    nodes = np.arange(first, first + count)
    weights = [np.prod([(position - m) / (n - m) for m in nodes if m != n]) for n in nodes]
    return first, np.array(weights)


def _numpy(x: Tensor) -> Array:
    return x.detach().to("cpu", torch.float64).numpy()
