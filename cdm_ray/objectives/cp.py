"""The Consistency Property (Daras et al. 2023): along the model's own reverse SDE the denoiser is a
martingale, `E[D(x_sigma'; sigma') | x_sigma] = D(x_sigma; sigma)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cdm_ray.config import CPConfig
from cdm_ray.objectives.consistency import product, regress
from cdm_ray.processes.edm import REVERSE_STEPS, rho_spacing
from cdm_ray.processes.rollout import rollout
from cdm_ray.randomness import BlockRng

GRID_RHO = 7.0
"""Spacing of the steps within a rollout, as in the released code."""

Denoiser = Callable[..., torch.Tensor]
"""D(x, sigma, class_labels, augment_labels) without dropout."""


@dataclass(frozen=True)
class Starts:
    """Noisy images from which rollouts start, and what the network says of them."""

    x: torch.Tensor
    """[M, C, H, W]"""
    sigma: torch.Tensor
    """[M]"""
    denoised: torch.Tensor
    """D0 = D(x; sigma) [M, C, H, W], without dropout."""
    class_labels: torch.Tensor | None = None
    augment_labels: torch.Tensor | None = None

    def labels(self, repeats: int = 1) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Labels for `repeats` copies of the images, one after the other."""
        both = (self.class_labels, self.augment_labels)
        cls, aug = (None if t is None else torch.cat([t] * repeats) for t in both)
        return cls, aug


def participants(rows: int, lanes: int, fraction: float, device: torch.device) -> torch.Tensor:
    """bool [rows]: the first `fraction` of each lane's rows. Their order in the stream is random,
    so that is a random share of the images."""
    per_lane = rows // lanes
    taken = torch.arange(per_lane, device=device) < round(fraction * per_lane)
    return taken.repeat(lanes)


def lower_sigma(cp: CPConfig, sigma: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """sigma' [M] below sigma [M] for uniform [M] in [0, 1).

    Floored at cp.sigma_min; where sigma itself is below that, sigma' = sigma: a pair of no length,
    whose loss is 0.
    """
    share = 1 - uniform  # (0, 1]
    down = share * cp.window * (sigma if cp.window_kind == "relative" else 1.0)
    return torch.minimum((sigma - down).clamp(min=cp.sigma_min), sigma)


def simulate(
    denoiser: Denoiser,
    starts: Starts,
    sigma_next: torch.Tensor,
    cp: CPConfig,
    rng: BlockRng,
) -> torch.Tensor:
    """Ends [M, C, H, W] at sigma_next [M] of one rollout from each start. No gradient."""
    times = rho_spacing(starts.sigma, sigma_next, cp.rollout_steps, GRID_RHO)
    with torch.no_grad():
        return rollout(
            lambda x, sigma: denoiser(x, sigma, *starts.labels()),
            REVERSE_STEPS[cp.step_kind],
            starts.x,
            times,
            lambda: rng.normal(*starts.x.shape),
            first_field=starts.denoised.detach() if cp.reuse_d0 else None,
        )


def residual(
    denoiser: Denoiser,
    starts: Starts,
    sigma_next: torch.Tensor,
    cp: CPConfig,
    rng: BlockRng,
    *,
    rollout_denoiser: Denoiser | None = None,
) -> torch.Tensor:
    """CP loss [M], summed over C, H, W: of `cp.estimator`, with the gradient of `cp.gradient`.

    With the product estimator its mean is the squared CP gap of the rollout's own transition.
    """
    driver = rollout_denoiser or denoiser
    paths = 2 if cp.estimator == "product" else 1
    ends = torch.cat([simulate(driver, starts, sigma_next, cp, rng) for _ in range(paths)])
    # One call for both ends; where they do not learn, no graph is built.
    with torch.set_grad_enabled(torch.is_grad_enabled() and cp.gradient != "high"):
        denoised = denoiser(ends, torch.cat([sigma_next] * paths), *starts.labels(paths))
    if cp.estimator == "regress":
        return regress(starts.denoised, denoised)
    end_1, end_2 = denoised.chunk(2)
    return product(starts.denoised, end_1, end_2, cp.gradient)


def forward_units(cp: CPConfig) -> float:
    """Cost of a training step per image in forward passes, forward + backward counting 3.

    Denoising score matching alone costs 3.
    """
    if cp.weight == 0:
        return 3.0
    paths = 2 if cp.estimator == "product" else 1
    rollouts = paths * (cp.rollout_steps - cp.reuse_d0)
    ends = paths * (1 if cp.gradient == "high" else 3)
    return 3 + cp.fraction * (rollouts + ends)
