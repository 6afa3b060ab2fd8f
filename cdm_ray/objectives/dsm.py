"""Denoising score matching as in EDM (Karras et al. 2022, table 1 and equation 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cdm_ray.processes.edm import spread
from cdm_ray.randomness import BlockRng

if TYPE_CHECKING:
    from cdm_ray.config import DSMConfig


def draw_noise_levels(config: DSMConfig, count: int, rng: BlockRng) -> Tensor:
    """sigma [count], ln sigma ~ N(p_mean, p_std^2)."""
    return torch.exp(config.p_mean + config.p_std * rng.normal(count))


def add_noise(images: Tensor, sigma: Tensor, rng: BlockRng) -> Tensor:
    """images [N, ...] plus noise of standard deviation sigma [N]."""
    return images + spread(sigma, images) * rng.normal(*images.shape)


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """w(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def denoising_loss(denoised: Tensor, images: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """w(sigma) |D - image|^2 summed over everything but the batch, [N]."""
    return edm_weight(sigma, sigma_data) * ((denoised - images) ** 2).flatten(1).sum(1)
