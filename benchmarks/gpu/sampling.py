"""Sampling with the package's Heun solver."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.settings import RHO, SIGMA_RANGE, Sizes
from cdm_ray.processes.edm import karras_sigmas
from cdm_ray.randomness import BlockRng
from cdm_ray.samplers import SOLVERS, in_float32


def heun_run(
    denoiser: Callable[..., Tensor], sizes: Sizes, count: int, device: torch.device
) -> Callable[[], Tensor]:
    """A call that makes the first `count` images, float64, the same ones each time."""
    sigmas = karras_sigmas(sizes.sample_steps, *SIGMA_RANGE, RHO).to(device)
    rng = BlockRng.for_images(range(count), device)
    shape = (count, sizes.channels, sizes.resolution, sizes.resolution)
    start = rng.normal(*shape).double() * sigmas[0]

    @torch.no_grad()
    def run() -> Tensor:
        return SOLVERS["heun"].sample(
            in_float32(denoiser), start, sigmas, lambda: rng.normal(*shape).double()
        )

    return run


def heun_evaluations(sizes: Sizes) -> int:
    """Network evaluations per image."""
    return SOLVERS["heun"].evaluations(sizes.sample_steps, ends_at_zero=True)


def relative_error(images: Tensor, truth: Tensor) -> float:
    return float((images - truth).norm() / truth.norm())
