"""Paths of dX = drift(X, t) dt + sigma(t) dB on a grid of times, all of their states kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cdm_ray.errors import RunFailed
from cdm_ray.processes.references import ReferenceProcess
from cdm_ray.processes.rollout import Field, path


@dataclass(frozen=True)
class Paths:
    """N paths of K steps that share their times."""

    states: Tensor
    """X [K + 1, N, d]."""
    times: Tensor
    """[K + 1], increasing."""
    increments: Tensor | None = None
    """The increments dB [K, N, d] of mean 0 that drove them, where known."""

    @property
    def steps(self) -> Tensor:
        """dt [K, 1, 1] in the dtype of the states."""
        return self.times.diff().to(self.states.dtype).reshape(-1, 1, 1)


@torch.no_grad()
def simulate(
    drift: Field,
    process: ReferenceProcess,
    start: Tensor,
    times: Tensor,
    noise: Tensor,
    *,
    pinned: bool = False,
) -> Paths:
    """Euler-Maruyama from `start` [N, d] at times [K + 1]; one call of `drift` per step.

    X_{k+1} = X_k + drift(X_k, t_k) dt + sigma(t_k) dB_k with dB_k = sqrt(dt) `noise`_k, `noise`
    [K, N, d] standard normal; the process gives sigma alone. Nothing has a gradient.

    `pinned`, for drifts that lead to a fixed state at times[-1] = T: dB_k has the variance
    dt (T - t_{k+1}) / (T - t_k) of a Brownian bridge, so that b = 0 has no error of discretisation.
    """
    lengths = times.diff().to(start.dtype)
    variances = lengths
    if pinned:
        left = (times[-1] - times).to(start.dtype)
        variances = lengths * left[1:] / left[:-1]
    increments = variances.sqrt().reshape(-1, 1, 1) * noise
    kicks = process.sigma(times[:-1]).to(start.dtype).reshape(-1, 1, 1) * increments
    states = start.new_empty(len(times), *start.shape)
    states[0] = start
    for k, state in enumerate(path(drift, _step, start, times, partial(next, iter(kicks)))):
        states[k + 1] = state
    return Paths(states, times, increments)


@torch.no_grad()
def simulate_guided(
    rest: Callable[[Tensor, int], Tensor],
    end: Tensor,
    process: ReferenceProcess,
    start: Tensor,
    times: Tensor,
    noise: Tensor,
    *,
    tolerance: float = 0.0,
) -> Paths:
    """Paths of dX = ((end - X) / (T - t) + rest(X, t)) dt + sigma(t) dB from `start` [N, d] at
    times [K + 1], T the last of them; one call of rest(x, k), which is at times[k], per step.
    Nothing has a gradient.

    The guide to `end` [d] is linear, so its step is exact, with the Brownian bridge's noise, of
    which `noise` [K, N, d] is the standard normal; with L = T - t_k and L' = T - t_{k+1},

        X_{k+1} = X_k + (end - X_k) dt / L + w (r_k + r_{k+1}) / 2 + sigma sqrt(dt L' / L) noise_k

    and w = L' log(L / L'), which is the whole of it for a constant rest. r_{k+1} is the rest at the
    state that r_k alone leads to: a Heun step whose second evaluation serves as the first one of
    the next, so that a step costs what an Euler step does. Weakly of second order in dt. The last
    step ends at `end`. A `tolerance` adds (tolerance / sigma)^2 to L and L', as in `BridgeControl`.
    """
    sigmas = process.sigma(times[:-1]).to(start.dtype)
    slack = (tolerance / sigmas.double()) ** 2
    left = (times[-1] - times[:-1]).double() + slack
    left_after = (times[-1] - times[1:]).double() + slack
    lengths = times.diff().double()
    pulls = (lengths / left).tolist()
    increments = (lengths * left_after / left).sqrt().to(start.dtype).reshape(-1, 1, 1) * noise
    kicks = sigmas.reshape(-1, 1, 1) * increments
    gained = torch.xlogy(left_after, left / left_after.clamp(min=1e-300)).tolist()
    end = end.to(start)
    states = start.new_empty(len(times), *start.shape)
    states[0] = x = start
    value = rest(start, 0)
    for k, (pull, w) in enumerate(zip(pulls, gained, strict=True)):
        guided = torch.lerp(x, end, pull).add_(kicks[k])
        if k < len(pulls) - 1:
            later = rest(torch.add(guided, value, alpha=w), k + 1)
            x = guided.add_(value.add_(later), alpha=w / 2)
            value = later
        else:
            x = guided.add_(value, alpha=w)
        states[k + 1] = x
    return Paths(states, times, increments)


def _step(x: Tensor, drift: Tensor, t: Tensor, t_next: Tensor, kick: Tensor) -> Tensor:
    return x + drift * (t_next - t) + kick


def check_paths(paths: Paths, process: ReferenceProcess, what: str) -> None:
    """Raise RunFailed if states of the paths are not finite or not inside of the process's domain;
    it says where that happened first, after `what`, which says when."""
    inside = process.inside(paths.states.flatten(0, 1)).reshape(paths.states.shape[:2])
    if inside.all():
        return
    outside = ~inside
    step = int(outside.any(1).int().argmax())
    path_number = int(outside[step].int().argmax())
    before = paths.states[max(step - 1, 0), path_number].tolist()
    now = paths.states[step, path_number].tolist()
    t, dt = paths.times[step].item(), paths.steps[max(step - 1, 0)].item()
    sigma = process.sigma(paths.times[max(step - 1, 0)]).item()
    raise RunFailed(
        f"{what}: a path left the domain of its process at step {step} of {len(paths.times) - 1} "
        f"(t={t:g}): from {before} to {now}, with sigma={sigma:g} and dt={dt:g}; raise the number "
        "of time steps, or lower optimizer.lr or sigma"
    )
