"""Fréchet distance between two sets of feature vectors, from statistics that merge exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


class Moments(Protocol):
    """Mean [d] and unbiased covariance [d, d] of feature vectors, float64."""

    @property
    def mean(self) -> Array: ...

    @property
    def covariance(self) -> Array: ...

    @property
    def count(self) -> int | None:
        """Of the vectors; None if it is not known."""


@dataclass(frozen=True)
class GivenMoments:
    """Moments from somewhere else."""

    mean: Array
    covariance: Array
    count: int | None = None


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean [d] and scatter [d, d] = sum of (f - mean)(f - mean)^T, in float64.

    Statistics of parts merge into those of the whole, however the whole was split.
    """

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of feature vectors [N, d], N >= 1."""
        values = features.detach().cpu().numpy().astype(np.float64)
        if values.ndim != 2 or len(values) == 0:
            raise ValueError(f"feature vectors must be [N, d] with N >= 1, not {values.shape}")
        mean = values.mean(axis=0)
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together (Chan, Golub and LeVeque 1983, eq. 2.1)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        correction = np.outer(shift, shift) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter + correction)

    @property
    def covariance(self) -> Array:
        """Unbiased covariance [d, d]; needs two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.scatter / (self.count - 1)


def merge_all(parts: Iterable[FeatureStatistics]) -> FeatureStatistics:
    """Statistics of all parts together."""
    return reduce(FeatureStatistics.merge, parts)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians with these moments.

    |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a^{1/2} S_b S_a^{1/2})^{1/2}) (Heusel et al. 2017,
    eq. 6). Far too large when either has `too_few_samples`.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"features of {len(a.mean)} and of {len(b.mean)} dimensions have no Fréchet distance"
        )
    shift = a.mean - b.mean
    cov_a, cov_b = a.covariance, b.covariance
    # With S = F F^T the trace term is the sum of the singular values of F_a^T F_b. Taking them
    # directly, and not as roots of eigenvalues of the product, keeps rounding errors of singular
    # covariances at 1e-16 of the trace where roots would make 1e-8 of them.
    cross = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    distance = float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
    return max(distance, 0.0)  # equal sets give +-1e-16 of the trace


def too_few_samples(count: int, dim: int) -> str | None:
    """Why a Fréchet distance from so many samples means nothing, or None if they are enough."""
    if count > dim:
        return None
    return (
        f"Fréchet distance from {count} samples of {dim} features: fewer than {dim + 1} leave the "
        "covariance singular and the number far too large; use more images"
    )


def _factor(covariance: Array) -> Array:
    """F [d, rank] with F F^T = S for a positive semidefinite S; rounding near 0 counts as 0."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])
