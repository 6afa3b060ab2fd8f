"""The objective of image training: denoising score matching and, with a weight, consistency."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cdm_ray.networks.dropout import Dropout
from cdm_ray.objectives.base import ImageBatch, Term
from cdm_ray.objectives.cp import ConsistencyProperty, Denoiser, Starts
from cdm_ray.objectives.dsm import add_noise, denoising_loss, draw_noise_levels
from cdm_ray.randomness import BlockRng

if TYPE_CHECKING:
    from cdm_ray.config import CPConfig, DSMConfig


class ImageObjective:
    """Terms `dsm` and, if cp.weight > 0, `cp` of a batch of images.

    One network pass over the batch serves both terms; the images that take part in consistency go
    through it without dropout, unless `cp.dropout` is set. `rollout_model` is the averaged network
    for cp.rollout_weights=ema.
    """

    def __init__(
        self,
        dsm: DSMConfig,
        cp: CPConfig,
        sigma_data: float,
        rollout_model: Denoiser | None = None,
    ) -> None:
        self.dsm, self.cp, self.sigma_data = dsm, cp, sigma_data
        self.consistency = (
            ConsistencyProperty(cp, sigma_data, rollout_model) if cp.weight > 0 else None
        )

    def __call__(
        self, model: Any, batch: ImageBatch, rng: BlockRng, samples_seen: int
    ) -> dict[str, Term]:
        """Sums over the samples of the batch; a sample's share depends on its lane's numbers only.

        `model` is called as EDMPrecond is. Noise levels, noise and dropout masks are drawn first
        and do not depend on cp.
        """
        images, n = batch.images, len(batch.images)
        sigma = draw_noise_levels(self.dsm, n, rng)
        # Input perturbation: the network is told less noise than there is (Ning et al. 2023).
        x = add_noise(images, sigma * math.sqrt(1 + self.dsm.input_perturbation**2), rng)
        dropped = None
        if self.consistency is not None and not self.cp.dropout:
            dropped = ~self.consistency.taking_part(n, rng)
        denoised = model(
            x,
            sigma,
            class_labels=batch.class_labels,
            augment_labels=batch.augment_labels,
            dropout=Dropout(rng, dropped),
        )
        loss = denoising_loss(denoised, images, sigma, self.sigma_data)
        terms = {"dsm": Term(loss.sum(), 1.0)}
        if self.consistency is not None:
            starts = Starts(x, sigma, denoised, batch.class_labels, batch.augment_labels)
            pairs = self.consistency(model, starts, rng)
            # scaled up to the whole batch, whose mean the mean over the pairs estimates
            terms["cp"] = Term(pairs.sum() * (n / len(pairs)), self._weight(samples_seen))
        return terms

    def _weight(self, samples_seen: int) -> float:
        if self.cp.warmup_images == 0:
            return self.cp.weight
        return self.cp.weight * min(1.0, samples_seen / self.cp.warmup_images)
