"""What is known exactly about a diffusion bridge: h(x, t) = p(X_T = end | X_t = x).

Its score g = grad log h, in the coordinates of x, is what bridges learn; the control u = sigma g
and the bridge drift b + sigma^2 g follow from it.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import numpy as np
import torch
from numpy.polynomial import Polynomial
from numpy.typing import NDArray
from scipy.special import gammaln, hyp0f1, ive
from torch import Tensor

from cdm_ray.errors import ConfigError
from cdm_ray.processes.references import Brownian, CoxIngersollRoss, OrnsteinUhlenbeck, Schedule

Array = NDArray[np.float64]

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
        _time_left(t, self.duration)
        decay, mean = self._decay(t, self.duration), self.mean.to(x)
        expected = mean + decay * (x - mean)
        return self.end.to(x) - expected, decay, self.variance(t, self.duration)


class CIRTruth:
    """Closed form of a Cox-Ingersoll-Ross process that is at `end` [1] at `duration`, in the
    states y of Lamperti's transformation.

    x_T given x_t is noncentral chi-square times a constant (Cox, Ingersoll and Ross, Econometrica
    53 (1985) 385). With tau = T - t, the moments m = e^{-rate tau / 2} y and
    V = (1 - e^{-rate tau}) / rate of an Ornstein-Uhlenbeck process, z = m end / V and q the
    process's order, its density is in y

        h = N(end; m, V) (end / m)^{q + 1/2} sqrt(2 pi z) e^{-z} I_q(z),

    that of x_T is h dy_T/dx_T = h 2 / (volatility^2 end). sigma is 1, so the control is the score.
    Results are computed in float64, have the dtype and device of the states that are given and are
    NaN for states that are not positive. Raises ConfigError for an end that is not.
    """

    def __init__(self, process: CoxIngersollRoss, end: Tensor, duration: float) -> None:
        if not process.inside(end[None]).all():
            raise ConfigError(
                f"end={end.tolist()} of a bridge of a Cox-Ingersoll-Ross process; it has to be "
                "positive"
            )
        self.process, self.end, self.duration = process, end, duration

    def log_density(self, x: Tensor, t: float) -> Tensor:
        """log p(Y_T = end | Y_t = y), [N], for the states y = x [N, 1]."""
        y, end, decay, variance = self._parts(x, t)
        order = self.process.order
        gaussian = -((end - decay * y) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2
        tilt = (order + 0.5) * np.log(end / (decay * y))
        bessel = _log_bessel(order, decay / variance * end * y)
        return torch.from_numpy(gaussian + tilt + bessel).to(x)

    def score(self, x: Tensor, t: float) -> Tensor:
        """g = e^{-rate tau / 2} (end I_{q+1}(z) / I_q(z) - m) / V, [N, 1], since
        I_q' = I_{q+1} + q I_q / z."""
        y, end, decay, variance = self._parts(x, t)
        z, order = decay / variance * end * y, self.process.order
        # Ratio of Bessel functions - 1, which is lost in 1 / V near the end if 1 is subtracted.
        excess = np.expm1(_log_bessel(order + 1, z) - _log_bessel(order, z))
        return torch.from_numpy(decay / variance * (end - decay * y + end * excess)).to(x)[:, None]

    def log_evidence(self, start: Tensor) -> float:
        """log p(Y_T = end | Y_0 = start), start [1]."""
        return self.log_density(start[None], 0.0).item()

    def _parts(self, x: Tensor, t: float) -> tuple[Array, float, float, float]:
        """y [N], the end, e^{-rate tau / 2}, V."""
        tau, rate = _time_left(t, self.duration), self.process.rate
        y = x.detach().to("cpu", torch.float64)[:, 0]
        y = torch.where(self.process.inside(y[:, None]), y, torch.nan)
        return (
            y.numpy(),
            self.end.item(),
            math.exp(-rate * tau / 2),
            -math.expm1(-rate * tau) / rate,
        )


_FAR = 50.0


def _log_bessel(order: float, z: Array) -> Array:
    """log of sqrt(2 pi z) e^{-z} I_order(z), which tends to 0 as z grows; order >= 0, z > 0 [N].

    Without underflow. The uniform expansion (DLMF 10.41.3), whose terms are powers of
    1 / hypot(order, z), takes over where that is small: at `_FAR` its error is below 1e-11.
    """
    radius, result = np.hypot(order, z), np.empty_like(z)
    far = radius > _FAR
    near = ~far & (z < 1)
    rest = ~(far | near)

    size, at = radius[far], z[far]
    terms = (u(order / size) / size**k for k, u in enumerate(_debye_polynomials()))
    excess = order**2 / (size + at)  # size - z, without cancellation
    result[far] = excess - order * np.arcsinh(order / at) - np.log(size / at) / 2
    result[far] += np.log(sum(terms))

    at = z[near]
    result[near] = order * np.log(at / 2) - gammaln(order + 1) - at + np.log(2 * np.pi * at) / 2
    result[near] += np.log(hyp0f1(order + 1, at**2 / 4))

    at = z[rest]
    result[rest] = np.log(ive(order, at)) + np.log(2 * np.pi * at) / 2
    return result


@functools.cache
def _debye_polynomials(count: int = 7) -> tuple[Polynomial, ...]:
    """U_k(p) / p^k of DLMF 10.41.9 for k < count."""
    found = [Polynomial([1.0])]
    for _ in range(count - 1):
        u = found[-1]
        slope = Polynomial([0, 0, 0.5, 0, -0.5]) * u.deriv()
        found.append(slope + (Polynomial([1, 0, -5]) / 8 * u).integ())
    return tuple(Polynomial(u.coef[k:]) for k, u in enumerate(found))


def _time_left(t: float, duration: float) -> float:
    if not t < duration:
        raise ValueError(f"t={t}; a bridge of duration {duration} has a score before it")
    return duration - t
