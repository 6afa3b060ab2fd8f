"""Dropout whose masks belong to lanes, so that they do not depend on how a batch is split."""

from __future__ import annotations

import torch

from cdm_ray.randomness import BlockRng


class Dropout:
    """Inverted dropout with masks from a BlockRng; given to a network call, else there is none.

    `active` [N] bool: rows that are False keep everything, unscaled.
    """

    def __init__(self, rng: BlockRng, active: torch.Tensor | None = None) -> None:
        self.rng = rng
        self.active = active

    def __call__(self, h: torch.Tensor, p: float) -> torch.Tensor:
        """`h` [N, ...] with each value zeroed with probability `p`, the rest divided by 1 - p."""
        if p == 0:
            return h
        dropped = self.rng.uniform(*h.shape) < p
        # In float32: 1 / (1 - p) rounded to bf16 would shift the mean by up to 0.2 %.
        scaled = h.float() / (1 - p)
        if self.active is not None:
            rows = self.active.view(-1, *[1] * (h.ndim - 1))
            dropped = dropped & rows
            scaled = torch.where(rows, scaled, h)
        return scaled.masked_fill(dropped, 0).to(h.dtype)
