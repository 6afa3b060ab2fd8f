"""The runs behind docs/bridges.md: variants that are trained, and rivals at equal CPU time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.alone import Training
from cdm_ray.bridges import bridge_of, trained_control
from cdm_ray.config import BridgeConfig, load_config
from cdm_ray.errors import RunFailed
from cdm_ray.evaluation.bridge_evaluation import float32, truth_of
from cdm_ray.evaluation.bridge_metrics import (
    WeightSummary,
    evaluate_bridge,
    log_weights,
    simulate_bridge,
)
from cdm_ray.evaluation.bridge_truth import Truth
from cdm_ray.evaluation.proposals import brownian_guide, delyon_hu, rejection
from cdm_ray.processes.bridge import Bridge
from cdm_ray.training.worker import copy_average

CACHE = Path(__file__).parents[1] / "runs" / "truth"
"""Solutions on grids, shared with the jobs."""
WEIGHTINGS = ("inclusive", "window", "geom")
VARIANTS = {
    f"{consistency.upper()}, {weighting}{', variate' if variate == 'noise' else ''}": (
        f"control.consistency={consistency}",
        f"control.weighting={weighting}",
        f"control.variate={variate}",
    )
    for consistency in ("sc2", "sc1")
    for weighting in WEIGHTINGS
    for variate in ("noise", "none")
} | {
    f"{consistency.upper()}, endpoint{remark}": (
        f"control.consistency={consistency}",
        "control.weighting=endpoint",
        "control.variate=none",
    )
    for consistency, remark in (("sc1", " (adjoint matching)"), ("sc2", ""))
}
"""What is trained, as changes of a recipe. Adjoint matching is the target of the endpoint carried
back by the reference process's Jacobian."""
FALLBACK = "SC2, inclusive, variate"
"""Stands for a recipe whose own setting is none of the variants."""
RIVALS = {"Brownian guide": brownian_guide, "Delyon–Hu": delyon_hu}
REJECTION = "rejection"
PILOT_PATHS = 20_000
FEASIBLE = 1e-4
"""Least share of free paths that end near the end for rejection to be tried."""
NEAR = 0.1
"""What near is, in units of sigma sqrt(T)."""
BLOCK = 1000
"""Weighted paths that are drawn at once."""


@dataclass(frozen=True)
class Result:
    """One trained run, or one run of a rival without training."""

    recipe: str
    variant: str
    seed: int
    identity: str
    """What it was made with; another one is made again."""
    seconds: float
    """CPU seconds: of training, or of drawing weighted paths."""
    iterations: int = 0
    steps: int = 0
    """Optimizer steps."""
    weighted_paths: int = 0
    """Paths behind the ESS and log p."""
    metrics: dict[str, float] = field(default_factory=dict)
    """As of `evaluate_bridge`."""
    failure: str | None = None
    """Why there are no metrics."""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.recipe, self.variant, self.seed


@dataclass(frozen=True)
class Task:
    """One line's worth of work for one process."""

    recipe: str
    variant: str
    seed: int
    settings: tuple[str, ...]
    seconds: float | None = None
    """CPU seconds that a rival without training gets; None for a variant to train."""

    def config(self) -> BridgeConfig:
        changes = [*self.settings, *VARIANTS.get(self.variant, ()), f"run.seed={self.seed}"]
        return load_config(BridgeConfig, self.recipe, changes)

    @property
    def identity(self) -> str:
        config = self.config()
        budget = "" if self.seconds is None else f", {self.seconds:.1f} s"
        return f"{config.run_name}, {config.eval.paths} x {config.eval.steps}{budget}"


def reduced(recipe: str, share: float, settings: Iterable[str]) -> tuple[str, ...]:
    """Changes of a recipe that all of its variants share."""
    full = load_config(BridgeConfig, recipe, list(settings)).train.iterations
    return (f"train.iterations={max(1, round(share * full))}", *settings)


def own_variant(recipe: str, settings: tuple[str, ...]) -> str:
    """The variant that is the recipe itself."""
    control = load_config(BridgeConfig, recipe, list(settings)).control
    for variant in VARIANTS:
        if Task(recipe, variant, 0, settings).config().control == control:
            return variant
    return FALLBACK


@lru_cache(maxsize=1)
def problem(recipe: str, settings: tuple[str, ...]) -> tuple[Bridge, Truth | None]:
    """The bridge of a recipe, and its truth, which is solved once and kept on disk."""
    config = load_config(BridgeConfig, recipe, list(settings))
    bridge = bridge_of(config)
    return float32(bridge), truth_of(config, bridge, CACHE)


