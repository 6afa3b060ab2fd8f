"""Dropout whose masks belong to lanes, so that they do not depend on how a batch is split."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cdm_ray.randomness import BlockRng


class Mask:
    """Inverted dropout of one tensor: values are zeroed where `dropped`, the rest divided by 1 - p.

    `active` [N] bool: rows that are False keep everything, unscaled. Applied again, it does the
    same again, which activation checkpointing relies on.
    """

    def __init__(self, dropped: torch.Tensor, p: float, active: torch.Tensor | None) -> None:
        self.dropped = dropped
        self.p = p
        self.active = active

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """h of the mask's shape [N, ...]; keeps dtype and memory format."""
        dropped = self.dropped
        if h.ndim == 4 and not h.is_contiguous():
            # The result takes the layout of the mask.
            dropped = dropped.contiguous(memory_format=torch.channels_last)
        # In float32: 1 / (1 - p) rounded to bf16 would shift the mean by up to 0.2 %.
        scaled = h.float() / (1 - self.p)
        if self.active is not None:
            rows = self.active.view(-1, *[1] * (h.ndim - 1))
            dropped = dropped & rows
            scaled = torch.where(rows, scaled, h)
        # masked_fill would give the contiguous layout, whatever h has.
        return torch.where(dropped, 0, scaled).to(h.dtype)


class Dropout:
    """Source of masks, from a BlockRng; a network has dropout if its call is given one."""

    def __init__(self, rng: BlockRng, active: torch.Tensor | None = None) -> None:
        self.rng = rng
        self.active = active

    def draw(self, shape: Sequence[int], p: float) -> Mask | None:
        """A mask of `shape` [N, ...] that drops with probability `p`; None for p = 0."""
        if p == 0:
            return None
        return Mask(self.rng.uniform(*shape) < p, p, self.active)
