"""Samplers over a grid of noise levels; the state is float64, the network sees float32."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cdm_ray.processes.edm import Step, ode_slope
from cdm_ray.processes.rollout import rollout
from cdm_ray.randomness import BlockRng

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""D(x [N, ...], sigma [N]) -> [N, ...], labels closed over."""


def _in_float64(denoiser: Denoiser) -> Denoiser:
    def wrapped(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return denoiser(x.float(), sigma.float().expand(x.shape[0])).double()

    return wrapped


@torch.no_grad()
def sample_ode(denoiser: Denoiser, latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Heun's method on the probability-flow ODE, Euler to sigma 0 (EDM, algorithm 1).

    latents [N, ...] standard normal, sigmas [K + 1] decreasing to 0 (`karras_sigmas`); returns
    float64 samples. 2 K - 1 network evaluations.
    """
    denoise = _in_float64(denoiser)
    sigmas = sigmas.to(latents.device, torch.float64)
    x = latents.double() * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = ode_slope(x, denoise(x, sigma), sigma)
        euler = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = ode_slope(euler, denoise(euler, sigma_next), sigma_next)
            x = x + (sigma_next - sigma) * (slope + slope_next) / 2
        else:
            x = euler
    return x


@torch.no_grad()
def sample_sde(
    denoiser: Denoiser, latents: torch.Tensor, sigmas: torch.Tensor, step: Step, rng: BlockRng
) -> torch.Tensor:
    """The reverse SDE by a step of REVERSE_STEPS; arguments as sample_ode. K evaluations."""
    sigmas = sigmas.to(latents.device, torch.float64)
    return rollout(
        _in_float64(denoiser),
        step,
        latents.double() * sigmas[0],
        sigmas,
        lambda: rng.normal(*latents.shape).double(),
    )
