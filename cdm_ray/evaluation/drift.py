"""Drift diagnostics: does the model believe its own samples as it believes noised data?

Two questions, asked at noise levels from about 0.02 to 20:

- CP residual: along the model's own reverse SDE the denoiser should be a martingale (Daras et al.
  2023). From a state at sigma, two independent samples of D after a rollout down to sigma/2, each
  the mean over an antithetic pair of rollouts, give the unbiased estimate (D1 - D0).(D2 - D0) of
  |E[D'] - D0|^2, here per dimension; it scatters around 0 for an exact denoiser. The steps of the
  rollouts have an error of their own: what shrinks when there are more steps is not the model's.
  Asked of noised data and of the states of the SDE sampler.
- Norm of the predicted noise (x - D)/sigma per sqrt(dimension), in the states of each sampler and
  in noised data: equal if the states are where the training data were.

All values are kept per image until the end, so that any split over tasks gives the same numbers and
standard errors are those of independent images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_ray.config import ImageConfig, SamplerConfig
from cdm_ray.evaluation.estimate import Array, Estimate
from cdm_ray.evaluation.generate import (
    KINDS,
    Kind,
    bind_labels,
    draw_start,
    from_uint8,
    noise_levels,
    sampler_states,
    to_uint8,
)
from cdm_ray.evaluation.reference import LabelledImages
from cdm_ray.objectives.consistency import product
from cdm_ray.processes.edm import ancestral_step, rho_levels
from cdm_ray.processes.rollout import Field, rollout
from cdm_ray.randomness import BlockRng, generator

STEP_COUNTS = (1, 4)
"""Steps of the rollouts; the residual of tables is that of the last."""
SIGMA_RATIO = 0.5
"""Rollouts go from sigma to this share of it, whatever window the training used."""
LOWEST, HIGHEST = 0.02, 20.0
_RHO = 7.0
_STREAM = {"data": 2, "sde": 3}
"""First part of the seeds of the noise drawn here; 0 is training's, 1 the samplers'."""

Source = Kind | Literal["data"]
SOURCES: tuple[Source, ...] = ("ode", "sde", "data")


@dataclass(frozen=True)
class DriftPart:
    """Values of some images, float64 [N, levels] each.

    `residuals` by number of rollout steps, at the levels of the SDE sampler; `norms` by the sampler
    whose levels they were taken at.
    """

    residuals: dict[int, Array] = field(default_factory=dict)
    norms: dict[Kind, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Drift:
    """All values of one evaluation: the levels of each sampler, and values by where the states came
    from, a sampler or noised data."""

    sigmas: dict[Kind, Array]
    parts: dict[Source, DriftPart]

    @property
    def cp_residual(self) -> Estimate:
        """The CP residual in one number: mean over the noise levels, along own SDE samples, per
        dimension, with the larger number of rollout steps. 0 for an exact denoiser. Comparable
        between models that were sampled with the same noise levels."""
        return _scalar(self.parts["sde"])

    @property
    def cp_residual_on_data(self) -> Estimate:
        """The same on noised data."""
        return _scalar(self.parts["data"])

    def curves(self) -> dict[str, Any]:
        """Noise levels, means, standard errors and counts of everything, for JSON."""
        return {
            "sigmas": {kind: sigmas.tolist() for kind, sigmas in self.sigmas.items()},
            "cp_residual_per_dimension": {
                f"{source} states, {steps} steps": Estimate.of(values).to_json("images")
                for source, part in self.parts.items()
                for steps, values in part.residuals.items()
            },
            "predicted_noise_norm": {
                f"{source} states, {kind} levels": Estimate.of(values).to_json("images")
                for source, part in self.parts.items()
                for kind, values in part.norms.items()
            },
        }


def merge_parts(parts: Sequence[DriftPart]) -> DriftPart:
    """Parts of one source together, in order."""
    return DriftPart(
        {k: np.concatenate([part.residuals[k] for part in parts]) for k in parts[0].residuals},
        {k: np.concatenate([part.norms[k] for part in parts]) for k in parts[0].norms},
    )


def level_indices(config: ImageConfig, kind: Kind) -> list[int]:
    """Places in the sampler's noise levels that are nearest to `eval.drift_sigmas` levels evenly
    spaced in ln sigma from 0.02 to 20, as far as the sampler reaches; fewer if two are the same."""
    sigmas = noise_levels(config.sampler, kind)[:-1].numpy()
    wanted = np.geomspace(
        min(HIGHEST, sigmas[0]), max(LOWEST, sigmas[-1]), config.eval.drift_sigmas
    )
    nearest = np.abs(np.log(sigmas)[None] - np.log(wanted)[:, None]).argmin(axis=1)
    return np.unique(nearest).tolist()


def level_sigmas(config: ImageConfig, kind: Kind) -> Array:
    """The noise levels at `level_indices`, float64, decreasing."""
    return noise_levels(config.sampler, kind).numpy()[level_indices(config, kind)]


@torch.no_grad()
def generate_with_drift(
    network: nn.Module,
    config: ImageConfig,
    seeds: Sequence[int],
    label_dim: int,
    kind: Kind,
    device: torch.device | str,
    probed: int,
) -> tuple[Tensor, DriftPart]:
    """The images of `generate`, and the drift in the states that the first `probed` pass through.

    Norms for both samplers, residuals along the SDE, which CP speaks of.
    """
    start = draw_start(config, seeds, label_dim, device)
    labels = start.class_labels
    probe = _Probe(
        bind_labels(network, None if labels is None else labels[:probed]),
        _noise("sde", seeds[:probed], device),
        config.sampler,
    )
    levels = dict(zip(level_indices(config, kind), level_sigmas(config, kind), strict=True))
    norms, residuals = [], []
    denoiser = bind_labels(network, labels)
    for place, state in enumerate(sampler_states(denoiser, start, config.sampler, kind)):
        if place in levels:
            x, sigma = state[:probed].float(), float(levels[place])
            norm, residual = probe(x, sigma, with_residuals=kind == "sde")
            norms.append(norm)
            residuals.append(residual)
    return to_uint8(state), DriftPart(_by_step_count(residuals), {kind: _table(norms)})


@torch.no_grad()
def drift_on_data(
    network: nn.Module,
    config: ImageConfig,
    real: LabelledImages,
    seeds: Sequence[int],
    label_dim: int,
    device: torch.device | str,
) -> DriftPart:
    """Residuals and norms on real images [N] noised once per level, with noise from `seeds` [N]."""
    clean = from_uint8(real.images.to(device))
    labels = None
    if label_dim:
        assert real.labels is not None
        labels = F.one_hot(real.labels.to(device), label_dim).float()
    probe = _Probe(bind_labels(network, labels), _noise("data", seeds, device), config.sampler)
    norms: dict[Kind, list[Tensor]] = {kind: [] for kind in KINDS}
    residuals = []
    for kind in KINDS:
        for sigma in level_sigmas(config, kind).tolist():
            x = clean + sigma * probe.rng.normal(*clean.shape)
            norm, residual = probe(x, sigma, with_residuals=kind == "sde")
            norms[kind].append(norm)
            residuals.append(residual)
    return DriftPart(_by_step_count(residuals), {kind: _table(v) for kind, v in norms.items()})


@dataclass(frozen=True)
class _Probe:
    """Asks a denoiser about states, with noise of its own."""

    denoiser: Field
    rng: BlockRng
    sampler: SamplerConfig

    def __call__(
        self, x: Tensor, sigma: float, *, with_residuals: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Norm of the predicted noise per sqrt(dimension), and residuals, float64 [N] each."""
        denoised = _denoise(self.denoiser, x, sigma)
        predicted = (x.double() - denoised.double()) / sigma
        norm = predicted.flatten(1).square().mean(1).sqrt()
        if not with_residuals:
            return norm, {}
        sigma_end = max(SIGMA_RATIO * sigma, self.sampler.sigma_min)
        return norm, cp_residuals(self.denoiser, x, denoised, sigma, sigma_end, self.rng)


