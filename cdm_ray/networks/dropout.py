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
        scale = (self.rng.uniform(*h.shape) >= p).float() / (1 - p)
        if self.active is not None:
            rows = self.active.view(-1, *[1] * (h.ndim - 1))
            scale = torch.where(rows, scale, 1.0)
        return h * scale.to(h.dtype)
