"""Kernel distance of two sets of features: KID, when they are Inception's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cdm_ray.randomness import generator

_STREAM = 4
"""First part of the seed of the subsets; 0 is training's, 1 the samplers', 2 and 3 the drift's."""


class KernelDistance(NamedTuple):
    """Over the subsets: mean, an unbiased estimate that may be negative, and standard deviation,
    which is that of one subset and not the error of the mean."""

    mean: float
    std: float


def kernel_distance(
    real: Tensor, generated: Tensor, *, subset: int, subsets: int, device: torch.device | str
) -> KernelDistance:
    """Squared maximum mean discrepancy of features [N, d] and [M, d] for k(x, y) = (x.y/d + 1)^3.

    The unbiased estimate over `subsets` pairs of random subsets of `subset` feature vectors each,
    2 <= subset <= N, M (Binkowski et al. 2018, sections 3 and 4). The same numbers give the same
    result: the subsets are drawn from a fixed seed.
    """
    # Not at the top: it takes seconds, which only a task that comes here should spend.
    from torchmetrics.image.kid import poly_mmd

    fewest = min(len(real), len(generated))
    if not 2 <= subset <= fewest:
        raise ValueError(f"subsets of {subset} feature vectors: at least 2 and at most {fewest}")
    rng = generator(_STREAM)

    def draw(features: Tensor) -> Tensor:
        chosen = torch.randperm(len(features), generator=rng)[:subset]
        # The sums over the kernel cancel: in float32 the rounding is as large as a good KID.
        return features[chosen].to(device, torch.float64)

    values = torch.stack([poly_mmd(draw(real), draw(generated)) for _ in range(subsets)])
    return KernelDistance(values.mean().item(), values.std(unbiased=False).item())
