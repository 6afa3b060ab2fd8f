"""Solvers of the probability-flow ODE dx/dsigma = (x - D)/sigma (Karras et al. 2022, equation 1).

All are deterministic and leave `draw_noise` alone. A step to 0 is Euler's, which ends on D: higher
orders would need D at 0, or an infinite step in log sigma.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from cdm_ray.processes.edm import ode_slope
from cdm_ray.processes.rollout import DrawNoise, Field


def euler_path(
    denoise: Field, x: Tensor, sigmas: Tensor, draw_noise: DrawNoise
) -> Iterator[Tensor]:
    """Euler's method, which on this process is DDIM (Song et al. 2021). Order 1."""
    del draw_noise
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (sigma_next - sigma) * ode_slope(x, denoise(x, sigma), sigma)
        yield x


def heun_path(denoise: Field, x: Tensor, sigmas: Tensor, draw_noise: DrawNoise) -> Iterator[Tensor]:
    """Heun's method (Karras et al. 2022, algorithm 1). Order 2."""
    del draw_noise
    to_zero = sigmas[1:].eq(0).tolist()
    for sigma, sigma_next, last in zip(sigmas[:-1], sigmas[1:], to_zero, strict=True):
        x = heun_step(denoise, x, sigma, sigma_next, to_zero=last)
        yield x


def heun_step(
    denoise: Field, x: Tensor, sigma: Tensor, sigma_next: Tensor, *, to_zero: bool
) -> Tensor:
    """One step of Heun's method, Euler's if it goes `to_zero`."""
    slope = ode_slope(x, denoise(x, sigma), sigma)
    x_next = x + (sigma_next - sigma) * slope
    if to_zero:
        return x_next
    slope_next = ode_slope(x_next, denoise(x_next, sigma_next), sigma_next)
    return x + (sigma_next - sigma) * (slope + slope_next) / 2


def dpmpp_2m_path(
    denoise: Field, x: Tensor, sigmas: Tensor, draw_noise: DrawNoise
) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), with alpha = 1. Order 2."""
    del draw_noise
    return _multistep_path(denoise, x, sigmas, order=2)


def dpmpp_3m_path(
    denoise: Field, x: Tensor, sigmas: Tensor, draw_noise: DrawNoise
) -> Iterator[Tensor]:
    """Third-order multistep DPM-Solver++ (after Lu et al. 2022), with alpha = 1. Order 3.

    The second derivative of D enters with the factor of its Taylor series. Widespread code has half
    of it, which leaves that solver with order 2. The two lower orders at the start cost nothing
    where sigma is far above the data, since D hardly changes there.
    """
    del draw_noise
    return _multistep_path(denoise, x, sigmas, order=3)


def _multistep_path(denoise: Field, x: Tensor, sigmas: Tensor, order: int) -> Iterator[Tensor]:
    """With l = -log sigma the ODE has the solution (Lu et al. 2022, proposition 4.1)

        x(l + h) = e^-h x(l) + int_0^h e^-(h - t) D(l + t) dt;

    D is continued from its values at the last `order` levels, as many as there are.
    """
    levels = sigmas.tolist()
    values: list[Tensor] = []  # D, the newest first, and -log sigma beside it
    places: list[float] = []
    for sigma, level, level_next in zip(sigmas[:-1], levels[:-1], levels[1:], strict=True):
        values = [denoise(x, sigma), *values][:order]
        places = [-math.log(level), *places][:order]
        if level_next == 0:  # e^-h = 0, and D cannot be continued to infinity
            x = values[0]
        else:
            h = -math.log(level_next) - places[0]
            x = level_next / level * x + _integral(values, places, h)
        yield x


def _integral(values: list[Tensor], places: list[float], h: float) -> Tensor:
    """int_0^h e^-(h - t) D(l + t) dt from D and l at up to three levels, the newest first."""
    weight = -math.expm1(-h)
    if len(values) == 1:
        return weight * values[0]
    back = places[0] - places[1]
    slope = (values[0] - values[1]) / back
    if len(values) == 2:
        return weight * (values[0] + h / 2 * slope)  # D in the middle of the step
    further = places[1] - places[2]
    half_curvature = (slope - (values[1] - values[2]) / further) / (back + further)
    slope = slope + back * half_curvature
    # int_0^h e^-(h - t) t^2 dt = h^2 - 2 (h - weight), for half the second derivative
    curved = h**2 - 2 * (h - weight)
    return weight * values[0] + (h - weight) * slope + curved * half_curvature
