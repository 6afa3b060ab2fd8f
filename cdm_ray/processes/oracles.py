"""Data whose denoiser E[clean | x] is known in closed form, for tests and notebooks.

Each is callable as D(x, sigma) on x [N, ...] with sigma [N] or one number, sigma > 0, in the dtype
of x. A sample may have any shape, an image's for example.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_ray.processes.edm import Sigma, ancestral_step, spread


@dataclass(frozen=True)
class Gaussian:
    """Independent entries ~ N(mean, variance); both numbers, or tensors of a sample's shape."""

    mean: Tensor | float
    variance: Tensor | float

    def __call__(self, x: Tensor, sigma: Sigma) -> Tensor:
        """D = mean + variance / (variance + sigma^2) (x - mean)."""
        return self.mean + self.variance / self._noisy_variance(sigma, x) * (x - self.mean)

    def sample(self, noise: Tensor) -> Tensor:
        """Data [N, ...] from standard normal noise of that shape."""
        return self.mean + torch.as_tensor(self.variance).to(noise).sqrt() * noise

    def ode(self, x: Tensor, sigma: Sigma, sigma_next: Sigma) -> Tensor:
        """Where the probability-flow ODE takes x [N, ...] from sigma to sigma_next."""
        ratio = self._noisy_variance(sigma_next, x) / self._noisy_variance(sigma, x)
        return self.mean + ratio.sqrt() * (x - self.mean)

    def reverse(self, x: Tensor, sigma: Sigma, sigma_next: Sigma, noise: Tensor) -> Tensor:
        """Exact draw of x' at sigma_next <= sigma given x, from standard normal noise:
        N(mean + (u'/u)(x - mean), u'(u - u')/u), with u = variance + sigma^2."""
        u, u_next = self._noisy_variance(sigma, x), self._noisy_variance(sigma_next, x)
        std = (u_next * (u - u_next) / u).sqrt()
        return self.mean + u_next / u * (x - self.mean) + std * noise

    def _noisy_variance(self, sigma: Sigma, x: Tensor) -> Tensor:
        return self.variance + spread(sigma, x) ** 2


class Mixture:
    """sum_k weight_k N(mean_k, variance_k I): means [K, ...], variances [K], weights [K] of sum 1.

    With zero variances the data are the K means, see `of_points`.
    """

    def __init__(self, means: Tensor, variances: Tensor, weights: Tensor) -> None:
        if not len(means) == len(variances) == len(weights):
            raise ValueError(
                f"{len(means)} means, {len(variances)} variances and {len(weights)} weights "
                "do not make a mixture; give as many of each"
            )
        self.means, self.variances, self.weights = means, variances, weights

    @classmethod
    def of_points(cls, points: Tensor) -> Mixture:
        """The finite data set `points` [K, ...], each as likely as the others."""
        count = len(points)
        return cls(points, points.new_zeros(count), points.new_full((count,), 1 / count))

    def responsibilities(self, x: Tensor, sigma: Sigma) -> Tensor:
        """Probability [N, K] that x came from each component:
        w_k ~ weight_k N(x; mean_k, variance_k + sigma^2)."""
        flat, means = x.flatten(1), self.means.to(x).flatten(1)
        # Not by |x|^2 - 2 x.m + |m|^2, whose rounding errors the division below blows up.
        distance = torch.cdist(flat, means, compute_mode="donot_use_mm_for_euclid_dist")
        u = self._noisy_variances(x, sigma)
        logits = -(distance**2) / (2 * u) - flat.shape[1] / 2 * u.log()
        return (logits + self.weights.to(x).log()).softmax(dim=1)

    def __call__(self, x: Tensor, sigma: Sigma) -> Tensor:
        """D = sum_k w_k (variance_k x + sigma^2 mean_k) / (variance_k + sigma^2)."""
        share = self.responsibilities(x, sigma) / self._noisy_variances(x, sigma)
        of_x = (share * self.variances.to(x)).sum(1, keepdim=True)
        of_means = (share @ self.means.to(x).flatten(1)).view_as(x)
        return spread(of_x.flatten(), x) * x + spread(sigma, x) ** 2 * of_means

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Data [count, ...]."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        means = self.means[component]
        return means + spread(self.variances[component], means).sqrt() * _normal(means, generator)

    def reverse(
        self, x: Tensor, sigma: Sigma, sigma_next: Sigma, generator: torch.Generator
    ) -> Tensor:
        """Exact draw of x' at sigma_next <= sigma given x [N, ...]: a component by its
        responsibility, the clean image given that component, x' given both images."""
        component = torch.multinomial(self.responsibilities(x, sigma), 1, generator=generator)
        means = self.means.to(x)[component.squeeze(1)]
        variance = spread(self.variances.to(x)[component.squeeze(1)], x)
        noise_variance = spread(sigma, x) ** 2
        u = variance + noise_variance
        posterior_mean = (variance * x + noise_variance * means) / u
        posterior_std = (variance * noise_variance / u).sqrt()
        clean = posterior_mean + posterior_std * _normal(x, generator)
        return ancestral_step(x, clean, sigma, sigma_next, _normal(x, generator))

    def _noisy_variances(self, x: Tensor, sigma: Sigma) -> Tensor:
        """variance_k + sigma^2, [N, K] or [1, K]."""
        return self.variances.to(x) + spread(sigma, x.flatten(1)) ** 2


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
