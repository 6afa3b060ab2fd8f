"""Evaluation of a bridge's averaged weights: numbers and figures, made in one task."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cdm_ray.bridges import bridge_of, trained_control
from cdm_ray.config import BridgeConfig
from cdm_ray.evaluation.backward_grid import Grid
from cdm_ray.evaluation.bridge_figures import bridge_figures
from cdm_ray.evaluation.bridge_metrics import BridgeEvaluation, evaluate_bridge
from cdm_ray.evaluation.bridge_truth import CIRTruth, GaussianTruth, Truth
from cdm_ray.evaluation.grid_truth import solve
from cdm_ray.evaluation.results import RESULTS_NAME
from cdm_ray.evaluation.tasks import MapTasks
from cdm_ray.processes.bridge import Bridge
from cdm_ray.processes.references import (
    Brownian,
    CoxIngersollRoss,
    OrnsteinUhlenbeck,
    ReferenceProcess,
)
from cdm_ray.processes.simulation import Paths
from cdm_ray.storage import AnyPath, matching, write_whole

CACHE = "truth"
"""Folder of the solutions on grids, in `run.storage`."""
LOG_DENSITIES = ("log_p", "log_p_bound", "log_p_truth")


@dataclass(frozen=True)
class BridgeResult:
    """Numbers by name; figures as PNG files by name."""

    metrics: dict[str, float]
    figures: dict[str, AnyPath]


def evaluate_weights(
    config: BridgeConfig,
    weights: dict[str, Tensor],
    where: str,
    *,
    cache_folder: AnyPath,
    out_folder: AnyPath,
    map_tasks: MapTasks,
    paths: int,
    figures: bool,
) -> BridgeResult:
    """Evaluate weights, which come from `where`, on `paths` paths; write `results.json`.

    Raises ConfigError when the weights do not fit the configuration.
    """
    work = partial(_evaluate, weights=weights, where=where, cache=cache_folder)
    target = out_folder if figures else None
    (found,) = map_tasks(
        partial(work, paths=paths, figures_folder=target), [config], "evaluating paths"
    )
    content = {
        "metrics": found.metrics,
        "figures": {name: path.name for name, path in found.figures.items()},
    }
    write_whole(out_folder / RESULTS_NAME, (json.dumps(content, indent=1) + "\n").encode())
    return found


def course_points(evaluations: AnyPath) -> list[dict[str, Any]]:
    """Step and metrics of every evaluation in the folder, in the order of the steps."""
    found = []
    for path in matching(evaluations, f"step-????????/{RESULTS_NAME}"):
        step = int(path.parent.name.removeprefix("step-"))
        found.append({"step": step, "metrics": json.loads(path.read_text())["metrics"]})
    return found


def truth_of(config: BridgeConfig, bridge: Bridge, cache_folder: AnyPath) -> Truth | None:
    """What is known exactly about a bridge: its closed form, else the solution on `eval.grid`,
    which is kept in the cache, else nothing."""
    process = bridge.process
    if isinstance(process, (Brownian, OrnsteinUhlenbeck)):
        return GaussianTruth(process, bridge.end, bridge.duration)
    if isinstance(process, CoxIngersollRoss):
        return CIRTruth(process, bridge.end, bridge.duration)
    if config.eval.grid is None:
        return None
    grid = Grid(**config.eval.grid.model_dump())
    return solve(process, bridge.start, bridge.end, bridge.duration, grid, cache_folder)


def has_closed_form(process: ReferenceProcess) -> bool:
    """Whether `truth_of` needs no grid."""
    return isinstance(process, (Brownian, OrnsteinUhlenbeck, CoxIngersollRoss))


def float32(bridge: Bridge) -> Bridge:
    """The same problem with states in the precision that networks take."""
    return Bridge(bridge.process, bridge.start.float(), bridge.end.float(), bridge.duration)


def _evaluate(
    config: BridgeConfig,
    *,
    weights: dict[str, Tensor],
    where: str,
    cache: AnyPath,
    paths: int,
    figures_folder: AnyPath | None,
) -> BridgeResult:
    bridge = bridge_of(config)
    truth = truth_of(config, bridge, cache)
    control = trained_control(config, bridge, weights, where)
    bridge = float32(bridge)
    steps = config.eval.steps
    found = evaluate_bridge(
        control, bridge, steps=steps, paths=paths, seed=config.eval.seed, truth=truth
    )
    made: dict[str, AnyPath] = {}
    if figures_folder is not None:
        shown = Paths(found.paths.states.to(bridge.start), found.paths.times)
        made = bridge_figures(bridge, control.score, shown, truth, figures_folder)
    return BridgeResult(_in_given_coordinates(bridge, found), made)


def given_coordinates(bridge: Bridge, states: Tensor) -> Tensor:
    """States in the coordinates of the configuration."""
    process = bridge.process
    if isinstance(process, CoxIngersollRoss):
        return process.from_lamperti(states)
    return states


def log_stretch(bridge: Bridge) -> float:
    """log |dX / dY| at the end, between the bridge's states Y and those X of the configuration:
    what the logs of their densities differ by."""
    jacobian: Any = torch.autograd.functional.jacobian(
        partial(given_coordinates, bridge), bridge.end.double()
    )
    return torch.linalg.slogdet(jacobian).logabsdet.item()


def _in_given_coordinates(bridge: Bridge, found: BridgeEvaluation) -> dict[str, float]:
    """Densities of the configuration's X; KL, costs and weights are the same as for Y."""
    stretch = log_stretch(bridge)
    shifted = {name: found.metrics[name] for name in LOG_DENSITIES if name in found.metrics}
    return found.metrics | {name: value - stretch for name, value in shifted.items()}
