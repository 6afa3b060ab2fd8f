"""The consistency kernel: a field phi agrees with itself along the model's own paths,
`phi(s, X_s) = E[phi(t, X_t) | X_s]`.

Two estimators of how far it does not, per sample, from phi at the start of paths and at their ends.
"""

from __future__ import annotations

from typing import Literal

import torch

Side = Literal["low", "high", "both"]
"""Which end of a pair learns: the low-noise ends, the high-noise start, or both."""


def product(
    start: torch.Tensor, end_1: torch.Tensor, end_2: torch.Tensor, gradient: Side
) -> torch.Tensor:
    """`(phi_1 - phi_0) . (phi_2 - phi_0)` [N] over two independent paths from the same start.

    Its mean is exactly `|E[phi(t, X_t) | X_s] - phi_0|^2`, without the variance of the paths that
    a single path (or the square of a mean over paths) would add; single values may be negative.
    All arguments [N, ...].
    """
    if gradient == "low":
        start = start.detach()
    elif gradient == "high":
        end_1, end_2 = end_1.detach(), end_2.detach()
    return ((end_1 - start) * (end_2 - start)).flatten(1).sum(1)


def regress(start: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`|phi_0 - sg target|^2` [N] with one path's end as the target.

    The gradient to phi_0 is unbiased; the value holds the variance of the target and is no
    residual.
    """
    return ((start - target.detach()) ** 2).flatten(1).sum(1)
