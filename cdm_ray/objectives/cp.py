"""The Consistency Property of denoisers (Daras et al. 2023, Consistent Diffusion Models,
arXiv 2302.09057): along the model's own reverse SDE the denoiser is a martingale,
E[D(x'; sigma') | x] = D(x; sigma) for sigma' < sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cdm_ray.errors import ConfigError
from cdm_ray.networks.dropout import Dropout
from cdm_ray.objectives.consistency import LEARNING_SIDES, product, regress
from cdm_ray.objectives.dsm import edm_weight
from cdm_ray.processes.edm import REVERSE_STEPS, rho_levels
from cdm_ray.processes.rollout import rollout
from cdm_ray.randomness import BlockRng

if TYPE_CHECKING:
    from cdm_ray.config import CPConfig

RHO = 7.0
"""Spacing of the levels inside a rollout (Karras et al. 2022, equation 5)."""
ROLLOUTS = {"product": 2, "regress": 1}
"""Independent rollouts per image that each estimator needs."""
Denoiser = Callable[..., Tensor]
"""model(x, sigma, class_labels=..., augment_labels=...) -> D, with dropout=... if the configuration
asks for it."""


def forward_units(config: CPConfig) -> float:
    """Cost of a training image, denoising score matching included: a forward pass counts 1, one
    with its backward pass 3."""
    if config.weight == 0:
        return 3.0
    end = 3 if LEARNING_SIDES[config.gradient].end else 1
    evaluated = config.rollout_steps - config.reuse_d0
    return 3 + config.fraction * ROLLOUTS[config.estimator] * (evaluated + end)


@dataclass(frozen=True)
class Starts:
    """Where rollouts may begin: the denoising step's rows, or some of them."""

    x: Tensor
    """Noisy images [n, ...]."""
    sigma: Tensor
    """Their noise levels [n]."""
    denoised: Tensor
    """D0 = D(x; sigma) of the live weights, with gradient; on rows that take part without
    dropout, unless `CPConfig.dropout` is set."""
    class_labels: Tensor | None
    augment_labels: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Starts:
        """`function` applied to every tensor."""
        labels, augment = self.class_labels, self.augment_labels
        return Starts(
            function(self.x),
            function(self.sigma),
            function(self.denoised),
            None if labels is None else function(labels),
            None if augment is None else function(augment),
        )


class ConsistencyProperty:
    """The loss of pairs (x at sigma, ends of own rollouts from x at sigma').

    The first rows of each block, a share `config.fraction`, take part. D0 is that of the denoising
    loss, so that it costs nothing; `reuse_d0` also makes it the first step of the rollouts, which
    is the same number again unless `rollout_model` drives them. Neither rollouts nor ends have
    dropout, unless `config.dropout` asks for it.

    `rollout_model`: the averaged network, for `config.rollout_weights=ema`.
    """

    def __init__(
        self, config: CPConfig, sigma_data: float, rollout_model: Denoiser | None = None
    ) -> None:
        if (config.rollout_weights == "ema") != (rollout_model is not None):
            raise ConfigError(
                f"cp.rollout_weights={config.rollout_weights} with"
                f"{'out' if rollout_model is None else ''} a rollout_model; "
                "pass the averaged network for ema, and only then"
            )
        self.config, self.sigma_data, self.rollout_model = config, sigma_data, rollout_model
        self.learning = LEARNING_SIDES[config.gradient]
        self.step = REVERSE_STEPS[config.step_kind]

    def rows_taking_part(self, n: int, blocks: int) -> int:
        """How many rows of each block take part in a batch of n."""
        rows = round(self.config.fraction * n / blocks)
        if rows == 0:
            raise ConfigError(
                f"cp.fraction={self.config.fraction} of {n // blocks} images per lane is none; "
                f"use at least {blocks / n:g}"
            )
        return rows

    def taking_part(self, n: int, rng: BlockRng) -> Tensor:
        """bool [n]: the rows that take part."""
        mask = torch.zeros(rng.blocks, n // rng.blocks, dtype=torch.bool, device=rng.device)
        mask[:, : self.rows_taking_part(n, rng.blocks)] = True
        return mask.flatten()

    def draw_ends(self, sigma: Tensor, rng: BlockRng) -> Tensor:
        """sigma' [m] <= sigma [m], at least sigma_min.

        A start at or below sigma_min gets sigma' = sigma: its pair is a single point, with loss
        and gradient 0.
        """
        drop = (1 - rng.uniform(len(sigma))) * self.config.window
        if self.config.window_kind == "relative":
            drop = drop * sigma
        return torch.minimum((sigma - drop).clamp(min=self.config.sigma_min), sigma)

    def __call__(self, model: Denoiser, starts: Starts, rng: BlockRng) -> Tensor:
        """Loss of each row that takes part, [m], summed over C, H, W; `starts` is the whole batch.

        The draws are the blocks' own: sigma', then the noise of each step, rollout by rollout.
        """
        rows = self.rows_taking_part(len(starts.x), rng.blocks)
        starts = starts.map(lambda t: t.unflatten(0, (rng.blocks, -1))[:, :rows].flatten(0, 1))
        sigma_end = self.draw_ends(starts.sigma, rng)
        ends = self._denoised_ends(model, starts, sigma_end, rng)
        d0 = self.learning.at_start(starts.denoised)
        values = product(d0, *ends) if self.config.estimator == "product" else regress(d0, *ends)
        if self.config.sigma_weight == "edm":
            values = values * edm_weight(starts.sigma, self.sigma_data)
        return values

    def _denoised_ends(
        self, model: Denoiser, starts: Starts, sigma_end: Tensor, rng: BlockRng
    ) -> tuple[Tensor, ...]:
        """D at the ends of independent rollouts, one network call for all."""
        config, copies = self.config, ROLLOUTS[self.config.estimator]

        def repeat(t: Tensor) -> Tensor:
            """The copies of a block's rows stay in the block, whose random numbers they get."""
            return torch.cat([t.unflatten(0, (rng.blocks, -1))] * copies, dim=1).flatten(0, 1)

        begin = starts.map(repeat)
        times = rho_levels(begin.sigma, repeat(sigma_end), config.rollout_steps + 1, RHO)
        times = times.to(begin.sigma.dtype)
        driver = model if self.rollout_model is None else self.rollout_model

        given: dict[str, Any] = {
            "class_labels": begin.class_labels,
            "augment_labels": begin.augment_labels,
        }
        if config.dropout:
            given["dropout"] = Dropout(rng)

        def denoise(network: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
            return network(x, sigma, **given)

        with torch.no_grad():
            x = rollout(
                lambda x, sigma: denoise(driver, x, sigma),
                self.step,
                begin.x,
                times,
                lambda: rng.normal(*begin.x.shape),
                first_field=begin.denoised if config.reuse_d0 else None,
            )
        with self.learning.evaluating_end():
            ends = denoise(model, x, times[-1])
        apart = ends.unflatten(0, (rng.blocks, copies, -1)).unbind(1)
        return tuple(end.flatten(0, 1) for end in apart)
