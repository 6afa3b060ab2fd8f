"""What an objective takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One summand of the loss, minimised as weight * value / global batch."""

    value: Tensor
    """Sum over the local samples, 0-dim: dividing by the global batch gives the mean loss."""
    weight: float


@dataclass(frozen=True)
class ImageBatch:
    """Samples of some lanes, lane-major: block b of the BlockRng owns the b-th equal part."""

    images: Tensor
    """[n, C, H, W] float32 in [-1, 1]."""
    class_labels: Tensor | None = None
    """[n, K] one-hot float32; None: unconditional."""
    augment_labels: Tensor | None = None
    """[n, A]; None: not augmented."""
