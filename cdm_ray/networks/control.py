"""The control of a diffusion bridge as a network: from states and times to drift, score, control.

The process dX = b(X) dt + sigma(t) dB, conditioned on X_T = end, has the drift b + a g with
a = sigma^2 and the score g = grad log p(X_T = end | X_t = x); its control is u = sigma g.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from cdm_ray.errors import ConfigError

if TYPE_CHECKING:
    from cdm_ray.processes.references import ReferenceProcess

Form = Literal["free", "gradient"]
Guide = Literal["brownian", "none"]
Coefficient = Literal["one", "sqrt"]

FREQUENCIES = 8
"""Waves of t / horizon that the network sees; the fastest has a period of a quarter."""
FIRST_OUTPUT = 0.01
"""Shrinks the last layer at initialisation, so that the field starts near 0."""
NEAREST = 1e-4
"""Share of the horizon: the least time left that the guide divides by."""


class ControlNetwork(torch.nn.Module):
    """Multilayer perceptron on ((x - location) / scale, waves of t / horizon), [N, d].

    `depth` hidden layers of `width` SiLU units. form "free": d outputs. "gradient": the gradient
    in x of one output phi, so that the field is curl-free.
    """

    location: Tensor
    scale: Tensor

    def __init__(
        self,
        dim: int,
        horizon: float,
        *,
        width: int,
        depth: int,
        form: Form,
        location: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("width", width), ("depth", depth)):
            if value < 1:
                raise ConfigError(f"{name}={value} of the control network; it has to be at least 1")
        if form not in ("free", "gradient"):
            raise ConfigError(f"form={form} of the control network; use free or gradient")
        self.form, self.horizon = form, horizon
        self.register_buffer("location", _vector("location", location, dim))
        self.register_buffer("scale", _vector("scale", scale, dim))
        if not (self.scale > 0).all():
            raise ConfigError(f"scale={scale} of the control network; it has to be positive")
        # Two halves of one layer: where all rows share their time, its half is computed once.
        self.from_state = torch.nn.Linear(dim, width)
        self.from_time = torch.nn.Linear(1 + 2 * FREQUENCIES, width, bias=False)
        self.hidden = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(depth - 1))
        # A constant in phi has no gradient.
        self.out = torch.nn.Linear(width, dim if form == "free" else 1, bias=form == "free")
        with torch.no_grad():
            self.out.weight *= FIRST_OUTPUT
            if form == "free":
                self.out.bias.zero_()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The field at x [..., d], [..., d]; the shape of t broadcasts with that of x but for d."""
        return self.field(x, self.of_time(t.to(x.dtype)))

    def of_time(self, t: Tensor) -> Tensor:
        """What the first layer has of the times t [...]: [..., width]."""
        return linear(self._waves(t), self.from_time.weight)

    def field(self, x: Tensor, of_time: Tensor) -> Tensor:
        """The field at x [..., d] and the times of which `of_time` was computed."""
        inputs = self._inputs_of_units(x, of_time)
        if self.form == "free":
            return linear(silu(inputs[-1]), self.out.weight, self.out.bias)
        # The chain rule from phi back to x, written out: it costs what autograd would, but is an
        # ordinary forward pass, which trains, has a jvp and simulates without building a graph.
        slope = self.out.weight * _silu_slope(inputs[-1])
        for layer, before in zip(reversed(self.hidden), reversed(inputs[:-1]), strict=True):
            assert isinstance(layer, torch.nn.Linear)
            slope = (slope @ layer.weight) * _silu_slope(before)
        return (slope @ self.from_state.weight) / self.scale

    def potential(self, x: Tensor, t: Tensor) -> Tensor:
        """phi at x [..., d] and t, of which the form "gradient" is the gradient: [...]."""
        if self.form != "gradient":
            raise ConfigError("a free control network has no potential; use form=gradient")
        inputs = self._inputs_of_units(x, self.of_time(t.to(x.dtype)))
        return self.out(silu(inputs[-1])).squeeze(-1)

    def _inputs_of_units(self, x: Tensor, of_time: Tensor) -> list[Tensor]:
        """What each hidden layer passes to its SiLU, first to last, [..., width]."""
        first = self.from_state
        # Not layer(x): a module's call costs as much as its product on few rows.
        inputs = [linear((x - self.location) / self.scale, first.weight, first.bias) + of_time]
        for layer in self.hidden:
            assert isinstance(layer, torch.nn.Linear)
            inputs.append(linear(silu(inputs[-1]), layer.weight, layer.bias))
        return inputs

    def _waves(self, t: Tensor) -> Tensor:
        """t [...] -> [..., features]."""
        share = t[..., None] / self.horizon
        order = torch.arange(1, FREQUENCIES + 1, dtype=t.dtype, device=t.device)
        phase = math.pi * order * share
        return torch.cat([2 * share - 1, phase.sin(), phase.cos()], dim=-1)


