"""Images from seeds: one generator per image, so that how they are batched changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_ray.config import ImageConfig, SamplerConfig
from cdm_ray.processes.edm import REVERSE_STEPS, karras_sigmas
from cdm_ray.processes.rollout import Field
from cdm_ray.randomness import BlockRng
from cdm_ray.samplers.edm import sample_ode, sample_sde

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


def noise_levels(config: SamplerConfig, kind: Kind) -> Tensor:
    """Noise levels of the sampler, float64, from sigma_max down to sigma_min, then 0."""
    steps = config.ode_steps if kind == "ode" else config.sde_steps
    return karras_sigmas(steps, config.sigma_min, config.sigma_max, config.rho)


def num_evaluations(config: SamplerConfig, kind: Kind) -> int:
    """Network evaluations per image: Heun evaluates twice per step but the last."""
    return 2 * config.ode_steps - 1 if kind == "ode" else config.sde_steps


def sampler_states(
    denoiser: Field, start: Start, config: SamplerConfig, kind: Kind, stops: Sequence[int] = ()
) -> Iterator[Tensor]:
    """States float64 [N, C, H, W] of the sampler at the levels `stops`, then the image at 0.

    `stops` are increasing places in `noise_levels`; they do not change the path.
    """
    sigmas = noise_levels(config, kind).to(start.latents.device)
    state, place = start.latents.double() * sigmas[0], 0
    for stop in (*stops, len(sigmas) - 1):
        latents, piece = state / sigmas[place], sigmas[place : stop + 1]
        if kind == "ode":
            state = sample_ode(denoiser, latents, piece)
        else:
            step = REVERSE_STEPS[config.sde_step]
            state = sample_sde(denoiser, latents, piece, step, start.rng)
        place = stop
        yield state


@torch.no_grad()
def generate(
    network: nn.Module,
    config: ImageConfig,
    seeds: Sequence[int],
    label_dim: int,
    kind: Kind,
    device: torch.device | str,
) -> Tensor:
    """Images uint8 [N, C, H, W] of the seeds, by the ODE (Heun) or the SDE of `config.sampler`.

    A seed's image does not depend on the other seeds. It does depend on the kind of device, since
    every kind has its own random numbers.
    """
    start = draw_start(config, seeds, label_dim, device)
    denoiser = bind_labels(network, start.class_labels)
    (image,) = sampler_states(denoiser, start, config.sampler, kind)
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
