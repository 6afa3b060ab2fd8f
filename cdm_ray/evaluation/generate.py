"""Images from seeds: one generator per image, so that how they are batched changes nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_ray.config import ImageConfig, SamplerConfig
from cdm_ray.processes.edm import karras_sigmas
from cdm_ray.processes.rollout import Field
from cdm_ray.randomness import BlockRng
from cdm_ray.samplers import SOLVERS, Solver, churn, in_float32, scale_epsilon

Kind = Literal["ode", "sde"]
KINDS: tuple[Kind, ...] = ("ode", "sde")


@dataclass(frozen=True)
class Start:
    """What the seeds determine: standard normal latents [N, C, H, W], one-hot labels [N, K] or
    None, and the generators, one per image, ready to draw on."""

    latents: Tensor
    class_labels: Tensor | None
    rng: BlockRng


def draw_start(
    config: ImageConfig, seeds: Sequence[int], label_dim: int, device: torch.device | str
) -> Start:
    """Latents, then a uniformly drawn class if `label_dim` > 0, from each seed's own generator."""
    rng = BlockRng.for_images(seeds, device)
    size = config.data.resolution
    latents = rng.normal(len(seeds), config.data.channels, size, size)
    if label_dim == 0:
        return Start(latents, None, rng)
    drawn = (rng.uniform(len(seeds)) * label_dim).long().clamp(max=label_dim - 1)
    return Start(latents, F.one_hot(drawn, label_dim).float(), rng)


def bind_labels(network: nn.Module, class_labels: Tensor | None) -> Field:
    """D(x, sigma) of a network with the labels fixed; no dropout."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return network(x, sigma, class_labels)

    return denoiser


def configured_solver(config: SamplerConfig, kind: Kind) -> Solver:
    """The solver of the ODE or of the SDE that is configured."""
    name = config.ode_solver if kind == "ode" else config.sde_solver
    if name == "churn":
        return churn(config.churn, config.churn_min, config.churn_max, config.churn_noise)
    return SOLVERS[name]


def noise_levels(config: SamplerConfig, kind: Kind) -> Tensor:
    """Noise levels of the sampler, float64, from sigma_max down to sigma_min, then 0."""
    return karras_sigmas(_steps(config, kind), config.sigma_min, config.sigma_max, config.rho)


def num_evaluations(config: SamplerConfig, kind: Kind) -> int:
    """Network evaluations per image."""
    return configured_solver(config, kind).evaluations(_steps(config, kind), ends_at_zero=True)


def _steps(config: SamplerConfig, kind: Kind) -> int:
    return config.ode_steps if kind == "ode" else config.sde_steps


@torch.no_grad()
def sampler_states(
    denoiser: Field, start: Start, config: SamplerConfig, kind: Kind
) -> Iterator[Tensor]:
    """States float64 [N, C, H, W] of the sampler at all of `noise_levels`, one by one, the latents
    first and the image last.

    `denoiser`(x, sigma) is a network's, float32. Its predicted noise is divided by
    `config.epsilon_scale`.
    """
    denoise = in_float32(denoiser)
    if config.epsilon_scale != 1:
        denoise = scale_epsilon(denoise, config.epsilon_scale)
    sigmas = noise_levels(config, kind).to(start.latents.device)
    x = start.latents.double() * sigmas[0]

    def draw_noise() -> Tensor:
        return start.rng.normal(*x.shape).double()

    yield x
    yield from configured_solver(config, kind).path(denoise, x, sigmas, draw_noise)


@torch.no_grad()
def generate(
    network: nn.Module,
    config: ImageConfig,
    seeds: Sequence[int],
    label_dim: int,
    kind: Kind,
    device: torch.device | str,
) -> Tensor:
    """Images uint8 [N, C, H, W] of the seeds, by the ODE or the SDE solver of `config.sampler`.

    A seed's image does not depend on the other seeds. It does depend on the kind of device, since
    every kind has its own random numbers.
    """
    start = draw_start(config, seeds, label_dim, device)
    denoiser = bind_labels(network, start.class_labels)
    (image,) = deque(sampler_states(denoiser, start, config.sampler, kind), maxlen=1)
    return to_uint8(image)


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8, rounded and clipped as a PNG of them would be.

    Raises FloatingPointError for values that are no numbers: they would pass for black.
    """
    broken = (~x.isfinite()).flatten(1).any(1).sum().item()
    if broken:
        raise FloatingPointError(
            f"{broken} of {len(x)} generated images are not finite: the weights have diverged"
        )
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Images uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
