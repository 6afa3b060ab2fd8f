"""Closed-form denoisers: what a perfect network would say for data whose law is known.

`D(x; sigma) = E[y | y + sigma n = x]`. All take x [N, ...] and sigma, a scalar or [N].
"""

from __future__ import annotations

import torch

from cdm_ray.processes.edm import over_images


class GaussianOracle:
    """Data N(mean, std^2), independent in every dimension."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean = mean
        self.std = std

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """`D = mean + s^2 / (s^2 + sigma^2) (x - mean)`."""
        gain = self.std**2 / (self.std**2 + over_images(sigma, x) ** 2)
        return self.mean + gain * (x - self.mean)


class MixtureOracle:
    """1-D data, a mixture of N(means[k], variances[k]) with the given weights; tensors [K]."""

    def __init__(self, weights: torch.Tensor, means: torch.Tensor, variances: torch.Tensor) -> None:
        self.weights = weights / weights.sum()
        self.means = means
        self.variances = variances

    def responsibilities(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """P(component | x) [N, K] for x [N, 1]."""
        variances = self.variances + over_images(sigma, x) ** 2
        log_density = -0.5 * ((x - self.means) ** 2 / variances + variances.log())
        return (self.weights.log() + log_density).softmax(dim=1)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x [N, 1] -> [N, 1]."""
        square = over_images(sigma, x) ** 2
        posterior = (self.variances * x + square * self.means) / (self.variances + square)
        return (self.responsibilities(x, sigma) * posterior).sum(dim=1, keepdim=True)

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Clean data [n, 1]."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, generator=generator, dtype=self.means.dtype)
        return (self.means[k] + self.variances[k].sqrt() * noise)[:, None]

    def reverse(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        sigma_next: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Exact draw from p(x at sigma_next | x at sigma), x [N, 1]: no discretisation error."""
        square, ratio = over_images(sigma, x) ** 2, (over_images(sigma_next / sigma, x)) ** 2
        k = torch.multinomial(self.responsibilities(x, sigma), 1, generator=generator)
        mean, variance = self.means[k], self.variances[k]
        total = variance + square

        def noise() -> torch.Tensor:
            return torch.randn(x.shape, generator=generator, dtype=x.dtype)

        clean = (variance * x + square * mean) / total + (
            variance * square / total
        ).sqrt() * noise()
        spread = over_images(sigma_next, x) * (1 - ratio).sqrt()
        return clean + ratio * (x - clean) + spread * noise()


class DatasetOracle:
    """A finite data set `images` [M, ...]: `D = softmax(-|x - y_i|^2 / (2 sigma^2)) . y`."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x [N, ...] of the shape of the images -> [N, ...]."""
        square = (torch.cdist(x.flatten(1), self.images.flatten(1))) ** 2
        weights = (-square / (2 * sigma.expand(x.shape[0])[:, None] ** 2)).softmax(dim=1)
        return (weights @ self.images.flatten(1)).reshape(x.shape)
