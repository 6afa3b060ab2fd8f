"""Stochastic solvers: those of the reverse SDE, and EDM's, which adds noise and solves the ODE.

A step to 0 returns D without noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from torch import Tensor

from cdm_ray.processes.edm import REVERSE_STEPS
from cdm_ray.processes.rollout import DrawNoise, Field, Step, path
from cdm_ray.samplers.ode import heun_step
from cdm_ray.samplers.solver import Solver


def reverse_sde(name: str) -> Solver:
    """Reverse SDE by a step of `REVERSE_STEPS`, one evaluation each; order 1.

    To return D at the end is what the ancestral step to 0 does, and spares Euler-Maruyama's its
    last noise.
    """
    return Solver(
        name,
        partial(_reverse_sde_path, REVERSE_STEPS[name]),
        evaluations_per_step=1,
        stochastic=True,
        order=1,
    )


def _reverse_sde_path(
    step: Step, denoise: Field, x: Tensor, sigmas: Tensor, draw_noise: DrawNoise
) -> Iterator[Tensor]:
    to_zero = bool(sigmas[-1] == 0)
    times = sigmas[:-1] if to_zero else sigmas
    for state in path(denoise, step, x, times, draw_noise):
        x = state
        yield x
    if to_zero:
        yield denoise(x, times[-1])


def churn(
    amount: float = 40.0, low: float = 0.05, high: float = 50.0, noise_scale: float = 1.003
) -> Solver:
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2): before each of the K steps from a
    level in [`low`, `high`], noise raises sigma by a share min(`amount`/K, sqrt(2) - 1), then
    Heun's step goes down from there.

    In their names S_churn, S_tmin, S_tmax and S_noise; the defaults are theirs for ImageNet
    (table 5). Order 2, of the law of the states with `noise_scale` 1. Where nothing is added, which
    is everywhere with `amount` 0, a step is Heun's to the last bit and draws no noise.
    """
    settings = partial(_churn_path, amount, low, high, noise_scale)
    return Solver("churn", settings, evaluations_per_step=2, stochastic=True, order=2)


def _churn_path(
    amount: float,
    low: float,
    high: float,
    noise_scale: float,
    denoise: Field,
    x: Tensor,
    sigmas: Tensor,
    draw_noise: DrawNoise,
) -> Iterator[Tensor]:
    levels = sigmas.tolist()
    share = min(amount / (len(levels) - 1), math.sqrt(2) - 1)
    for place, level in enumerate(levels[:-1]):
        sigma = sigmas[place]
        if share > 0 and low <= level <= high:
            # sigma_hat^2 - sigma^2 with sigma_hat = (1 + share) sigma
            x = x + noise_scale * level * math.sqrt(share * (2 + share)) * draw_noise()
            sigma = sigma * (1 + share)
        x = heun_step(denoise, x, sigma, sigmas[place + 1], to_zero=levels[place + 1] == 0)
        yield x
