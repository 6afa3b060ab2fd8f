"""How good a learned bridge is: KL where the truth is known, importance weights everywhere.

The process dX = b(X) dt + sigma(t) dB, conditioned on X_T = end, has the drift b + a g with
a = sigma^2 and g = grad log h; its control is u = sigma g. Everything here is a mean over paths of
K equal Euler-Maruyama steps. The paths have float64 states; fields are asked in the dtype and on
the device of `bridge.start`, all N states of a time in one call. A seed fixes the noise: with the
same one all models are compared on the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cdm_ray.evaluation.bridge_truth import Truth
from cdm_ray.evaluation.estimate import Estimate
from cdm_ray.evaluation.grid_truth import GridTruth
from cdm_ray.processes.bridge import Bridge
from cdm_ray.processes.rollout import Field
from cdm_ray.processes.simulation import Paths, simulate
from cdm_ray.randomness import generator

STREAM = 5
"""First part of the seeds of the noise drawn here."""


class Steered(Protocol):
    """What is evaluated, a `BridgeControl` or a proposal without training: drift = b + a score."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor: ...

    def score(self, x: Tensor, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Divergence(Estimate):
    """A KL in nats."""

    trusted_share: float = 1.0
    """Part of the states that count; all unless the truth is a `GridTruth`."""


@dataclass(frozen=True)
class WeightSummary:
    """What importance weights w of N paths say."""

    ess: float
    """Effective sample size (sum w)^2 / (N sum w^2) as a share of N, 1/N to 1."""
    log_p: Estimate
    """log of the mean of w, an estimate of log p(end | start), with its error to first order (the
    delta method). The error is itself an estimate from the weights, and too small where the ESS is
    a few paths."""
    bound: Estimate
    """Mean of log w: at most log p(end | start) in expectation (Jensen), whatever the ESS."""

    @classmethod
    def of(cls, log_weights: Tensor) -> WeightSummary:
        """From log w [N]."""
        count = len(log_weights)
        largest = log_weights.max()
        relative = (log_weights - largest).exp()
        ess = (relative.sum() ** 2 / relative.square().sum() / count).item()
        mean = relative.mean()
        error = relative.std() / mean / math.sqrt(count)
        log_p = (largest + mean.log()).item()
        return cls(
            ess=ess,
            log_p=Estimate(np.asarray(log_p), np.asarray(error.item()), count),
            bound=_estimate(log_weights),
        )


@dataclass(frozen=True)
class BridgeEvaluation:
    """All that is known of a model after one evaluation."""

    metrics: dict[str, float]
    """Means, and their standard errors under the same name with `_se`."""
    paths: Paths
    """The model's own."""


def evaluate_bridge(
    control: Steered,
    bridge: Bridge,
    *,
    steps: int,
    paths: int,
    seed: int,
    truth: Truth | None = None,
) -> BridgeEvaluation:
    """All metrics of `control`, on N = `paths` >= 2 paths of K = `steps` steps.

    `cost`, `endpoint_error`, `ess`, `log_p`, `log_p_bound`, `paths`, `steps`; with a truth
    `kl_from_truth`, `kl_to_truth`, `log_p_truth`; with a `GridTruth` `trusted_share`, the smaller
    one of both KL. `log_p` and its bound are of the Euler chain, and agree with `log_p_truth` only
    for many steps. Paths that diverge make metrics NaN, save for KL by a `GridTruth`.
    """
    own = simulate_bridge(control.drift, bridge, steps=steps, paths=paths, seed=seed)
    weights = WeightSummary.of(log_weights(control.drift, bridge, own, pinned=True))
    estimates = {
        "cost": path_cost(control.score, bridge, own),
        "endpoint_error": endpoint_error(bridge, own),
        "log_p": weights.log_p,
        "log_p_bound": weights.bound,
    }
    metrics = {"ess": weights.ess, "paths": float(paths), "steps": float(steps)}
    if truth is not None:
        drawn = {"steps": steps, "paths": paths, "seed": seed}
        forward = kl_from_truth(control.score, truth, bridge, **drawn)
        backward = divergence_along(control.score, truth, bridge, own)
        estimates |= {"kl_from_truth": forward, "kl_to_truth": backward}
        start = bridge.start.double()[None]
        metrics["log_p_truth"] = truth.log_density(start, 0.0).item()
        if isinstance(truth, GridTruth):
            metrics["trusted_share"] = min(forward.trusted_share, backward.trusted_share)
    for name, estimate in estimates.items():
        metrics[name] = float(estimate.mean)
        metrics[f"{name}_se"] = float(estimate.error)
    return BridgeEvaluation(metrics, own)


def simulate_bridge(drift: Field, bridge: Bridge, *, steps: int, paths: int, seed: int) -> Paths:
    """Paths from `bridge.start` by `drift`, with the variance of a Brownian bridge."""
    return _simulate(_as_asked(drift, bridge), bridge, steps, paths, seed)


def kl_from_truth(
    score: Field, truth: Truth, bridge: Bridge, *, steps: int, paths: int, seed: int
) -> Divergence:
    """KL(P* || P_theta), over paths of the true bridge: large where the model misses a mode.

    See `divergence_along`. The paths' law differs from P* in the first order of the step.
    """

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return bridge.process.drift(x) + bridge.process.sigma(t) ** 2 * truth.score(x, t.item())

    true_paths = _simulate(drift, bridge, steps, paths, seed)
    return divergence_along(score, truth, bridge, true_paths)


def kl_to_truth(
    score: Field, truth: Truth, bridge: Bridge, *, steps: int, paths: int, seed: int
) -> Divergence:
    """KL(P_theta || P*), over the model's own paths: large where it goes and the bridge does not.

    See `divergence_along`.
    """

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return bridge.process.drift(x) + bridge.process.sigma(t) ** 2 * score(x, t)

    own = simulate_bridge(drift, bridge, steps=steps, paths=paths, seed=seed)
    return divergence_along(score, truth, bridge, own)


@torch.no_grad()
def divergence_along(score: Field, truth: Truth, bridge: Bridge, paths: Paths) -> Divergence:
    """1/2 E sum_k sigma^2 |g* - g_theta|^2 dt over all K steps of `paths`, at their beginnings.

    By Girsanov the KL from the law that the paths have. States where a `GridTruth` is not to be
    trusted count 0, so that nothing is made up outside of its box; where `trusted_share` is below 1
    the value is a lower bound.
    """
    score = _as_asked(score, bridge)
    total = paths.states.new_zeros(paths.states.shape[1])
    trusted_shares = []
    for x, t, a, dt in _steps(bridge, paths):
        gap = (truth.score(x, t.item()) - score(x, t)).square().sum(1)
        if isinstance(truth, GridTruth):
            trusted = truth.trusted(x, t.item())
            gap = torch.where(trusted, gap, 0.0)
            trusted_shares.append(trusted.double().mean().item())
        total += a / 2 * gap * dt
    found = _estimate(total)
    share = float(np.mean(trusted_shares)) if trusted_shares else 1.0
    return Divergence(found.mean, found.error, found.count, share)


@torch.no_grad()
def path_cost(score: Field, bridge: Bridge, paths: Paths) -> Estimate:
    """1/2 E sum_{k < K-1} |u|^2 dt with u = sigma g, for the model's own paths.

    Without the last step: the integral up to T - dt grows as d/2 log(1 / dt) for every bridge, so
    costs compare at equal steps only. At equal steps lower is better for a model that reaches the
    end.
    """
    score = _as_asked(score, bridge)
    total = paths.states.new_zeros(paths.states.shape[1])
    for x, t, a, dt in list(_steps(bridge, paths))[:-1]:
        total += a / 2 * score(x, t).square().sum(1) * dt
    return _estimate(total)


def endpoint_error(bridge: Bridge, paths: Paths) -> Estimate:
    """Mean distance |X_T - end|."""
    last = paths.states[-1]
    return _estimate((last - bridge.end.to(last)).norm(dim=1))


@torch.no_grad()
def log_weights(drift: Field, bridge: Bridge, paths: Paths, *, pinned: bool) -> Tensor:
    """log w [N] of paths that `drift` made, against the Euler chain of the reference process.

    w is the density of X_1 .. X_{K-1} and then `end` under the reference's chain, whose last factor
    is N(end; X_{K-1} + b dt, a dt), over the density of X_1 .. X_{K-1} under the proposal, whose
    steps have the variance of `simulate` with this `pinned`. So the mean of w is an unbiased
    estimate of the Euler chain's p(end | start), for any drift. X_K is not used.
    """
    drift, end = _as_asked(drift, bridge), bridge.end.to(paths.states)
    shrunk = torch.ones_like(paths.times[1:])
    if pinned:
        left = paths.times[-1] - paths.times
        shrunk = left[1:] / left[:-1]
    total = paths.states.new_zeros(paths.states.shape[1])
    *steps, (x, _, a, dt) = _steps(bridge, paths)
    for k, (here, t, a_here, length) in enumerate(steps):
        moved, variance = paths.states[k + 1] - here, a_here * length
        total += _log_normal(moved - bridge.process.drift(here) * length, variance)
        total -= _log_normal(moved - drift(here, t) * length, variance * shrunk[k])
    return total + _log_normal(end - x - bridge.process.drift(x) * dt, a * dt)


def _simulate(drift: Field, bridge: Bridge, steps: int, paths: int, seed: int) -> Paths:
    start, random = bridge.start.double(), generator(STREAM, seed)
    noise = torch.randn((steps, paths, len(start)), generator=random, dtype=torch.float64)
    return simulate(
        drift,
        bridge.process,
        start.expand(paths, -1),
        bridge.times(steps).to(start.device),
        noise.to(start.device),
        pinned=True,
    )


def _steps(bridge: Bridge, paths: Paths) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """X_k [N, d], t_k, a = sigma(t_k)^2, dt of every step; numbers 0-dim."""
    begins = paths.times[:-1]
    squares = bridge.process.sigma(begins) ** 2
    yield from zip(paths.states[:-1], begins, squares, paths.times.diff(), strict=True)


def _as_asked(field: Field, bridge: Bridge) -> Field:
    """`field` as one of states of any dtype, which asks it in that of the bridge."""
    return lambda x, t: field(x.to(bridge.start), t).to(x)


def _log_normal(x: Tensor, variance: Tensor) -> Tensor:
    """log N(x; 0, variance I), x [N, d] -> [N]."""
    constant = x.shape[1] / 2 * (2 * math.pi * variance).log()
    return -x.square().sum(1) / (2 * variance) - constant


def _estimate(values: Tensor) -> Estimate:
    """From values [N]."""
    return Estimate.of(values.double().cpu().numpy())
