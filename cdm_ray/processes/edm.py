"""Noise levels and reverse steps of the EDM process (Karras et al. 2022), with sigma(t) = t.

`x` [N, ...] is the clean image plus noise of standard deviation sigma; `denoised` is D(x; sigma),
about E[clean | x]; the score is (D - x) / sigma^2 (their equation 3). Every sigma is a tensor [N],
one level per sample, or a single number; arithmetic is in the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdm_ray.processes.rollout import Step

Sigma = Tensor | float


def spread(sigma: Sigma, x: Tensor) -> Tensor:
    """sigma ([N] or one number) in the dtype of x [N, ...], shaped to broadcast over it."""
    levels = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return levels.reshape(-1, *[1] * (x.ndim - 1))


def rho_levels(start: Tensor, end: Tensor, num_levels: int, rho: float) -> Tensor:
    """`num_levels` >= 2 noise levels from `start` to `end`, both included, evenly spaced in
    sigma^(1/rho) (Karras et al. 2022, equation 5).

    start, end [...] -> [num_levels, ...], float64, never outside of the two ends.
    """
    start, end = start.double(), end.double()
    share = torch.arange(num_levels, dtype=torch.float64, device=start.device) / (num_levels - 1)
    share = share.view(-1, *[1] * start.ndim)
    levels = (start ** (1 / rho) + share * (end ** (1 / rho) - start ** (1 / rho))) ** rho
    levels = levels.clamp(torch.minimum(start, end), torch.maximum(start, end))
    return torch.cat([start[None], levels[1:-1], end[None]])


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Levels of a sampler: `num_steps` >= 2 levels from sigma_max down to sigma_min, then 0.

    float64 [num_steps + 1] (Karras et al. 2022, equation 5).
    """
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64)
    return torch.cat([rho_levels(ends[0], ends[1], num_steps, rho), ends.new_zeros(1)])


def ode_slope(x: Tensor, denoised: Tensor, sigma: Sigma) -> Tensor:
    """dx/dsigma of the probability-flow ODE (Karras et al. 2022, equations 1 and 3)."""
    return (x - denoised) / spread(sigma, x)


def euler_maruyama_step(
    x: Tensor, denoised: Tensor, sigma: Sigma, sigma_next: Sigma, noise: Tensor
) -> Tensor:
    """Euler-Maruyama step of the reverse SDE dx = 2 (x - D)/sigma dsigma + sqrt(2 sigma) dw
    (Karras et al. 2022, equation 6 with beta = 1/sigma), from sigma down to sigma_next.

    The noise has the variance sigma^2 - sigma_next^2 of the exact stochastic integral, not
    2 sigma (sigma - sigma_next).
    """
    s, s_next = spread(sigma, x), spread(sigma_next, x)
    # A difference of squares is exact to rounding only as a product: levels may be very close.
    std = ((s - s_next) * (s + s_next)).sqrt()
    return x + 2 * (s_next - s) * (x - denoised) / s + std * noise


def ancestral_step(
    x: Tensor, denoised: Tensor, sigma: Sigma, sigma_next: Sigma, noise: Tensor
) -> Tensor:
    """x' ~ p(x' | x, clean image = D), from sigma down to sigma_next:
    x' = D + r^2 (x - D) + sigma_next sqrt(1 - r^2) z, with r = sigma_next / sigma
    (Song et al. 2021, score SDE, appendix F; Ho et al. 2020, equations 6 and 7).

    E[x' | x] is exact whatever the data; the spread of the clean image around D is left out, a
    variance (1 - r^2)^2 Var(clean | x), so that the law of x' is exact for small steps only.
    """
    s, s_next = spread(sigma, x), spread(sigma_next, x)
    ratio = s_next / s
    std = ratio * ((s - s_next) * (s + s_next)).sqrt()
    return denoised + ratio**2 * (x - denoised) + std * noise


REVERSE_STEPS: dict[str, Step] = {
    "ancestral": ancestral_step,
    "euler_maruyama": euler_maruyama_step,
}
"""Steps of the reverse SDE by the names that the configuration uses."""
