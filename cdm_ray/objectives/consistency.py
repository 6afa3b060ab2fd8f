"""The consistency kernel behind every self-consistency loss.

A field phi is consistent along a process X when phi(s, X_s) = E[phi(t, X_t) | X_s] on the model's
own paths. phi0 is the field at the start of a path, the others are its values at ends of
independent paths from that start; all [N, ...], and a result [N] sums over everything else.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LearningSide:
    """Which side of a pair gets gradient; the one place where a side is cut off."""

    start: bool
    end: bool

    def at_start(self, phi0: Tensor) -> Tensor:
        """phi0, detached unless the start learns."""
        return phi0 if self.start else phi0.detach()

    def evaluating_end(self) -> AbstractContextManager[object]:
        """Context for evaluating the field at the ends: without gradient unless they learn."""
        return nullcontext() if self.end else torch.no_grad()


LEARNING_SIDES = {
    "low": LearningSide(start=False, end=True),
    "high": LearningSide(start=True, end=False),
    "both": LearningSide(start=True, end=True),
}
"""By the names that the configuration uses: the low-noise ends, the high-noise start, both."""


def product(phi0: Tensor, phi1: Tensor, phi2: Tensor) -> Tensor:
    """(phi1 - phi0).(phi2 - phi0), [N]: two independent paths from one start give an unbiased
    estimate of |E[phi1] - phi0|^2, which may be negative. (A single path, squared, would add the
    variance of phi1; the square of a mean over K paths a K-th of it.)"""
    return ((phi1 - phi0) * (phi2 - phi0)).flatten(1).sum(1)


def regress(phi0: Tensor, target: Tensor) -> Tensor:
    """|phi0 - target|^2 with the target fixed, [N]. With phi at the end of one path as target, the
    gradient is unbiased for that of |phi0 - E[target]|^2; the value also holds the variance of the
    target and is no residual."""
    return ((phi0 - target.detach()) ** 2).flatten(1).sum(1)
