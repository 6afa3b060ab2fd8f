"""What objectives take and give."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Term:
    """One summand of a loss."""

    value: torch.Tensor
    """Scalar: sum over the local samples. Divided by the global batch it is the mean loss."""
    weight: float


@dataclass(frozen=True)
class ImageBatch:
    """Images of whole lanes, lane after lane, on the device of the model."""

    images: torch.Tensor
    """[N, C, H, W] float32 in [-1, 1]."""
    class_labels: torch.Tensor | None = None
    """[N, K] float32 one-hot."""
    augment_labels: torch.Tensor | None = None
    """[N, A] float32."""