class BridgeControl(torch.nn.Module):
    """A bridge of `process` to `end` [d] at time `horizon`, with a learned part NN:

    drift_theta = drift_coefficient b(x) + guide + coefficient sigma NN(x, t)

    guide "brownian" is (end - x) / (horizon - t), the exact bridge of b = 0; coefficient "sqrt" is
    sqrt(horizon - t). `tolerance` may be set to the standard deviation to which the end is known:
    the guide is then (end - x) / (horizon - t + tolerance^2 / sigma^2).
    In d >= 2 the score is a gradient only if NN is, and if b is too or drift_coefficient is 1.

    States x are [..., d]; the shape of times t broadcasts with theirs but for d.
    """

    end: Tensor

    def __init__(
        self,
        network: ControlNetwork,
        process: ReferenceProcess,
        end: Tensor,
        horizon: float,
        *,
        drift_coefficient: float = 1.0,
        guide: Guide = "brownian",
        coefficient: Coefficient = "one",
    ) -> None:
        super().__init__()
        if end.shape != (process.dim,):
            raise ConfigError(
                f"end {list(end.shape)} of a process in {process.dim} dimensions; give its "
                f"{process.dim} coordinates"
            )
        if guide not in ("brownian", "none"):
            raise ConfigError(f"guide={guide}; use brownian or none")
        if coefficient not in ("one", "sqrt"):
            raise ConfigError(f"coefficient={coefficient}; use one or sqrt")
        self.network, self.process, self.horizon = network, process, horizon
        self.drift_coefficient, self.tolerance = drift_coefficient, 0.0
        self.guide, self.coefficient = guide, coefficient
        self.register_buffer("end", end.detach().clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The score g = (drift - b) / sigma^2: what the losses train, [..., d]."""
        sigma = self._sigma(x, t)
        steered = self._guide(x, t)
        if self.drift_coefficient != 1:
            more = (self.drift_coefficient - 1) * self._reference_drift(x)
            steered = more if steered is None else steered + more
        learned = self._strength(t.to(x.dtype)) * self.network(x, t) / sigma**2
        return learned if steered is None else learned + steered / sigma**2

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """g = grad log h: `forward` by its name."""
        return self(x, t)

    def control(self, x: Tensor, t: Tensor) -> Tensor:
        """u = sigma g, [..., d]."""
        return self._sigma(x, t) * self(x, t)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """drift_theta = b + a g, which simulates the bridge, [..., d]."""
        guide, rest = self._guide(x, t), self.rest(x, t)
        return rest if guide is None else rest + guide

    def rest(self, x: Tensor, t: Tensor) -> Tensor:
        """drift_theta without the guide, [..., d]."""
        return self._rest(x, self._strength(t.to(x.dtype)), self.network.of_time(t.to(x.dtype)))

    def rest_on(self, times: Tensor) -> Callable[[Tensor, int], Tensor]:
        """rest(x, k) = `rest` at x [N, d] and times[k], for simulations: what depends on the time
        alone is computed once for all, with the weights of now."""
        times = times.to(self.end.dtype)
        strengths, of_times = self._strength(times).unbind(), self.network.of_time(times).unbind()
        return lambda x, k: self._rest(x, strengths[k], of_times[k])

    def _rest(self, x: Tensor, strength: Tensor, of_time: Tensor) -> Tensor:
        rest = strength * self.network.field(x, of_time)
        if self.drift_coefficient != 0:
            rest = rest + self.drift_coefficient * self._reference_drift(x)
        return rest

    def _strength(self, t: Tensor) -> Tensor:
        """coefficient sigma at the times t [...]: [..., 1]."""
        strength = self.process.sigma(t)
        if self.coefficient == "sqrt":
            strength = strength * (self.horizon - t).clamp(min=0).sqrt()
        return strength[..., None]

    def _guide(self, x: Tensor, t: Tensor) -> Tensor | None:
        if self.guide == "none":
            return None
        left = (self.horizon - t).clamp(min=NEAREST * self.horizon).to(x.dtype)[..., None]
        if self.tolerance:
            left = left + (self.tolerance / self._sigma(x, t)) ** 2
        return (self.end - x) / left

    def _sigma(self, x: Tensor, t: Tensor) -> Tensor:
        """sigma(t) in the dtype of x, [..., 1]."""
        return self.process.sigma(t).to(x.dtype)[..., None]

    def _reference_drift(self, x: Tensor) -> Tensor:
        """b at x [..., d]; a process takes [N, d]."""
        return self.process.drift(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def _silu_slope(z: Tensor) -> Tensor:
    """d silu / dz."""
    share = z.sigmoid()
    return share * (1 + z * (1 - share))


def _vector(name: str, value: float | Sequence[float], dim: int) -> Tensor:
    vector = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if vector.shape not in ((), (dim,)):
        raise ConfigError(f"{name}={value} of the control network; give one number or {dim}")
    return vector.expand(dim).clone()
