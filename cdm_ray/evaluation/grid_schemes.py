"""Two independent solutions of the backward equation of a bridge on a grid, in 1-D and 2-D.

h(x, t) = p(X_T = end | X_t = x) of dX = b(X) dt + sigma dB solves
d_t h + b.grad h + sigma^2/2 lap h = 0 with h(., T) = delta_end. With tau = T - t and the Brownian
density k = N(end; x, sigma^2 tau), what remains of log h is smooth:

    log h = log k + A(x) + tau q(x, tau),
    A(x) = sigma^-2 int_0^1 b(x_s).(end - x) ds,  x_s = x + s (end - x),

where A and q(x, 0) are the first two terms of the expansion of a heat kernel in tau along straight
lines. `finite_differences` solves the nonlinear equation of log h for q, `kernel_convolutions` the
linear one of h. They share nothing but the drift.
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import NdBSpline
from scipy.linalg import solve_banded
from scipy.sparse import csr_array

from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.backward_grid import (
    Array,
    Grid,
    Problem,
    derivative,
    gradient,
    log_brownian,
    spline,
)

DIVERGED = 1e12  # a logarithm as large as that; NaN too
LINE_NODES = 48  # Gauss-Legendre points on the line from a node to the end
FLOOR = -345.0  # of log h below its largest value: products with the kernel stay normal numbers


def finite_differences(problem: Problem, grid: Grid) -> tuple[Array, Array]:
    """A [*points] and q [1 + slices, *points], q[0] at tau = 0.

    tau q =: z solves z_tau = sigma^2/2 (lap z + |grad z|^2) + (b + sigma^2 grad A + (end - x)/tau)
    .grad z + R with R = sigma^2/2 (lap A + |grad A|^2) + b.grad A. Central differences and, about
    the middle of each step, Newton's linearisation at the extrapolated z: Crank-Nicolson in 1-D,
    split along the axes in 2-D (Douglas 1962), second order in dx and dt, and extrapolated to
    fourth with a solution on every other node and step. Logarithms cannot underflow and are smooth
    where h spans hundreds of orders of magnitude. At the boundary z goes on linearly, which is
    harmless where b + a g points into the box.
    """
    variance, half_grid = problem.sigma**2, grid.every_other()
    action = grid.field(_action(problem, grid.nodes))
    slope, laplacian = gradient(grid, action), derivative(grid, action, 2).sum(0)
    drift = grid.field(problem.drift(grid.nodes))
    source = variance / 2 * (laplacian + (slope**2).sum(0)) + (drift * slope).sum(0)
    fields = np.stack([source, _mean_along_lines(problem, grid, source)])
    flow = drift + variance * slope

    fine = _march(problem, grid, flow, *fields)
    skip = (slice(None),) + (slice(None, None, 2),) * len(grid.points)
    coarse = _march(problem, half_grid, flow[skip], *fields[skip])
    excess = np.moveaxis(fine[skip] - coarse, 0, -1)
    correction = spline(half_grid, excess)(grid.nodes) / 3
    return action, fine + correction.T.reshape(fine.shape)


def _march(problem: Problem, grid: Grid, flow: Array, source: Array, begin: Array) -> Array:
    """q [1 + slices, *points] from q = begin at tau = 0 and in the first step."""
    half, dt, every = problem.sigma**2 / 2, problem.duration / grid.steps, grid.steps // grid.slices
    to_end = grid.field(np.array(problem.end) - grid.nodes)
    rate = np.empty((1 + grid.slices, *grid.points))
    rate[:2] = begin  # rate[1] stays if a slice is a step
    before, z = np.zeros(grid.points), dt * begin
    for step in range(1, grid.steps):
        grad = _central(grid, z + (z - before) / 2)
        velocity = flow + to_end / ((step + 0.5) * dt) + 2 * half * grad
        before, z = z, _douglas(grid, z, velocity, half, source - half * (grad**2).sum(0), dt)
        if not np.abs(z).max() < DIVERGED:
            raise ConfigError(
                f"the solution on the grid diverged at time {dt * (grid.steps - step - 1):.4g} "
                f"of {problem.duration:.4g}: raise points and steps, or cut those parts of its "
                f"box, {grid.lower} to {grid.upper}, that bridges do not visit"
            )
        if (step + 1) % every == 0:
            rate[(step + 1) // every] = z / ((step + 1) * dt)
    return rate


def _central(grid: Grid, z: Array) -> Array:
    """Central differences [d, *points], one-sided at the boundary as in `_tridiagonal`."""
    grad = np.gradient(z, *grid.spacing)
    return np.reshape(grad, (z.ndim, *z.shape))


def _action(problem: Problem, x: Array) -> Array:
    """A(x) [N] for x [N, d]."""
    nodes, weights = np.polynomial.legendre.leggauss(LINE_NODES)
    to_end = np.array(problem.end) - x
    total = np.zeros(len(x))
    for node, weight in zip((1 + nodes) / 2, weights / 2, strict=True):
        total += weight * (problem.drift(x + node * to_end) * to_end).sum(1)
    return total / problem.sigma**2


def _mean_along_lines(problem: Problem, grid: Grid, field: Array) -> Array:
    """The mean of a field on the line from the end to each node."""
    nodes, weights = np.polynomial.legendre.leggauss(LINE_NODES)
    end, interpolant = np.array(problem.end), spline(grid, field)
    total = np.zeros(len(grid.nodes))
    for node, weight in zip((1 + nodes) / 2, weights / 2, strict=True):
        total += weight * interpolant(end + node * (grid.nodes - end))
    return grid.field(total)


def _douglas(grid: Grid, z: Array, velocity: Array, half: float, source: Array, dt: float) -> Array:
    """One step of z_tau = half lap z + velocity.grad z + source."""
    operators = [
        _tridiagonal(np.moveaxis(v, axis, -1), half, dx)
        for axis, (v, dx) in enumerate(zip(velocity, grid.spacing, strict=True))
    ]
    parts = [
        np.moveaxis(_apply(bands, np.moveaxis(z, axis, -1)), -1, axis)
        for axis, bands in enumerate(operators)
    ]
    result = z + dt * (sum(parts) + source)
    for axis, (bands, part) in enumerate(zip(operators, parts, strict=True)):
        right = np.moveaxis(result - dt / 2 * part, axis, -1)
        result = np.moveaxis(_solve(bands, right, dt / 2), -1, axis)
    return result


def _tridiagonal(velocity: Array, half: float, dx: float) -> Array:
    """Bands (below, diagonal, above) [3, ..., n] along the last axis, with linear ends."""
    below, above = half / dx**2 - velocity / (2 * dx), half / dx**2 + velocity / (2 * dx)
    below[..., 0] = above[..., -1] = 0
    above[..., 0], below[..., -1] = velocity[..., 0] / dx, -velocity[..., -1] / dx
    return np.stack([below, -below - above, above])


def _apply(bands: Array, z: Array) -> Array:
    below, diagonal, above = bands
    result = diagonal * z
    result[..., 1:] += below[..., 1:] * z[..., :-1]
    result[..., :-1] += above[..., :-1] * z[..., 1:]
    return result


def _solve(bands: Array, right: Array, dt: float) -> Array:
    """(1 - dt L)^-1 right, all lines in one banded system without coupling between lines."""
    below, diagonal, above = (-dt * band.ravel() for band in bands)
    matrix = np.stack([np.roll(above, 1), 1 + diagonal, np.roll(below, -1)])
    return solve_banded((1, 1), matrix, right.ravel(), check_finite=False).reshape(right.shape)


def kernel_convolutions(problem: Problem, grid: Grid) -> Array:
    """log h [slices, *points] by Chapman-Kolmogorov; FLOOR below the largest is the least.

    A step is half a step of the drift's flow (a cubic spline of log h is read where the flow leads
    to), a Gaussian convolution (trapezoidal sums, matrices along the axes) and the other half: of
    second order (Strang 1968), and extrapolated from dt and dt/2 to fourth. h is zero outside of
    the box. The first step is exact for the delta: Phi N(., Phi^-1(end)) |det D Phi^-1(end)|.
    """
    substeps = grid.substeps
    coarse, fine = (_convolve(problem, grid, n) for n in (substeps, 2 * substeps))
    return (4 * fine - coarse) / 3


def _convolve(problem: Problem, grid: Grid, substeps: int) -> Array:
    dt = problem.duration / (grid.steps * substeps)
    variance = problem.sigma**2 * dt
    powers = (-((x[:, None] - x) ** 2) / (2 * variance) for x in grid.axes)
    kernels = [
        np.where(power > FLOOR, np.exp(power), 0) * (dx / np.sqrt(2 * np.pi * variance))
        for power, dx in zip(powers, grid.spacing, strict=True)
    ]
    ahead = np.clip(_flow(problem, grid.nodes, dt / 2), grid.lower, grid.upper)
    basis = NdBSpline.design_matrix(ahead, spline(grid, np.zeros(grid.points)).t, 3)
    # Its columns end at the last that is not empty.
    read = csr_array((basis.data, basis.indices, basis.indptr), shape=(len(ahead), len(ahead)))

    def drift_half(log_h: Array) -> Array:
        values = np.asarray(read @ spline(grid, log_h).c.ravel())
        return grid.field(values)

    source, log_volume = _preimage(problem, dt / 2)
    begin = Problem(problem.drift, problem.sigma, tuple(source), problem.duration)
    log_h = grid.field(log_brownian(begin, ahead, dt)) + log_volume
    every = grid.steps * substeps // grid.slices
    kept = []
    for step in range(1, grid.steps * substeps + 1):
        if step > 1:
            log_h = drift_half(log_h)
            top = log_h.max()
            h = kernels[0] @ np.exp(np.maximum(log_h - top, FLOOR))
            if len(kernels) == 2:
                h = h @ kernels[1]  # symmetric
            log_h = drift_half(np.log(np.maximum(h, np.exp(FLOOR))) + top)
        if step % every == 0:
            kept.append(log_h)
    return np.stack(kept)


def _flow(problem: Problem, x: Array, dt: float, stiffness: float = 0.1) -> Array:
    """Where dx/dt = b(x) leads to in dt, by Runge-Kutta steps that move by |grad b| dt < 0.1."""
    shift = 1e-4
    change = max(
        float(np.abs(problem.drift(x + e) - problem.drift(x - e)).max() / (2 * shift))
        for e in shift * np.eye(x.shape[1])
    )
    count = max(1, int(np.ceil(abs(dt) * change / stiffness)))
    step = dt / count
    for _ in range(count):
        one = problem.drift(x)
        two = problem.drift(x + step / 2 * one)
        three = problem.drift(x + step / 2 * two)
        x = x + step / 6 * (one + 2 * two + 2 * three + problem.drift(x + step * three))
    return x


def _preimage(problem: Problem, dt: float) -> tuple[Array, float]:
    """The point from where the flow reaches the end in dt, and log |det D| of that inverse."""
    end, shift = np.array(problem.end), 1e-4
    around = np.concatenate(
        [end[None], end + shift * np.eye(len(end)), end - shift * np.eye(len(end))]
    )
    back = _flow(problem, around, -dt)
    jacobian = (back[1 : 1 + len(end)] - back[1 + len(end) :]) / (2 * shift)
    return back[0], float(np.log(abs(np.linalg.det(jacobian))))
