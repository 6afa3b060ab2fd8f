"""A drift of the user's own, named in a recipe as `module:function`, checked before a run starts.

The function gets states x [N, d] and returns b(x) [N, d] in the same dtype, each row from its own
state, in operations that PyTorch can differentiate:

    def drift(x):
        return -(x**3)
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from cdm_ray.errors import ConfigError
from cdm_ray.processes.references import (
    SIGMA_OF_TIME_ONLY,
    ReferenceProcess,
    Schedule,
    jacobian_transpose,
    state_dependent_sigma,
)

Drift = Callable[[Tensor], Tensor]


class UserProcess(ReferenceProcess):
    """A process with a drift of the user's, see `drift_from`."""

    def __init__(self, dim: int, sigma: float | Schedule, function: Drift) -> None:
        super().__init__(dim, sigma)
        self.function = function

    def drift(self, x: Tensor) -> Tensor:
        return self.function(x)


def drift_from(
    spec: str, dim: int, sigma: float | Schedule, start: Tensor, end: Tensor
) -> UserProcess:
    """The process with the drift `module:function`, tried on the states `start` and `end` [d].

    Raises ConfigError, with the spec, for a function that cannot be imported or called, that
    wants or gives a sigma, whose result has another shape or dtype than the states, mixes rows,
    is not finite at the two states, or has no derivative there that autograd finds.
    """
    function = _imported(spec)
    _check_arguments(spec, function)
    process = UserProcess(dim, sigma, function)
    for dtype in (torch.float32, torch.float64):
        states = torch.stack((start, end)).to(dtype)
        _check_values(spec, process, states)
    _check_rows(spec, process, states)
    _check_derivative(spec, process, states)
    return process


def _imported(spec: str) -> Drift:
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ConfigError(f"drift={spec}; give module:function, e.g. my_models:my_drift")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's file does when it is run
        raise ConfigError(
            f"drift={spec}: cannot import {module_name} ({_described(error)}); "
            "its folder has to be on PYTHONPATH"
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"drift={spec}: there is no {name} in {module_name}")
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(f"drift={spec}: {name} is no function; give one of the states x [N, d]")
    return function


def _check_arguments(spec: str, function: Drift) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin that does not say
        return
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        raise ConfigError(
            f"drift={spec}: it wants {', '.join(needed)}, but a drift gets the states x [N, d] "
            f"alone; it does not depend on time, and {SIGMA_OF_TIME_ONLY}"
        )


def _check_values(spec: str, process: UserProcess, states: Tensor) -> None:
    """Kind, shape, dtype and finiteness at `states` [2, d]."""
    batch = states.repeat(2, 1)[:3]  # 3 rows, so that the wrong axis shows even if d = 2
    result = _called(spec, process, batch)
    if isinstance(result, (tuple, list, dict)):
        raise state_dependent_sigma(
            f"drift={spec}: it returns a {type(result).__name__}, not b(x) alone"
        )
    if not isinstance(result, Tensor):
        raise ConfigError(f"drift={spec}: it returns {type(result).__name__}, not a tensor [N, d]")
    if result.shape != batch.shape:
        raise ConfigError(
            f"drift={spec}: it turns states of shape {list(batch.shape)} into "
            f"{list(result.shape)}; it has to keep [N, d] with d = {process.dim}"
        )
    if result.dtype != batch.dtype:
        raise ConfigError(
            f"drift={spec}: it turns {batch.dtype} into {result.dtype}; it has to keep the dtype, "
            "make its constants Python numbers or use .to(x)"
        )
    for which, state, value in zip(("start", "end"), batch, result, strict=False):
        if not value.isfinite().all():
            raise ConfigError(
                f"drift={spec}: it is {value.tolist()} at the {which} {state.tolist()}; "
                "it has to be finite there"
            )


def _check_rows(spec: str, process: UserProcess, states: Tensor) -> None:
    """That rows are independent; `states` [2, d] in float64, where rounding cannot look like it."""
    together = _called(spec, process, states)
    alone = torch.cat([_called(spec, process, row[None]) for row in states])
    if not torch.allclose(together, alone, rtol=1e-6, atol=1e-6):
        raise ConfigError(
            f"drift={spec}: a state's drift changes with the other rows of the batch, or from call "
            "to call; every row has to depend on its own state only"
        )


def _check_derivative(spec: str, process: UserProcess, states: Tensor) -> None:
    """v^T (grad b) w by autograd against central differences, in a few random directions;
    `states` [2, d] in float64."""
    generator = torch.Generator().manual_seed(0)
    step = 1e-5 * (1 + states.abs().amax())
    for _ in range(3):
        v, w = torch.randn((2, *states.shape), generator=generator, dtype=states.dtype)
        try:
            found = (jacobian_transpose(process, states, v) * w).sum(1)
        except Exception as error:  # whatever the user's function does under torch.func
            raise ConfigError(
                f"drift={spec}: autograd cannot differentiate it ({_described(error)}); "
                "use PyTorch operations only, out of place"
            ) from error
        ahead = _called(spec, process, states + step * w)
        behind = _called(spec, process, states - step * w)
        expected = ((ahead - behind) * v).sum(1) / (2 * step)
        # Rounding is about 1e-11 |b|, curvature 1e-10 times the third derivative.
        scale = 1 + ahead.abs().sum(1)
        if not torch.allclose(found / scale, expected / scale, rtol=1e-3, atol=1e-6):
            raise ConfigError(
                f"drift={spec}: its derivative by autograd differs from that by differences, "
                f"{found.tolist()} against {expected.tolist()}; is the state detached, or is the "
                "start or the end at a kink?"
            )


def _called(spec: str, process: UserProcess, states: Tensor) -> Tensor:
    given = states.clone()
    try:
        result = process.drift(given)
    except Exception as error:  # whatever the user's function does
        raise ConfigError(
            f"drift={spec}: it fails on states of shape {list(states.shape)} "
            f"({_described(error)}); it has to take [N, d] with d = {process.dim}"
        ) from error
    if not torch.equal(given, states):
        raise ConfigError(f"drift={spec}: it changes the states it is given; work on a copy")
    return result


def _described(error: Exception) -> str:
    """Class and message, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
