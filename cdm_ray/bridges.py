"""Bridges from their configuration, and the learned control of a checkpoint:

from cdm_ray.bridges import load_control
control = load_control("runs/double-well-3-1a2b3c4d")
drift = control.drift(x, t)
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from cdm_ray.checkpoint import CONFIG_FILE, EMA, open_newest
from cdm_ray.config import BridgeConfig, is_of, read_config
from cdm_ray.config.bridges import SigmaSchedule
from cdm_ray.errors import ConfigError
from cdm_ray.networks.control import BridgeControl, ControlNetwork
from cdm_ray.objectives.bridge import ControlConsistency
from cdm_ray.processes.bridge import Bridge
from cdm_ray.processes.references import (
    Brownian,
    Cell,
    CoxIngersollRoss,
    DoubleWell,
    MuellerBrown,
    OrnsteinUhlenbeck,
    ReferenceProcess,
    Schedule,
    jacobian_transpose,
)
from cdm_ray.processes.user_drift import drift_from
from cdm_ray.storage import path_of

STABLE = 2.0
"""Euler steps dt on a linear drift of rate k diverge where k dt exceeds this."""


def bridge_of(config: BridgeConfig) -> Bridge:
    """The problem that a configuration poses, checked.

    For process.kind=cir, start and end are those of X in the configuration and of Y = 2 sqrt(X) /
    volatility, whose sigma is 1, in the bridge. Raises ConfigError if the process cannot be made, a
    state is outside of its domain, its drift is not finite there, or the time steps are too long
    for it.
    """
    process = process_of(config)
    start, end = (_state(config, process, name) for name in ("start", "end"))
    bridge = Bridge(process, start, end, config.bridge.duration)
    for name, state in (("start", start), ("end", end)):
        drift = process.drift(state[None])[0]
        if not drift.isfinite().all():
            given = list(getattr(config.bridge, name))
            raise ConfigError(
                f"bridge.{name}={given}: the drift of process.kind={config.process.kind} is "
                f"{drift.tolist()} there; choose a state where it is finite"
            )
        _check_stiffness(config, process, name, state)
    return bridge


def _state(config: BridgeConfig, process: ReferenceProcess, name: str) -> Tensor:
    """`bridge.start` or `bridge.end` as the process has it, float64 [d]."""
    given = getattr(config.bridge, name)
    state = torch.tensor(given, dtype=torch.float64)
    if not isinstance(process, CoxIngersollRoss):
        return state
    if not (state > 0).all():
        raise ConfigError(
            f"bridge.{name}={list(given)}: outside of the domain of process.kind=cir, no path gets "
            "there; its states are positive"
        )
    return process.to_lamperti(state)


def process_of(config: BridgeConfig) -> ReferenceProcess:
    """The reference process of a configuration."""
    parameters, dim = config.process.parameters, config.dim
    if "sigma" in parameters:
        sigma = parameters.pop("sigma")
        if isinstance(sigma, SigmaSchedule):
            sigma = Schedule(sigma.times, sigma.values)
    if isinstance(mean := parameters.get("mean"), tuple):
        parameters["mean"] = mean[0] if len(mean) == 1 else mean
    match config.process.kind:
        case "brownian":
            return Brownian(dim, sigma)
        case "ou":
            return OrnsteinUhlenbeck(dim, sigma, **parameters)
        case "double-well":
            return DoubleWell(sigma, **parameters)
        case "cell":
            return Cell(sigma)
        case "mueller-brown":
            return MuellerBrown(sigma)
        case "cir":
            return CoxIngersollRoss(**parameters)
        case "user":
            ends = (config.bridge.start, config.bridge.end)
            start, end = (torch.tensor(state, dtype=torch.float64) for state in ends)
            return drift_from(parameters["drift"], config.dim, sigma, start, end)


def _check_stiffness(
    config: BridgeConfig, process: ReferenceProcess, name: str, state: Tensor
) -> None:
    basis = torch.eye(config.dim, dtype=state.dtype)
    jacobian = jacobian_transpose(process, state.expand_as(basis), basis)
    rate = torch.linalg.matrix_norm(jacobian, 2).item()
    duration = config.bridge.duration
    for field, steps in (
        ("simulation.steps", config.simulation.steps),
        ("eval.steps", config.eval.steps),
    ):
        if rate * duration / steps > STABLE:
            raise ConfigError(
                f"{field}={steps}: steps of {duration / steps:g} are too long for the drift at "
                f"bridge.{name}, which changes at a rate of {rate:g}; use at least "
                f"{math.ceil(rate * duration / STABLE)}, better "
                f"{math.ceil(rate * duration / 0.3)}"
            )


def control_of(config: BridgeConfig, bridge: Bridge) -> BridgeControl:
    """The control with the weights that `run.seed` gives, float32, the same on every worker."""
    network, dim = config.network, config.dim
    form = network.form
    if form == "auto":
        form = "free" if dim == 1 else "gradient"
    share = network.drift_coefficient
    if share is None:
        share = 0.0 if dim == 1 else 1.0
    location: list[float] = ((bridge.start + bridge.end) / 2).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        field = ControlNetwork(
            dim,
            bridge.duration,
            width=network.width,
            depth=network.depth,
            form=form,
            location=_one_or_all(network.location) if network.location else location,
            scale=_one_or_all(network.scale),
        )
    return BridgeControl(
        field,
        bridge.process,
        bridge.end.to(torch.get_default_dtype()),
        bridge.duration,
        drift_coefficient=share,
        guide=network.guide,
        coefficient=network.coefficient,
    )


def consistency_of(config: BridgeConfig, bridge: Bridge) -> ControlConsistency:
    """The loss of a configuration."""
    control = config.control
    auxiliary = None
    if control.consistency == "sc1":
        auxiliary = bridge.process
    elif control.auxiliary is not None:
        auxiliary = drift_from(control.auxiliary, config.dim, 1.0, bridge.start, bridge.end)
    return ControlConsistency(
        bridge.process,
        bridge.end,
        auxiliary=auxiliary,
        weighting=control.weighting,
        decay=control.decay,
        window=control.window,
        variate=control.variate,
    )


def trained_control(
    config: BridgeConfig, bridge: Bridge, weights: dict[str, Tensor], where: str
) -> BridgeControl:
    """The control with given weights, for use without gradient. Raises ConfigError if they are not
    those of such a network, or of a bridge to another end; it begins with `where`."""
    control = control_of(config, bridge).requires_grad_(False)
    expected = {name: tensor.shape for name, tensor in control.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise ConfigError(
            f"{where}: its weights are not those of a {control.network.form} control network of "
            f"{config.network.depth} layers of {config.network.width} units in {config.dim} "
            "dimensions"
        )
    if not torch.allclose(weights["end"], control.end):
        raise ConfigError(
            f"{where}: its weights are of a bridge to {weights['end'].tolist()}, the process ends "
            f"at {control.end.tolist()}"
        )
    control.load_state_dict(weights)
    return control


def load_control(folder: str | Path) -> BridgeControl:
    """The learned control of a checkpoint, or of a run's newest one, in a folder or at a URL:
    averaged weights, float32.

    Its `drift`, `score` and `control` take states [N, d] and times ([N] or 0-dim); for
    process.kind=cir the states are Y = 2 sqrt(X) / volatility, as in `control.process`. Raises
    ConfigError if there is no sound checkpoint of a bridge.
    """
    checkpoint = open_newest(path_of(str(folder)))
    file = checkpoint.folder / CONFIG_FILE
    if not is_of(BridgeConfig, file):
        raise ConfigError(f"{checkpoint.folder}: not a checkpoint of {BridgeConfig.JOB}")
    config = read_config(BridgeConfig, file)
    return trained_control(
        config, bridge_of(config), checkpoint.tensors(EMA), str(checkpoint.folder)
    )


def _one_or_all(value: tuple[float, ...]) -> float | tuple[float, ...]:
    return value[0] if len(value) == 1 else value