def cp_residuals(
    denoiser: Field,
    x: Tensor,
    denoised: Tensor,
    sigma: float,
    sigma_end: float,
    rng: BlockRng,
) -> dict[int, Tensor]:
    """Two-sample CP residual per dimension, float64 [N], for each of STEP_COUNTS.

    From x [N, C, H, W] at sigma, where D is `denoised`, by ancestral steps down to sigma_end.
    """
    ends = torch.tensor([sigma, sigma_end], dtype=torch.float64, device=x.device)
    found = {}
    for steps in STEP_COUNTS:
        times = rho_levels(ends[0], ends[1], steps + 1, _RHO)
        first, second = (_antithetic_mean(denoiser, x, denoised, times, rng) for _ in range(2))
        found[steps] = product(denoised.double(), first, second) / x[0].numel()
    return found


def _antithetic_mean(
    denoiser: Field, x: Tensor, denoised: Tensor, times: Tensor, rng: BlockRng
) -> Tensor:
    """Mean float64 [N, C, H, W] of D after a rollout and after the one with opposite noise.

    Its expectation is that of a single rollout, but what is odd in the noise, nearly all of the
    scatter, cancels.
    """
    noises = [rng.normal(*x.shape) for _ in times[1:]]
    after = []
    for sign in (1, -1):
        draws = iter([sign * noise for noise in noises])
        end = rollout(
            lambda x, sigma: denoiser(x, sigma.float()),
            ancestral_step,
            x,
            times,
            draws.__next__,
            first_field=denoised,
        )
        after.append(_denoise(denoiser, end, float(times[-1])).double())
    return (after[0] + after[1]) / 2


def _scalar(part: DriftPart) -> Estimate:
    return Estimate.of(part.residuals[STEP_COUNTS[-1]].mean(axis=1))


def _denoise(denoiser: Field, x: Tensor, sigma: float) -> Tensor:
    return denoiser(x, torch.tensor(sigma, dtype=torch.float32, device=x.device))


def _noise(source: str, seeds: Sequence[int], device: torch.device | str) -> BlockRng:
    return BlockRng([generator(_STREAM[source], seed, device=device) for seed in seeds])


def _by_step_count(levels: Sequence[dict[int, Tensor]]) -> dict[int, Array]:
    """Residuals of each level, where there are any, to [N, levels] by number of steps."""
    levels = [level for level in levels if level]
    return (
        {steps: _table(level[steps] for level in levels) for steps in levels[0]} if levels else {}
    )


def _table(columns: Iterable[Tensor]) -> Array:
    """Values [N] of each level to [N, levels]."""
    return torch.stack(list(columns), dim=1).cpu().numpy()
