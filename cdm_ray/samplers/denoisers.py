"""What a solver is given in place of a network."""

from __future__ import annotations

from torch import Tensor

from cdm_ray.processes.rollout import Field


def in_float32(denoiser: Field) -> Field:
    """The same for states and levels in float64: a network, which works in float32."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x.float(), sigma.float()).double()

    return denoise


def scale_epsilon(denoiser: Field, scale: float) -> Field:
    """The same with its predicted noise (x - D)/sigma divided by `scale`: D <- x - (x - D)/scale
    (Ning et al. 2024, Elucidating the exposure bias in diffusion models, epsilon scaling)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return x - (x - denoiser(x, sigma)) / scale

    return denoise
