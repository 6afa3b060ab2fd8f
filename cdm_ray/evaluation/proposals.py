"""Rivals of a learned bridge that need no training: guided proposals, and plain rejection.

A `Proposal` has a drift and a score as `BridgeControl` has, so that it is simulated and evaluated
by the same functions, and corrected by the same importance weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.bridge_metrics import STREAM
from cdm_ray.evaluation.estimate import Estimate
from cdm_ray.processes.bridge import Bridge
from cdm_ray.processes.references import ReferenceProcess
from cdm_ray.processes.rollout import Field
from cdm_ray.processes.simulation import Paths, simulate
from cdm_ray.randomness import generator

_BLOCK_NUMBERS = 2**22
"""Most numbers in the states of paths that are simulated at once."""


@dataclass(frozen=True)
class Proposal:
    """drift = b + a g_guide, with a = sigma^2, for states x [N, d] and t ([N] or 0-dim) < T."""

    process: ReferenceProcess
    guide: Field
    """g_guide(x, t) [N, d]."""

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return self.guide(x, t)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.process.drift(x) + _column(self.process.sigma(t), x) ** 2 * self.guide(x, t)


def brownian_guide(bridge: Bridge) -> Proposal:
    """drift (end - x) / (T - t): the exact bridge of b = 0 with a constant sigma, whatever b is."""
    process, to_end = bridge.process, _to_end(bridge)

    def guide(x: Tensor, t: Tensor) -> Tensor:
        return (to_end(x, t) - process.drift(x)) / _column(process.sigma(t), x) ** 2

    return Proposal(process, guide)


def delyon_hu(bridge: Bridge) -> Proposal:
    """drift b + (end - x) / (T - t) (Delyon and Hu, Stoch. Proc. Appl. 116 (2006) 1660)."""
    process, to_end = bridge.process, _to_end(bridge)

    def guide(x: Tensor, t: Tensor) -> Tensor:
        return to_end(x, t) / _column(process.sigma(t), x) ** 2

    return Proposal(process, guide)


@dataclass(frozen=True)
class Rejection:
    """Paths of the reference process that happened to end near the end."""

    paths: Paths
    """The accepted ones: none, if there are none. Float64."""
    share: float
    """Accepted of all."""
    log_p: Estimate
    """log of the Euler chain's p(end | start): of the share over the ball's volume, that is the
    mean of p over the ball, wrong by order tolerance^2. -inf if nothing was accepted."""


@torch.no_grad()
def rejection(bridge: Bridge, *, steps: int, paths: int, tolerance: float, seed: int) -> Rejection:
    """Simulate the reference process without a condition, keep what ends within `tolerance` of the
    end. Raises ConfigError for a tolerance that is not positive."""
    if not tolerance > 0:
        raise ConfigError(f"tolerance={tolerance} of rejection; it has to be positive")
    dim, times = bridge.process.dim, bridge.times(steps).to(bridge.start.device)
    start, end = bridge.start.double(), bridge.end.double()
    random = generator(STREAM, seed)
    kept = []
    for block in torch.arange(paths).split(max(1, _BLOCK_NUMBERS // (steps * dim))):
        noise = torch.randn((steps, len(block), dim), generator=random, dtype=torch.float64)
        states = simulate(
            lambda x, _: bridge.process.drift(x),
            bridge.process,
            start.expand(len(block), -1),
            times,
            noise.to(start.device),
        ).states
        kept.append(states[:, (states[-1] - end).norm(dim=1) < tolerance])
    accepted = torch.cat(kept, dim=1)
    share = accepted.shape[1] / paths
    log_p, error = -math.inf, math.inf
    if share > 0:
        log_p = math.log(share) - _log_ball(dim, tolerance)
        error = math.sqrt((1 - share) / (share * paths))
    estimate = Estimate(np.asarray(log_p), np.asarray(error), paths)
    return Rejection(Paths(accepted, times), share, estimate)


def _to_end(bridge: Bridge) -> Field:
    """(end - x) / (T - t)."""
    return lambda x, t: (bridge.end.to(x) - x) / _column(bridge.duration - t, x)


def _column(values: Tensor, x: Tensor) -> Tensor:
    """Numbers [N] or 0-dim as [N or 1, 1], in the dtype of x."""
    return values.to(x.dtype).reshape(-1, 1)


def _log_ball(dim: int, radius: float) -> float:
    """log of the volume of a ball."""
    return dim / 2 * math.log(math.pi) + dim * math.log(radius) - math.lgamma(dim / 2 + 1)
