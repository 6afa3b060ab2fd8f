"""Fréchet distance between two sets of feature vectors, from statistics that merge exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cdm_ray.evaluation.features import INCEPTION_DIM

Array = NDArray[np.float64]


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
    def dim(self) -> int:
        """Length of a feature vector."""
        return len(self.mean)

    @property
    def covariance(self) -> Array:
        """Unbiased covariance [d, d]; needs two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.scatter / (self.count - 1)


def merge_all(parts: Iterable[FeatureStatistics]) -> FeatureStatistics:
    """Statistics of all parts together."""
    return reduce(FeatureStatistics.merge, parts)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians with these moments.

    |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a^{1/2} S_b S_a^{1/2})^{1/2}) (Heusel et al. 2017,
    eq. 6). Warns when either has too few samples for a covariance of full rank.
    """
    if a.dim != b.dim:
        raise ValueError(f"features of {a.dim} and of {b.dim} dimensions have no Fréchet distance")
    for statistics in (a, b):
        if statistics.count < statistics.dim + 1:
            warnings.warn(
                f"Fréchet distance from {statistics.count} samples of {statistics.dim} features: "
                f"fewer than {statistics.dim + 1} leave the covariance singular and the number "
                "far too large; use more images",
                stacklevel=2,
            )
    shift = a.mean - b.mean
    cov_a, cov_b = a.covariance, b.covariance
    # With S = F F^T the trace term is the sum of the singular values of F_a^T F_b. Taking them
    # directly, and not as roots of eigenvalues of the product, keeps rounding errors of singular
    # covariances at 1e-16 of the trace where roots would make 1e-8 of them.
    cross = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    distance = float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
    return max(distance, 0.0)  # equal sets give +-1e-16 of the trace


def metric_name(extractor: str, dim: int) -> str:
    """`fid` for the 2048 features of Inception; any other distance carries its extractor's name."""
    return "fid" if (extractor, dim) == ("inception", INCEPTION_DIM) else f"fd_{extractor}"


def _factor(covariance: Array) -> Array:
    """F [d, rank] with F F^T = S for a positive semidefinite S; rounding near 0 counts as 0."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])
