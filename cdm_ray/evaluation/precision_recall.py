"""Precision and recall of generated images: do they look real, and are all kinds there?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 3
"""Kynkaanniemi et al. 2019, section 3."""
_ROWS = 1000
_ROUNDING = 1e-12
"""Squared distances below this share of the squared lengths are rounding: the same two vectors."""


class PrecisionRecall(NamedTuple):
    """Shares between 0 and 1."""

    precision: float
    recall: float


def precision_recall(
    real: Tensor,
    generated: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """Improved precision and recall of features [N, d] and [M, d], N and M above `neighbours`.

    A set covers the balls around its vectors that reach to their `neighbours`-th nearest other one.
    Precision is the share of the generated vectors that the real set covers, recall the share of
    the real ones that the generated set covers (Kynkaanniemi et al. 2019, eq. 1 and 2). Both depend
    on N and M: compare numbers from equally many.
    """
    fewest = min(len(real), len(generated))
    if not 1 <= neighbours < fewest:
        raise ValueError(f"neighbour {neighbours} of {fewest} feature vectors does not exist")
    real, generated = (features.to(device, torch.float64) for features in (real, generated))
    real_radii, radii = squared_radii(real, neighbours), squared_radii(generated, neighbours)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    precise = 0
    for start in range(0, len(generated), _ROWS):
        rows = slice(start, start + _ROWS)
        distances = squared_distances(generated[rows], real)
        precise += int((distances <= real_radii).any(dim=1).sum())
        covered |= (distances <= radii[rows, None]).any(dim=0)
    return PrecisionRecall(precise / len(generated), covered.double().mean().item())


def squared_radii(points: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each point [N, d] to its `neighbours`-th nearest other one, [N]."""
    radii = []
    for start in range(0, len(points), _ROWS):
        distances = squared_distances(points[start : start + _ROWS], points)
        own = torch.arange(len(distances), device=points.device)
        distances[own, own + start] = torch.inf
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[N, M] of points float64 [N, d] and [M, d]; exactly 0 between equal ones.

    By one matrix product, whose rounding would otherwise put copies of a point outside the ball of
    radius 0 that copies have.
    """
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = lengths - 2 * a @ b.T
    return distances.where(distances > _ROUNDING * lengths, 0.0)
