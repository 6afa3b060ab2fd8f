"""Denoising score matching (DSM), with or without the Consistency Property (CP)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cdm_ray.config import CPConfig, DSMConfig
from cdm_ray.networks.dropout import Dropout
from cdm_ray.objectives.base import ImageBatch, Term
from cdm_ray.objectives.cp import Starts, lower_sigma, participants, residual
from cdm_ray.processes.edm import over_images
from cdm_ray.randomness import BlockRng


def edm_weight(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """`(sigma^2 + sd^2) / (sigma sd)^2`: gives every noise level the same initial loss (EDM,
    table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


class ImageObjective:
    """Terms `dsm` and, if cp.weight > 0, `cp`, each a sum over the images of the batch.

    DSM: `w(sigma) |D(y + sigma n; sigma) - y|^2` summed over C, H, W, ln sigma normal (EDM,
    equation 2). CP: objectives.cp, on a share of the images; its sum is divided by that share.
    The network is called as in networks.EDMPrecond. `rollout_model` drives the rollouts instead of
    the model itself.
    """

    def __init__(
        self,
        dsm: DSMConfig,
        cp: CPConfig,
        sigma_data: float,
        rollout_model: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.dsm = dsm
        self.cp = cp
        self.sigma_data = sigma_data
        self.rollout_model = rollout_model

    def __call__(
        self,
        model: Callable[..., torch.Tensor],
        batch: ImageBatch,
        rng: BlockRng,
        images_seen: int,
    ) -> dict[str, Term]:
        """Terms of one micro-batch, whose lanes are the blocks of `rng`."""
        clean = batch.images
        n = clean.shape[0]
        sigma = (rng.normal(n) * self.dsm.p_std + self.dsm.p_mean).exp()
        x = clean + over_images(sigma, clean) * rng.normal(*clean.shape)
        taking_part = None
        if self.cp.weight > 0:
            taking_part = participants(n, rng.blocks, self.cp.fraction, clean.device)
        # D0 of an image that takes part is one of CP's fields: dropout would bias its product.
        active = None if taking_part is None else ~taking_part
        denoised = model(
            x, sigma, batch.class_labels, batch.augment_labels, dropout=Dropout(rng, active)
        )
        weight = edm_weight(sigma, self.sigma_data)
        error = ((denoised - clean) ** 2).flatten(1).sum(1)
        terms = {"dsm": Term((weight * error).sum(), 1.0)}
        if taking_part is not None:
            rows = taking_part.nonzero().squeeze(1)
            starts = Starts(
                x[rows],
                sigma[rows],
                denoised[rows],
                *(
                    None if labels is None else labels[rows]
                    for labels in (batch.class_labels, batch.augment_labels)
                ),
            )
            terms["cp"] = self._cp(model, starts, weight[rows], n, rng, images_seen)
        return terms

    def _cp(
        self,
        model: Callable[..., torch.Tensor],
        starts: Starts,
        weight: torch.Tensor,
        n: int,
        rng: BlockRng,
        images_seen: int,
    ) -> Term:
        m = len(starts.sigma)
        sigma_next = lower_sigma(self.cp, starts.sigma, rng.uniform(m))
        values = residual(
            model, starts, sigma_next, self.cp, rng, rollout_denoiser=self.rollout_model
        )
        if self.cp.sigma_weight == "edm":
            values = values * weight
        warmup = min(images_seen / max(self.cp.warmup_images, 1), 1.0)
        if self.cp.warmup_images == 0:
            warmup = 1.0
        return Term(values.sum() * (n / m), self.cp.weight * warmup)
