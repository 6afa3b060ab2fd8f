"""What every Ray Train worker does around its training, whatever it trains."""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from cdm_ray.checkpoint import (
    CHECKPOINTS,
    EMA,
    WEIGHTS,
    Checkpoint,
    TrainingState,
    newest_checkpoint,
)
from cdm_ray.config import JobConfig, build_config, to_yaml
from cdm_ray.errors import ConfigError, RunFailed
from cdm_ray.storage import AnyPath, write_whole
from cdm_ray.tracking import RunHandle, Tracker
from cdm_ray.training.checkpoint import ExtraTensors, write_average, write_checkpoint
from cdm_ray.training.engine import Engine
from cdm_ray.training.evaluations import snapshot_path
from cdm_ray.training.loop import Record

C = TypeVar("C", bound=JobConfig)

FATAL_FILE = "fatal.json"
FATAL_ERRORS = (RunFailed, ConfigError)
"""A restart would only repeat them."""


@dataclass(frozen=True)
class Assignment:
    """Everything a worker is told."""

    config: dict[str, Any]
    tracking: RunHandle | None
    launch: str
    """Identity of this launch: a restart within it does not repeat a fatal error."""


def run_worker(
    options: dict[str, Assignment],
    root: type[C],
    train: Callable[[C, Assignment], Pace | None],
) -> dict[str, Any]:
    """A worker's whole life: `options` is what Ray Train gives it, {"assignment": Assignment}.

    Returns {"pace": what `train` does} or, after an error that a restart would only repeat,
    {"fatal": message}.
    """
    assignment = options["assignment"]
    config = build_config(root, assignment.config)
    if (message := fatal_message(config.run_folder, assignment.launch)) is not None:
        return {"fatal": message}
    try:
        pace = train(config, assignment)
    except FATAL_ERRORS as error:
        told = {"launch": assignment.launch, "message": str(error)}
        write_whole(config.run_folder / FATAL_FILE, json.dumps(told).encode())
        raise
    return {"pace": pace}


def fatal_message(run_folder: AnyPath, launch: str) -> str | None:
    """What ended this launch of the run for good, if a worker has told it."""
    try:
        content = json.loads((run_folder / FATAL_FILE).read_text())
    except FileNotFoundError:
        return None
    return content["message"] if content["launch"] == launch else None


def precision(config: JobConfig, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `train.precision` means on this device."""
    if config.train.precision == "auto":
        on_gpu = device.type == "cuda" and config.train.zero_stage > 0
        return "bf16" if on_gpu else "fp32"
    return config.train.precision


def agree_on_checkpoint(root: AnyPath) -> Checkpoint | None:
    """The newest sound checkpoint as rank 0 sees it, for all ranks."""
    found = newest_checkpoint(root) if dist.get_rank() == 0 else None
    message: list[Checkpoint | None] = [found]
    dist.broadcast_object_list(message)
    return message[0]


def restore(engine: Engine, checkpoint: Checkpoint, prime: Callable[[], torch.Tensor]) -> None:
    """Weights, average and moments of a checkpoint into the engine; `prime` as it takes it."""
    loaded: dict[str, dict[str, torch.Tensor]] = {}

    def tensor(kind: str, name: str) -> torch.Tensor:
        if kind not in loaded:
            loaded.clear()  # one kind in memory at a time
            loaded[kind] = checkpoint.tensors(kind)
        return loaded[kind][name]

    engine.restore(tensor, checkpoint.state.optimizer_steps, prime)


@torch.no_grad()
def copy_average(engine: Engine, network: torch.nn.Module) -> None:
    """Averaged weights into `network`; the live ones before the first step. Collective."""
    kind = EMA if engine.optimizer_steps > 0 else WEIGHTS
    targets = dict(network.named_parameters())
    for name, tensor in engine.gather(kind):
        targets[name].copy_(tensor)


class Speed(NamedTuple):
    """What the speed of a run is counted in."""

    unit: str
    per_sample: float
    """Units in one sample of the loop."""


class Pace(NamedTuple):
    """How fast a run trains, the median over its records without the first, which holds the
    warm-up."""

    speed: float
    """Units per second."""
    seconds: float
    """That all steps of the run take at this speed."""


class _Progress:
    """How far the run is: a bar with losses, speed and time left, one line for each record, so
    that it reads alike on a terminal and in a job's log."""

    WIDTH = 20

    def __init__(self, name: str, state: TrainingState, last_step: int) -> None:
        self._name, self._last_step = name, last_step
        self._first_step, self._started = state.step, time.perf_counter()

    def show(self, record: Record, speed: str) -> None:
        losses = [f"{k[5:]} {v:.4g}" for k, v in record.metrics.items() if k.startswith("loss/")]
        per_step = (time.perf_counter() - self._started) / (record.step - self._first_step)
        left = datetime.timedelta(seconds=round(per_step * (self._last_step - record.step)))
        bar = "#" * (self.WIDTH * record.step // self._last_step)
        place = f"{self._name} [{bar:.<{self.WIDTH}}] step {record.step}/{self._last_step}"
        print(", ".join([place, *losses, speed, f"{left} left"]), flush=True)


class WorkerHooks:
    """Checkpoints, on every rank; records to MLflow and progress on rank 0.

    `extra` gives further tensors of this rank for a checkpoint.
    """

    def __init__(
        self,
        config: JobConfig,
        engine: Engine,
        assignment: Assignment,
        state: TrainingState,
        speed: Speed,
        extra: ExtraTensors = dict,
    ) -> None:
        self._config, self._engine, self._yaml = config, engine, to_yaml(config)
        self._unit, self._extra = speed, extra
        self._samples_per_second: list[float] = []
        self._tracker, self._progress = None, None
        if dist.get_rank() == 0:
            self._progress = _Progress(config.run_name, state, config.steps)
            if assignment.tracking is not None:
                self._tracker = Tracker(assignment.tracking)

    def pace(self, state: TrainingState) -> Pace | None:
        """Of the run that ended in this state, as rank 0 saw it; None after a single record."""
        if len(self._samples_per_second) < 2:
            return None
        median = statistics.median(self._samples_per_second[1:])
        return Pace(median * self._unit.per_sample, state.samples_seen / median)

    def record(self, record: Record) -> None:
        unit, per_sample = self._unit
        speed = record.samples_per_second * per_sample
        self._samples_per_second.append(record.samples_per_second)
        if self._tracker is not None:
            course = {
                f"{unit}_per_second": speed,
                f"{unit}_seen": record.samples_seen * per_sample,
            }
            self._tracker.log_metrics(record.metrics | course, record.step)
        if self._progress is not None:
            self._progress.show(record, f"{speed:.0f} {unit.replace('_', ' ')}/s")

    def after_step(self, state: TrainingState) -> None:
        if state.step % self._config.checkpoint_steps == 0 or state.step == self._config.steps:
            write_checkpoint(
                self._config.run_folder / CHECKPOINTS,
                self._engine,
                state,
                self._yaml,
                keep_last=self._config.checkpoint.keep_last,
                extra=self._extra(),
            )
        if state.step in self._config.evaluation_steps:
            write_average(snapshot_path(self._config, state.step), self._engine)

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.close(timeout=10.0)
