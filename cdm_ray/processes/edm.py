"""The noise process of EDM in time sigma(t) = t, and its reverse ODE and SDE.

`x = y + sigma n`; the score is `(D - x) / sigma^2` for a denoiser `D(x; sigma) = E[y | x]`
(Karras et al. 2022, equations 1 to 6). Noise levels are tensors that broadcast over the images:
scalars, or [N] for N images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Step = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]
"""(x, denoised, sigma, sigma_next, noise) -> x at sigma_next."""


def over_images(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`sigma`, a scalar or [N], shaped to broadcast over x [N, ...]."""
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - 1)) if sigma.ndim else sigma


def rho_spacing(
    first: torch.Tensor, last: torch.Tensor, num_steps: int, rho: float
) -> torch.Tensor:
    """`num_steps` + 1 levels from `first` to `last`, evenly spaced in sigma^(1/rho) (EDM,
    equation 5); [num_steps + 1, *first.shape]."""
    share = torch.linspace(0, 1, num_steps + 1, dtype=first.dtype, device=first.device)
    share = share.view(-1, *[1] * first.ndim)
    a, b = first ** (1 / rho), last ** (1 / rho)
    levels = (a + share * (b - a)) ** rho
    return torch.cat([first[None], levels[1:-1], last[None]])


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> torch.Tensor:
    """float64 [num_steps + 1]: `num_steps` levels from sigma_max down to sigma_min, then 0 (EDM,
    equation 5)."""
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64)
    levels = rho_spacing(ends[0], ends[1], num_steps - 1, rho)
    return torch.cat([levels, levels.new_zeros(1)])


def ode_slope(x: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """dx/dsigma of the probability-flow ODE, `(x - D) / sigma` (EDM, equation 3)."""
    return (x - denoised) / over_images(sigma, x)


def euler_maruyama_step(
    x: torch.Tensor,
    denoised: torch.Tensor,
    sigma: torch.Tensor,
    sigma_next: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """One step of `dx = 2 (x - D) / sigma dsigma + sqrt(2 sigma) dw`; the noise has the variance
    of the exact integral, sigma^2 - sigma_next^2."""
    sigma, sigma_next = over_images(sigma, x), over_images(sigma_next, x)
    drift = 2 * (x - denoised) / sigma * (sigma_next - sigma)
    return x + drift + (sigma**2 - sigma_next**2).sqrt() * noise


def ancestral_step(
    x: torch.Tensor,
    denoised: torch.Tensor,
    sigma: torch.Tensor,
    sigma_next: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Draw from q(x' | x, y = D): `D + r^2 (x - D) + sigma' sqrt(1 - r^2) z`, r = sigma'/sigma
    (DDPM's posterior in this time). Its mean is exact for any data, its law for a single point."""
    sigma_next = over_images(sigma_next, x)
    ratio = (sigma_next / over_images(sigma, x)) ** 2
    return denoised + ratio * (x - denoised) + sigma_next * (1 - ratio).sqrt() * noise


REVERSE_STEPS: dict[str, Step] = {
    "euler_maruyama": euler_maruyama_step,
    "ancestral": ancestral_step,
}
