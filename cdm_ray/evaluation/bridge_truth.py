"""What is known exactly about a diffusion bridge: h(x, t) = p(X_T = end | X_t = x).

Its score g = grad log h, in the coordinates of x, is what bridges learn; the control u = sigma g
and the bridge drift b + sigma^2 g follow from it.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cdm_ray.processes.references import Brownian, OrnsteinUhlenbeck, Schedule

# Exact for a quadratic, and to rounding for e^{2kr} times one over |k| (high - low) < 10.
_GAUSS_LEGENDRE = np.polynomial.legendre.leggauss(32)


class Truth(Protocol):
    """log h and its gradient, at times before the end, for states x [N, d]."""

    def log_density(self, x: Tensor, t: float) -> Tensor:
        """log p(X_T = end | X_t = x), [N]."""
        ...

    def score(self, x: Tensor, t: float) -> Tensor:
        """g = grad_x log p(X_T = end | X_t = x), [N, d]."""
        ...


class GaussianTruth:
    """Closed forms of a Brownian or Ornstein-Uhlenbeck process that is at `end` [d] at `duration`.

    With k the rate and m the mean (of a Brownian process 0), for s < t X_t | X_s = x is
    N(m + e^{-k(t-s)} (x - m), V(s, t) I) with V(s, t) = int_s^t e^{-2k(t-r)} sigma(r)^2 dr.
    Results have the dtype and device of the states that are given.
    """

    def __init__(self, process: Brownian | OrnsteinUhlenbeck, end: Tensor, duration: float) -> None:
        self.process, self.end, self.duration = process, end, duration
        if isinstance(process, OrnsteinUhlenbeck):
            self.rate, self.mean = process.rate, process.mean
        else:
            self.rate, self.mean = 0.0, torch.zeros((), dtype=torch.float64)

    def log_density(self, x: Tensor, t: float) -> Tensor:
        """log p(X_T = end | X_t = x), [N]."""
        miss, _, variance = self._miss(x, t)
        constant = self.process.dim / 2 * math.log(2 * math.pi * variance)
        return -miss.square().sum(1) / (2 * variance) - constant

    def score(self, x: Tensor, t: float) -> Tensor:
        """g = e^{-k(T-t)} (end - E[X_T | X_t = x]) / V(t, T), [N, d]."""
        miss, decay, variance = self._miss(x, t)
        return decay / variance * miss

    def log_evidence(self, start: Tensor) -> float:
        """log p(X_T = end | X_0 = start), start [d]."""
        return self.log_density(start[None], 0.0).item()

    def bridge(self, start: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Exact paths [K + 1, N, d] of the conditioned process at `times` [K + 1], which increase
        from that of `start` ([d] or [N, d]) to the end's at most, from standard normal noise
        [K, N, d]. Raises ValueError for times after the end."""
        moments = times.tolist()
        if moments[-1] > self.duration * (1 + 1e-6):  # a float32 grid may round upwards
            raise ValueError(f"times up to {moments[-1]} of a bridge of duration {self.duration}")
        moments[-1] = min(moments[-1], self.duration)
        end, mean = self.end.to(noise), self.mean.to(noise)
        states = [start.to(noise).expand_as(noise[0])]
        for s, t, draw in zip(moments[:-1], moments[1:], noise, strict=True):
            # Product of N(x_t; decay x_s, before) and N(end; decay_to_end x_t, after).
            before, after = self.variance(s, t), self.variance(t, self.duration)
            decay, to_end = self._decay(s, t), self._decay(t, self.duration)
            total = after + to_end**2 * before
            from_start, from_end = decay * (states[-1] - mean), end - mean
            average = (after * from_start + to_end * before * from_end) / total
            states.append(mean + average + math.sqrt(before * after / total) * draw)
        return torch.stack(states)

    def variance(self, s: float, t: float) -> float:
        """V(s, t) of one coordinate of X_t given X_s, s <= t."""
        sigma = self.process.noise
        if not isinstance(sigma, Schedule):
            if self.rate == 0:
                return sigma**2 * (t - s)
            return -(sigma**2) * math.expm1(-2 * self.rate * (t - s)) / (2 * self.rate)
        bounds = [s, *(knot for knot in sigma.times if s < knot < t), t]
        return sum(
            self._weighted_noise(sigma, low, high, t)
            for low, high in zip(bounds[:-1], bounds[1:], strict=True)
        )

    def _weighted_noise(self, sigma: Schedule, low: float, high: float, t: float) -> float:
        """int_low^high e^{-2k(t-r)} sigma(r)^2 dr between two knots."""
        nodes, weights = _GAUSS_LEGENDRE
        r = (low + high) / 2 + (high - low) / 2 * nodes
        values = np.exp(-2 * self.rate * (t - r)) * np.interp(r, sigma.times, sigma.values) ** 2
        return (high - low) / 2 * float(weights @ values)

    def _decay(self, s: float, t: float) -> float:
        return math.exp(-self.rate * (t - s))

    def _miss(self, x: Tensor, t: float) -> tuple[Tensor, float, float]:
        """end - E[X_T | X_t = x], the decay from t to the end, V(t, T)."""
        if not t < self.duration:
            raise ValueError(f"t={t}; a bridge of duration {self.duration} has a score before it")
        decay, mean = self._decay(t, self.duration), self.mean.to(x)
        expected = mean + decay * (x - mean)
        return self.end.to(x) - expected, decay, self.variance(t, self.duration)
