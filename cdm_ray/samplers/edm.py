"""Deterministic and stochastic sampling of EDM denoisers."""

from __future__ import annotations

import torch
from torch import Tensor

from cdm_ray.processes.edm import ode_slope
from cdm_ray.processes.rollout import Field, Step, rollout
from cdm_ray.randomness import BlockRng


@torch.no_grad()
def sample_ode(denoiser: Field, latents: Tensor, sigmas: Tensor) -> Tensor:
    """Heun's second-order method for the probability-flow ODE, Euler where a step ends at 0
    (Karras et al. 2022, algorithm 1).

    `denoiser`(x, sigma) is called in float32 with a 0-dim sigma; the state is float64, as is the
    result [N, ...]. `latents` [N, ...] standard normal; `sigmas` [K + 1] decreasing, its end
    usually 0. Evaluations: two per step, one for a step to 0.
    """
    denoise = _in_float32(denoiser)
    sigmas = sigmas.to(latents.device, torch.float64)
    x = latents.double() * sigmas[0]
    ends_at_zero = sigmas[1:].eq(0).tolist()
    for sigma, sigma_next, last in zip(sigmas[:-1], sigmas[1:], ends_at_zero, strict=True):
        slope = ode_slope(x, denoise(x, sigma), sigma)
        x_next = x + (sigma_next - sigma) * slope
        if not last:
            slope_next = ode_slope(x_next, denoise(x_next, sigma_next), sigma_next)
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


@torch.no_grad()
def sample_sde(
    denoiser: Field, latents: Tensor, sigmas: Tensor, step: Step, rng: BlockRng
) -> Tensor:
    """Reverse SDE by a step of REVERSE_STEPS, arguments and result as in `sample_ode`.

    `rng` draws the noise: with one generator per image (`BlockRng.for_images`) an image does not
    depend on the batch that it is in. The step to 0, if `sigmas` ends there, returns D, which is
    what the ancestral step does and spares Euler-Maruyama's its last noise. Evaluations: one per
    step.
    """
    denoise = _in_float32(denoiser)
    sigmas = sigmas.to(latents.device, torch.float64)
    to_zero = bool(sigmas[-1] == 0)
    times = sigmas[:-1] if to_zero else sigmas

    def draw_noise() -> Tensor:
        return rng.normal(*latents.shape).double()

    x = rollout(denoise, step, latents.double() * sigmas[0], times, draw_noise)
    return denoise(x, times[-1]) if to_zero else x


def _in_float32(denoiser: Field) -> Field:
    return lambda x, sigma: denoiser(x.float(), sigma.float()).double()
