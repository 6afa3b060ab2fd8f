"""What one Ray Train worker does for a bridge: simulate its lanes, make targets, train."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor

from cdm_ray.bridges import bridge_of, consistency_of, control_of
from cdm_ray.checkpoint import CHECKPOINTS, WEIGHTS, Checkpoint, TrainingState
from cdm_ray.config import BridgeConfig
from cdm_ray.config.bridges import AnnealConfig
from cdm_ray.networks.control import BridgeControl
from cdm_ray.objectives.base import Term
from cdm_ray.objectives.bridge import ControlConsistency
from cdm_ray.processes.annealing import Annealed
from cdm_ray.processes.bridge import Bridge
from cdm_ray.processes.simulation import Paths, check_paths, simulate, simulate_guided
from cdm_ray.randomness import BlockRng
from cdm_ray.training.engine import Engine
from cdm_ray.training.lanes import deal_lanes
from cdm_ray.training.loop import Pass, run_loop
from cdm_ray.training.rates import bridge_rates
from cdm_ray.training.worker import (
    Assignment,
    Pace,
    Speed,
    WorkerHooks,
    agree_on_checkpoint,
    copy_average,
    precision,
    restore,
    run_worker,
)


def train_worker(options: dict[str, Assignment]) -> dict[str, Any]:
    """Entry point for Ray Train."""
    return run_worker(options, BridgeConfig, _train)


def _train(config: BridgeConfig, assignment: Assignment) -> Pace | None:
    context = ray.train.get_context()
    lanes = deal_lanes(config.simulation.lanes, context.get_world_size())[context.get_world_rank()]
    device = ray.train.torch.get_device()
    checkpoint = agree_on_checkpoint(config.run_folder / CHECKPOINTS)
    run = BridgeRun(config, lanes, device)
    learned = control_of(config, run.bridge)
    if checkpoint is not None:
        learned.load_state_dict(checkpoint.tensors(WEIGHTS))
    engine = Engine(
        learned.to(device),
        config.optimizer,
        zero_stage=config.train.zero_stage,
        precision=precision(config, device),
        micro_steps=1,
    )
    state = TrainingState(0, 0, 0)
    if checkpoint is not None:
        state = checkpoint.state
        restore(engine, checkpoint, lambda: _prime(engine, config.dim))
        run.replay.load(checkpoint)
    path_steps = config.simulation.paths * config.simulation.steps
    speed = Speed("path_steps", path_steps / (config.pairs * config.train.inner_steps))
    hooks = WorkerHooks(config, engine, assignment, state, speed, run.replay.tensors)
    with closing(hooks):
        state = run_loop(
            engine,
            run.objective,
            run.passes(engine, state.step),
            state,
            last_step=config.steps,
            batch=config.pairs,
            train=config.train,
            rates=lambda state: bridge_rates(config, state.step),
            hooks=hooks,
        )
    return hooks.pace(state)


def _prime(engine: Engine, dim: int) -> Tensor:
    zeros = torch.zeros(1, dim, device=engine.device)
    return engine(zeros, torch.zeros(1, device=engine.device)).sum()


@dataclass(frozen=True)
class PairBatch:
    """(path, time) pairs to train on: pair k N + n is path n of N at time k."""

    paths: Paths
    targets: Tensor
    """[K, N, d]."""
    pairs: Tensor
    """[M]."""


class BridgeRun:
    """One worker's share of a bridge: what its lanes simulate, and what is learned from it."""

    def __init__(self, config: BridgeConfig, lanes: Sequence[int], device: torch.device) -> None:
        self.config, self.lanes, self.device = config, lanes, device
        bridge = bridge_of(config)
        self.process = Annealed(bridge.process)
        self.bridge: Bridge = replace(bridge, process=self.process)
        self.average = control_of(config, self.bridge).to(device).requires_grad_(False)
        """Simulates and makes the targets."""
        self._consistencies = {
            first: consistency_of(part, self.bridge) for first, part in config.segments.items()
        }
        self.consistency: ControlConsistency = self._consistencies[0]
        """Of the iteration under way."""
        self.replay = Replay(config, lanes)
        self.times = bridge.times(config.simulation.steps).to(device)
        self.start = bridge.start.to(device, torch.float32)

    def objective(
        self, model: Any, batch: PairBatch, rng: BlockRng, samples_seen: int
    ) -> dict[str, Term]:
        del rng, samples_seen
        losses = self.consistency.loss(model, batch.paths, batch.targets, batch.pairs)
        return {"control": Term(losses.sum(), 1.0)}

    def passes(self, engine: Engine, step: int) -> Iterator[list[Pass[PairBatch]]]:
        """The pairs of each optimizer step from `step` on, which begins an iteration."""
        seed, inner_steps = self.config.run.seed, self.config.train.inner_steps
        assert step % inner_steps == 0, "checkpoints are written between iterations"
        paths, targets = None, None
        while True:
            rng = BlockRng.for_lanes(seed, step, self.lanes, self.device)
            if step % inner_steps == 0:
                self._begin_iteration(engine, step)
                copy_average(engine, self.average)
                paths = self.draw_paths(rng, step // inner_steps)
                targets = self.consistency.targets(self.average, paths)
            assert paths is not None
            assert targets is not None
            yield [Pass(PairBatch(paths, targets, self._pairs(rng)), rng, True)]
            step += 1

    def _begin_iteration(self, engine: Engine, step: int) -> None:
        """Anneals and consistency as they are from this step on."""
        anneal = annealing_at(self.config.anneal, step / self.config.steps)
        self.process.drift_share = anneal.drift_share
        self.process.sigma_factor = anneal.sigma_factor
        for control in (self.average, engine.network):
            assert isinstance(control, BridgeControl)
            control.tolerance = anneal.tolerance
        consistency = self._consistencies[self.config.segment_at(step)]
        self.consistency = replace(consistency, tolerance=anneal.tolerance)

    def draw_paths(self, rng: BlockRng, iteration: int) -> Paths:
        """Own paths of this iteration; with a replay buffer, a draw from it and them."""
        config = self.config
        count = len(self.lanes) * config.lane_paths
        noise = rng.normal(count, config.simulation.steps, config.dim).transpose(0, 1)
        start = self.start.expand(count, -1)
        if config.simulation.scheme == "guided":
            paths = simulate_guided(
                self.average.rest_on(self.times),
                self.average.end,
                self.process,
                start,
                self.times,
                noise,
                tolerance=self.average.tolerance,
            )
        else:
            paths = simulate(self.average.drift, self.process, start, self.times, noise)
        check_paths(paths, self.process, f"iteration {iteration}")
        return self.replay.exchanged(paths, rng)

    def _pairs(self, rng: BlockRng) -> Tensor:
        """All pairs, or as many from each lane's own paths as `train.pairs` says, drawn with
        replacement."""
        config, steps = self.config, self.config.simulation.steps
        count = len(self.lanes) * config.lane_paths
        if config.train.pairs is None:
            return torch.arange(steps * count, device=self.device)
        draws = rng.uniform(len(self.lanes) * config.lane_pairs, 2)
        k = (draws[:, 0] * steps).long()
        n = (draws[:, 1] * config.lane_paths).long()
        first = torch.arange(len(self.lanes), device=self.device) * config.lane_paths
        return k * count + n + first.repeat_interleave(config.lane_pairs)


@dataclass(frozen=True)
class Annealing:
    """How far the problem is from itself."""

    drift_share: float
    sigma_factor: float
    tolerance: float


def annealing_at(config: AnnealConfig, progress: float) -> Annealing:
    """At `progress` in [0, 1] of a run; all anneals are over at `anneal.share` of it."""
    part = min(progress / config.share, 1.0)
    drift_share = {
        "off": 1.0,
        "linear": part,
        "sine": math.sin(math.pi / 2 * part),
    }[config.drift]
    tolerance = 0.0
    if config.tolerance > 0 and part < 1:
        tolerance = config.tolerance * (config.last_tolerance / config.tolerance) ** part
    return Annealing(drift_share, config.sigma + (1 - config.sigma) * part, tolerance)


class Replay:
    """The newest rollouts of this worker's lanes, `simulation.replay` of them."""

    def __init__(self, config: BridgeConfig, lanes: Sequence[int]) -> None:
        self._config, self._lanes = config, lanes
        self._rollouts: deque[Tensor] = deque(maxlen=config.simulation.replay)

    def exchanged(self, paths: Paths, rng: BlockRng) -> Paths:
        """As many paths, drawn from these and from those kept, each lane from its own; these
        themselves if none are kept. Then keeps these."""
        if self._config.simulation.replay == 0:
            return paths
        each, count = self._config.lane_paths, len(self._lanes) * self._config.lane_paths
        rollouts = torch.stack([paths.states, *self._rollouts])
        draws = rng.uniform(count, 2)
        age = (draws[:, 0] * len(rollouts)).long()
        lane = torch.arange(count, device=age.device) // each
        path = lane * each + (draws[:, 1] * each).long()
        self._rollouts.appendleft(paths.states)
        return Paths(rollouts[age, :, path].transpose(0, 1), paths.times)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps: a file for each lane, [rollouts, K + 1, paths, d]."""
        if not self._rollouts:
            return {}
        by_lane = torch.stack(list(self._rollouts)).split(self._config.lane_paths, dim=2)
        return {
            _replay_file(lane): {"states": states}
            for lane, states in zip(self._lanes, by_lane, strict=True)
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """What `tensors` gave, whoever wrote it."""
        if self._config.simulation.replay == 0:
            return
        lanes = [checkpoint.tensors(_replay_file(lane))["states"] for lane in self._lanes]
        self._rollouts.extend(torch.cat(lanes, dim=2))


def _replay_file(lane: int) -> str:
    return f"replay-{lane:04d}"
