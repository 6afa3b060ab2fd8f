"""Reference processes of diffusion bridges: dX = b(X) dt + sigma(t) dB on R^d.

sigma is one positive number for all coordinates, or a `Schedule` of time, so that
a = sigma(t)^2 times the identity. States are [N, d] and keep their dtype and device. A process's
own drift b is meant throughout, never the drift b + a g of a bridge.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_ray.errors import ConfigError

SIGMA_OF_TIME_ONLY = (
    "sigma may depend on time only: where it depends on the state, the consistency identities have "
    "further terms that are not implemented, and without them what is learned is biased; transform "
    "the state so that sigma is constant (Lamperti), as CoxIngersollRoss does"
)


def state_dependent_sigma(what: str) -> ConfigError:
    """The refusal of a process, named by `what`, whose sigma depends on the state."""
    return ConfigError(f"{what}: {SIGMA_OF_TIME_ONLY}")


@dataclass(frozen=True)
class Schedule:
    """sigma(t), linear between `values` at increasing `times`, constant before and after.

    Raises ConfigError for fewer than two points, times that do not increase, values that are
    not positive.
    """

    times: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.times) < 2 or len(self.times) != len(self.values):
            raise ConfigError(
                f"schedule of sigma: {len(self.times)} times and {len(self.values)} values; "
                "give as many of each, two at least"
            )
        steps = zip(self.times[:-1], self.times[1:], strict=True)
        if not all(math.isfinite(t) for t in self.times) or not all(t < s for t, s in steps):
            raise ConfigError(
                f"schedule of sigma: times {list(self.times)}; they have to be finite and increase"
            )
        for value in self.values:
            _check_positive("schedule of sigma: value", value)

    def __call__(self, t: Tensor) -> Tensor:
        times = torch.tensor(self.times, dtype=t.dtype, device=t.device)
        values = torch.tensor(self.values, dtype=t.dtype, device=t.device)
        after = torch.searchsorted(times, t.contiguous()).clamp(1, len(times) - 1)
        before = after - 1
        share = (t - times[before]) / (times[after] - times[before])
        return torch.lerp(values[before], values[after], share.clamp(0, 1))


class ReferenceProcess(ABC):
    """dX = b(X) dt + sigma(t) dB in `dim` dimensions; `noise` is its sigma as it was given.

    Raises ConfigError for a sigma that is no positive number and no Schedule.
    """

    def __init__(self, dim: int, sigma: float | Schedule) -> None:
        if dim < 1:
            raise ConfigError(f"dim={dim}; a process has at least one dimension")
        if callable(sigma) and not isinstance(sigma, Schedule):
            raise ConfigError(
                f"sigma is a function; give a number or a schedule of time: {SIGMA_OF_TIME_ONLY}"
            )
        if not isinstance(sigma, Schedule):
            _check_positive("sigma", sigma)
        self.dim = dim
        self.noise = sigma

    @abstractmethod
    def drift(self, x: Tensor) -> Tensor:
        """b(x): [N, d] -> [N, d]; differentiable by autograd and by torch.func."""

    def sigma(self, t: Tensor) -> Tensor:
        """sigma at the times t, [N] or 0-dim: of their shape and dtype."""
        if isinstance(self.noise, Schedule):
            return self.noise(t)
        return torch.full_like(t, self.noise)

    def inside(self, x: Tensor) -> Tensor:
        """Which states are in the process's domain: [N, d] -> bool [N].

        The domain is all of R^d unless a process says otherwise; states that are not finite are
        never in it. Outside of it the drift means nothing, whatever its value, and Euler steps can
        lead there from inside: a simulation has to ask.
        """
        return x.isfinite().all(-1)


class GradientProcess(ReferenceProcess):
    """A process that runs down a potential: b = -grad U."""

    @abstractmethod
    def potential(self, x: Tensor) -> Tensor:
        """U(x): [N, d] -> [N]."""


def jacobian_transpose(process: ReferenceProcess, x: Tensor, v: Tensor) -> Tensor:
    """(grad b(x))^T v for every row, by one vjp: x, v [N, d] -> [N, d].

    (grad b)_ij = db_i/dx_j. Works under torch.no_grad, and inside of transforms of torch.func.
    """
    # Not torch.autograd.grad: a drift that is constant has a derivative too.
    transpose = torch.func.vjp(process.drift, x)[1]
    return transpose(v)[0]


class Brownian(GradientProcess):
    """sigma dB: no drift."""

    def drift(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def potential(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[..., 0])


class OrnsteinUhlenbeck(GradientProcess):
    """b = -rate (x - mean); `mean` one number, or d of them. A negative rate drives away."""

    def __init__(
        self,
        dim: int,
        sigma: float | Schedule,
        rate: float,
        mean: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__(dim, sigma)
        if not math.isfinite(rate):
            raise ConfigError(f"rate={rate}; it has to be finite")
        self.rate = rate
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        if self.mean.shape not in ((), (dim,)) or not self.mean.isfinite().all():
            raise ConfigError(f"mean={mean} of a process with dim={dim}; give one number or {dim}")

    def drift(self, x: Tensor) -> Tensor:
        return self.rate * (self.mean.to(x) - x)

    def potential(self, x: Tensor) -> Tensor:
        return self.rate / 2 * (x - self.mean.to(x)).square().sum(-1)


class DoubleWell(GradientProcess):
    """U = height (x^2 - well^2)^2 in one dimension: minima at +-well, a barrier of
    height well^4 at 0."""

    def __init__(self, sigma: float | Schedule, height: float, well: float = 1.0) -> None:
        super().__init__(1, sigma)
        _check_positive("height", height)
        _check_positive("well", well)
        self.height, self.well = height, well

    def drift(self, x: Tensor) -> Tensor:
        return -4 * self.height * x * (x * x - self.well**2)

    def potential(self, x: Tensor) -> Tensor:
        return self.height * (x[..., 0] ** 2 - self.well**2) ** 2


class CoxIngersollRoss(GradientProcess):
    """dX = rate (mean - X) dt + volatility sqrt(X) dB, x > 0, in the states y = 2 sqrt(x) /
    volatility > 0 of Lamperti's transformation, where sigma = 1:

        dY = [ (order + 1/2) / Y - rate Y / 2 ] dt + dB,  order = 2 rate mean / volatility^2 - 1.

    All that has states has them as y, starts, ends, paths and scores among them; `to_lamperti` and
    `from_lamperti` convert states. Y never reaches 0, since order >= 0 (Feller's condition), but
    Euler steps can jump over it: `inside` is y > 0, and beyond it drift and potential are not
    finite (infinite at 0, NaN below), so that a path that left is NaN from its next state on.
    Next to 0 the drift is stiff: dt has to be well below y^2 / (order + 1/2).

    Raises ConfigError for parameters that are not positive, or below Feller's condition.
    """

    def __init__(self, rate: float, mean: float, volatility: float) -> None:
        super().__init__(1, 1.0)
        for name, value in (("rate", rate), ("mean", mean), ("volatility", volatility)):
            _check_positive(name, value)
        if 2 * rate * mean < volatility**2:
            raise ConfigError(
                f"rate={rate}, mean={mean}, volatility={volatility}: 2 rate mean is below "
                "volatility^2 (Feller's condition), so the process reaches 0, where its bridges "
                "need a boundary condition; raise rate or mean, or lower volatility"
            )
        self.rate, self.mean, self.volatility = rate, mean, volatility
        self.order = 2 * rate * mean / volatility**2 - 1

    def drift(self, x: Tensor) -> Tensor:
        inverse = x.rsqrt().square()  # 1/x, but NaN below 0, and its derivative too
        return (self.order + 0.5) * inverse - self.rate / 2 * x

    def potential(self, x: Tensor) -> Tensor:
        y = x[..., 0]
        return self.rate / 4 * y.square() - (self.order + 0.5) * y.log()

    def inside(self, x: Tensor) -> Tensor:
        return super().inside(x) & (x > 0).all(-1)

    def to_lamperti(self, x: Tensor) -> Tensor:
        """y = 2 sqrt(x) / volatility, elementwise; raises ConfigError unless x > 0."""
        return 2 / self.volatility * self._positive("x", x).sqrt()

    def from_lamperti(self, y: Tensor) -> Tensor:
        """x = (volatility y / 2)^2, elementwise; raises ConfigError unless y > 0."""
        return (self.volatility / 2 * self._positive("y", y)).square()

    @staticmethod
    def _positive(name: str, states: Tensor) -> Tensor:
        bad = states[~(states.isfinite() & (states > 0))]
        if len(bad):
            raise ConfigError(
                f"{name}={bad[0].item()} is no state of a Cox-Ingersoll-Ross process; states have "
                "to be positive"
            )
        return states


class Cell(ReferenceProcess):
    """Two genes that further themselves and suppress each other:
    b_i = x_i^4 / (2^-4 + x_i^4) + 2^-4 / (2^-4 + x_j^4) - x_i.

    The model of cell differentiation of Wang et al. (PNAS 2011, doi 10.1073/pnas.1017017108) with
    the constants of Heng et al., "Simulating Diffusion Bridges with Score Matching"
    (arXiv 2111.07243). Stable at (1, 1), the undifferentiated cell, and near (2, 0) and (0, 2),
    the two kinds it can become. There is no potential.
    """

    def __init__(self, sigma: float | Schedule) -> None:
        super().__init__(2, sigma)

    def drift(self, x: Tensor) -> Tensor:
        active = 1 - 2**-4 / (2**-4 + x**4)  # x^4 / (2^-4 + x^4)
        return active + (1 - active.flip(-1)) - x


class MuellerBrown(GradientProcess):
    """U = sum_k A_k exp(a_k dx^2 + b_k dx dy + c_k dy^2), (dx, dy) from the k-th centre.

    Mueller and Brown, Theor. Chim. Acta 53 (1979) 75. Minima at (-0.558, 1.442), (0.623, 0.028)
    and (-0.050, 0.467), of heights -146.7, -108.2 and -80.8; saddles at (-0.822, 0.624) and
    (0.212, 0.293), of heights -40.7 and -72.2. Gradients reach thousands within a unit of the
    minima: Euler steps have to be short.
    """

    # Rows: A, a, b, c, centre x, centre y.
    _TERMS = torch.tensor(
        [
            (-200, -100, -170, 15),
            (-1, -1, -6.5, 0.7),
            (0, 0, 11, 0.6),
            (-10, -10, -6.5, 0.7),
            (1, 0, -0.5, -1),
            (0, 0.5, 1.5, 1),
        ],
        dtype=torch.float64,
    )

    def __init__(self, sigma: float | Schedule) -> None:
        super().__init__(2, sigma)

    def drift(self, x: Tensor) -> Tensor:
        a, b, c, dx, dy, term = self._parts(x)
        along_x = term * (2 * a * dx + b * dy)
        along_y = term * (b * dx + 2 * c * dy)
        return -torch.stack((along_x.sum(-1), along_y.sum(-1)), dim=-1)

    def potential(self, x: Tensor) -> Tensor:
        return self._parts(x)[-1].sum(-1)

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """a, b, c [4], dx, dy [N, 4] and the four terms of U [N, 4]."""
        depth, a, b, c, centre_x, centre_y = self._TERMS.to(x).unbind()
        dx, dy = x[..., :1] - centre_x, x[..., 1:] - centre_y
        term = depth * (a * dx * dx + b * dx * dy + c * dy * dy).exp()
        return a, b, c, dx, dy, term


def _check_positive(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value}; it has to be a positive number")