def prepare(recipe: str, settings: tuple[str, ...]) -> None:
    """Solve the truth, before several processes need it."""
    problem(recipe, settings)


def perform(task: Task) -> Result:
    """Train and evaluate, or draw and weigh. This process must be in a group."""
    if task.seconds is None:
        return train_variant(task)
    if task.variant == REJECTION:
        return try_rejection(task, task.seconds)
    return weigh_proposal(task, task.seconds)


def train_variant(task: Task) -> Result:
    """A run as a worker of the job makes it, and metrics of its averaged weights."""
    config = task.config()
    bridge, truth = problem(task.recipe, task.settings)
    training = Training(config)
    made: dict[str, Any] = {"identity": task.identity, "iterations": config.train.iterations}
    failure, begin = None, time.process_time()
    try:
        training.advance(config.steps)
    except RunFailed as error:
        failure = f"diverged: {error}"
    made |= {"seconds": time.process_time() - begin, "steps": training.steps}
    if failure is not None:
        return Result(task.recipe, task.variant, task.seed, failure=failure, **made)
    average = training.run.average
    copy_average(training.engine, average)
    control = trained_control(config, bridge_of(config), average.state_dict(), task.variant)
    metrics = evaluate_bridge(
        control,
        bridge,
        steps=config.eval.steps,
        paths=config.eval.paths,
        seed=task.seed,
        truth=truth,
    ).metrics
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        failure = f"diverged: {', '.join(bad)} of the trained control are not finite"
        return Result(task.recipe, task.variant, task.seed, failure=failure, **made)
    made |= {"weighted_paths": config.eval.paths, "metrics": metrics}
    return Result(task.recipe, task.variant, task.seed, **made)


def weigh_proposal(task: Task, seconds: float) -> Result:
    """KL and cost on as many paths as of a trained variant; ESS and log p by weighted paths until
    the CPU seconds are over."""
    config = task.config()
    bridge, truth = problem(task.recipe, task.settings)
    proposal = RIVALS[task.variant](bridge)
    steps = config.eval.steps
    metrics = evaluate_bridge(
        proposal, bridge, steps=steps, paths=config.eval.paths, seed=task.seed, truth=truth
    ).metrics
    begin = time.process_time()
    blocks: list[torch.Tensor] = []
    while not blocks or time.process_time() - begin < seconds:
        seed = 1_000_000 * (task.seed + 1) + len(blocks)
        own = simulate_bridge(proposal.drift, bridge, steps=steps, paths=BLOCK, seed=seed)
        blocks.append(log_weights(proposal.drift, bridge, own, pinned=True))
    found = WeightSummary.of(torch.cat(blocks))
    metrics |= {
        "ess": found.ess,
        "log_p": float(found.log_p.mean),
        "log_p_se": float(found.log_p.error),
        "log_p_bound": float(found.bound.mean),
        "log_p_bound_se": float(found.bound.error),
    }
    return Result(
        task.recipe,
        task.variant,
        task.seed,
        identity=task.identity,
        seconds=time.process_time() - begin,
        weighted_paths=len(blocks) * BLOCK,
        metrics=metrics,
    )


def try_rejection(task: Task, seconds: float) -> Result:
    """log p by free paths that end near the end, if enough of them do; their share is the ESS."""
    bridge, _ = problem(task.recipe, task.settings)
    sigma = bridge.process.sigma(torch.tensor(0.0)).item()
    near = NEAR * sigma * math.sqrt(bridge.duration)
    drawn: dict[str, Any] = {"steps": task.config().eval.steps, "tolerance": near}
    begin = time.process_time()
    pilot = rejection(bridge, paths=PILOT_PATHS, seed=2 * task.seed, **drawn)
    count, failure, metrics = PILOT_PATHS, None, {}
    if pilot.share > FEASIBLE:
        speed = PILOT_PATHS / (time.process_time() - begin)
        count = max(PILOT_PATHS, int(speed * seconds))
        begin = time.process_time()
        found = rejection(bridge, paths=count, seed=2 * task.seed + 1, **drawn)
        metrics = {
            "ess": found.share,
            "log_p": float(found.log_p.mean),
            "log_p_se": float(found.log_p.error),
        }
    else:
        failure = (
            f"not feasible: {round(pilot.share * PILOT_PATHS)} of {PILOT_PATHS:,} free paths ended "
            f"within {near:.2g} of the end"
        )
    return Result(
        task.recipe,
        task.variant,
        task.seed,
        identity=task.identity,
        seconds=time.process_time() - begin,
        weighted_paths=count,
        metrics=metrics,
        failure=failure,
    )
