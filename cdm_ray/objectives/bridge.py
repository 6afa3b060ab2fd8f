"""Control consistency for diffusion bridges (arXiv 2512.05070): targets along simulated paths.

For dX = b(X) dt + sigma(t) dB conditioned on X_T = end, the score g = grad log h obeys along the
bridge dg(X, t) = -(grad b)^T g dt + grad g sigma dB. So, for any auxiliary drift f and dJ = grad f
J dr,

    g(x, s) = E[J_t^T g(X_t, t) + int_s^t J_r^T (grad b - grad f)^T g(X_r, r) dr | X_s = x],

which is SC1 with f = b and SC2 with f = 0. K steps dt of a path have scores at X_0 .. X_{K-1}; the
last of them needs no network: the end fixes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cdm_ray.errors import ConfigError
from cdm_ray.objectives.consistency import regress
from cdm_ray.processes.references import ReferenceProcess, jacobian_transpose
from cdm_ray.processes.rollout import Field
from cdm_ray.processes.simulation import Paths

Weighting = Literal["inclusive", "average", "sqrt", "geom", "next", "endpoint", "window"]
Variate = Literal["none", "noise", "innovation"]

CHUNK_ROWS = 2**15
"""Most (path, time) pairs that the network or a derivative of the drift sees in one call."""


@dataclass(frozen=True)
class ControlConsistency:
    """Targets F_k of the score at every state X_k of a path, and the loss
    sigma^2 |g_theta - F_k|^2.

    With the end's score a^-1 ((end - X_{K-1}) / dt - b) as F_{K-1} and g_{K-1}, and B_k below,
    backwards F_k = P_k (B_k F_{k+1} + (1 - B_k) g_{k+1}). A step P_k v = J_k^T (v + s_{k+1}) + s_k
    has the running cost s_k = (grad b_k - grad f_k)^T g_k dt / 2 at its two ends, the
    trapezoidal rule, and J_k = I + (f_k + f_{k+1}) dt / 2 + f_{k+1} f_k dt^2 / 2, f for grad f,
    Heun's rule: with the left ends alone the error is of first order in dt.
    """

    process: ReferenceProcess
    end: Tensor
    """[d]."""
    auxiliary: ReferenceProcess | None = None
    """Its drift is f: None is SC2, the reference process itself SC1."""
    weighting: Weighting = "inclusive"
    """B_k: "average" (T - t_{k+1}) / (T - t_k), "sqrt" its power 1.5, "geom" `decay`, "next" 0,
    "endpoint" 1. "inclusive" has the B_k of average, but F_k = (1 - B_k) g_k + B_k P_k F_{k+1}: for
    b = 0 on own paths it is right after one sweep, whatever g. "window" takes the score `window`
    steps later, or the end's."""
    decay: float = 0.9
    window: int = 20
    tolerance: float = 0.0
    """Standard deviation to which the end is known."""
    variate: Variate = "none"
    """Subtracts grad g(X_k, t_{k+1}) n_k from what P_k moves: n_k is sigma dB_k for "noise", of
    mean 0; dX_k - (b + a g) dt for "innovation", the same on paths that the scores drove
    themselves. On paths of other scores targets are biased without the innovation, and right with
    it."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("weighting", self.weighting, get_args(Weighting)),
            ("variate", self.variate, get_args(Variate)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value}; use one of {', '.join(allowed)}")
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay={self.decay} of weighting=geom; use a number in [0, 1]")
        if self.window < 1:
            raise ConfigError(f"window={self.window}; a window has at least 1 step")

    @torch.no_grad()
    def targets(self, score: Field, paths: Paths) -> Tensor:
        """F [K, N, d] by the scores score(x [k, N, d], t [k, 1]), without gradient."""
        scores, variate = self.scores(score, paths)
        return self.sweep(paths, scores, variate)

    @torch.no_grad()
    def scores(self, score: Field, paths: Paths) -> tuple[Tensor, Tensor | None]:
        """g_k [K, N, d] and, unless variate="none", (grad g) n_k [K - 1, N, d]."""
        x = paths.states[:-1]
        times = paths.times[:-1, None]
        scores = _in_chunks(score, x, times)
        if self.variate == "none":
            return scores, None
        if self.variate == "innovation":
            drift = _by_rows(self.process.drift, x) + self._sigma(paths) ** 2 * scores
            noise = paths.states.diff(dim=0) - drift * paths.steps
        elif paths.increments is not None:
            noise = self._sigma(paths) * paths.increments
        else:
            raise ConfigError(
                "variate=noise needs the increments of the paths, and these have none; "
                "use variate=innovation for replayed paths"
            )

        def derivative(x: Tensor, t: Tensor, n: Tensor) -> Tensor:
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(score(forward_ad.make_dual(x, n), t)).tangent
            return torch.zeros_like(x) if tangent is None else tangent

        # At t_{k+1}, since it is g_{k+1} that the noise of the step reaches: where g is linear
        # nothing of it is left, while grad g at t_k misses by a share dt / (T - t).
        return scores, _in_chunks(derivative, x[:-1], times[1:], noise[:-1])

    @torch.no_grad()
    def sweep(self, paths: Paths, scores: Tensor, variate: Tensor | None = None) -> Tensor:
        """F [K, N, d] by what `scores` returns."""
        known = torch.cat([scores[:-1], self.anchor(paths)[None]])
        x, dt = paths.states[:-1], paths.steps[:-1]
        costs = self._running_cost(x, known) / 2
        before, after = costs[:-1] * dt, costs[1:] * dt
        if variate is not None:
            # All that the noise does in its step, by the derivatives of b and f at the beginning,
            # which do not know the noise: with those of the end its mean would not be 0.
            noise = variate + self._running_cost(x[:-1], variate) / 2 * dt
            before = before - self._transported(x[:-1], x[:-1], noise, dt)
        if self.weighting == "window":
            result = known
            for _ in range(min(self.window, len(dt))):
                moved = self._transported(x[:-1], x[1:], result[1:] + after, dt) + before
                result = torch.cat([moved, known[-1:]])
            return result
        kept, slopes = self._kept(paths), self._slopes(x)
        result = torch.empty_like(known)
        result[-1] = known[-1]
        for k in range(len(dt) - 1, -1, -1):
            later = result[k + 1]
            if self.weighting != "inclusive":
                later = torch.lerp(known[k + 1], later, kept[k])
            later = later + after[k]
            if slopes is not None:
                slope = torch.einsum("nij,ni->nj", slopes(k + 1), later)
                back = torch.einsum("nij,ni->nj", slopes(k), later + dt[k] * slope)
                later = later + dt[k] / 2 * (slope + back)
            later = later + before[k]
            result[k] = (
                torch.lerp(known[k], later, kept[k]) if self.weighting == "inclusive" else later
            )
        return result

    def anchor(self, paths: Paths) -> Tensor:
        """grad log N(end; X + b dt, sigma^2 dt + tolerance^2) at X_{K-1}, [N, d], but for the
        gradient of b: it leads an Euler step from there to the end."""
        x, sigma, dt = paths.states[-2], self._sigma(paths)[-1], paths.steps[-1]
        miss = self.end.to(x) - x - self.process.drift(x) * dt
        return miss / (sigma**2 * dt + self.tolerance**2)

    def loss(self, score: Field, paths: Paths, targets: Tensor, pairs: Tensor) -> Tensor:
        """sigma^2 |g_theta - F|^2 of the given pairs, [M]: twice the rate of the KL between the
        paths, but for the variance of F. Pair k N + n is path n at time k < K."""
        number = paths.states.shape[1]
        x, target = paths.states.flatten(0, 1)[pairs], targets.flatten(0, 1)[pairs]
        t = paths.times[pairs // number]
        sigma = self.process.sigma(t).to(x.dtype)[:, None]
        return regress(sigma * score(x, t), sigma * target)

    def _sigma(self, paths: Paths) -> Tensor:
        """sigma(t_k), [K, 1, 1]."""
        return self.process.sigma(paths.times[:-1]).to(paths.states.dtype).reshape(-1, 1, 1)

    def _kept(self, paths: Paths) -> Tensor:
        """B_k for k = 0 .. K - 2."""
        left = (paths.times[-1] - paths.times[:-1]).to(paths.states.dtype)
        ratio = left[1:] / left[:-1]
        match self.weighting:
            case "sqrt":
                return ratio**1.5
            case "geom":
                return torch.full_like(ratio, self.decay)
            case "next":
                return torch.zeros_like(ratio)
            case "endpoint":
                return torch.ones_like(ratio)
            case _:
                return ratio

    def _running_cost(self, x: Tensor, scores: Tensor) -> Tensor:
        """(grad b - grad f)^T g at x, both [K, N, d]."""
        if self.auxiliary is self.process:
            return torch.zeros_like(scores)
        pull = _by_rows(lambda x, v: jacobian_transpose(self.process, x, v), x, scores)
        return pull if self.auxiliary is None else pull - self._pull_back(x, scores)

    def _slopes(self, x: Tensor) -> Callable[[int], Tensor] | None:
        """grad f at x[k], x [K, N, d], as a function of k that is asked from the last to the first:
        [N, d, d]; some times are computed at once. None if there is no f."""
        f = self.auxiliary
        if f is None:
            return None
        number, dim = x.shape[1:]
        size = max(1, CHUNK_ROWS // (number * dim))
        computed: dict[int, Tensor] = {}

        def slopes(k: int) -> Tensor:
            block = k // size
            if block not in computed:
                for later in [b for b in computed if b > block + 1]:
                    del computed[later]
                rows = x[block * size : (block + 1) * size].reshape(-1, dim)
                units = torch.eye(dim, dtype=x.dtype, device=x.device)
                found = [jacobian_transpose(f, rows, unit.expand_as(rows)) for unit in units]
                computed[block] = torch.stack(found, dim=1).unflatten(0, (-1, number))
            return computed[block][k % size]

        return slopes

    def _transported(self, x: Tensor, x_next: Tensor, v: Tensor, dt: Tensor) -> Tensor:
        """J^T v of the step from x to x_next; all [..., N, d]."""
        if self.auxiliary is None:
            return v
        slope = self._pull_back(x_next, v)
        return v + dt / 2 * (slope + self._pull_back(x, v + dt * slope))

    def _pull_back(self, x: Tensor, v: Tensor) -> Tensor:
        """(grad f)^T v at x; all [..., N, d]."""
        f = self.auxiliary
        assert f is not None
        return _by_rows(lambda x, v: jacobian_transpose(f, x, v), x, v)


def _in_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function of tensors [K, ...], some times of all paths at once, at most `CHUNK_ROWS` rows."""
    size = max(1, CHUNK_ROWS // tensors[0].shape[1])
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])


def _by_rows(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function of tensors [N, d], of tensors [..., N, d] taken as rows, `CHUNK_ROWS` at a time."""
    lead = tensors[0].shape[:-1]
    rows = [tensor.reshape(-1, tensor.shape[-1]).split(CHUNK_ROWS) for tensor in tensors]
    return torch.cat([function(*chunk) for chunk in zip(*rows, strict=True)]).unflatten(0, lead)
