"""Evaluations of a training run: of its last weights, and of snapshots while it goes on.

At each of `evaluation_steps` the workers leave a snapshot of the averaged weights in the run's
folder and train on. A thread of the driver finds it there, evaluates it in Ray tasks that take
nothing from the workers but what their resources leave, and records the numbers at their step.
A snapshot that a stopped run left behind is evaluated when the run is continued.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Self

import ray
from torch import Tensor

from cdm_ray import cluster
from cdm_ray.checkpoint import checkpoint_name, load_tensors
from cdm_ray.cluster import TaskResources
from cdm_ray.config import JobConfig
from cdm_ray.errors import error_line
from cdm_ray.evaluation.tasks import MapTasks
from cdm_ray.storage import AnyPath, matching
from cdm_ray.tracking import RunHandle, Tracker
from cdm_ray.training.surroundings import ALONE, Surroundings

log = logging.getLogger(__name__)

SNAPSHOTS = "snapshots"
"""Folder of the weights that wait for their evaluation, inside a run's folder."""
Evaluate = Callable[[dict[str, Tensor], int, MapTasks], dict[str, float]]
"""evaluate(averaged weights, step, map_tasks): evaluates, records, and returns what to print."""
LOOK_EVERY_SECONDS = 1.0
GPU_SHARE = 0.1
"""Of each training GPU, for evaluations during training where there is no other GPU."""


def snapshot_path(config: JobConfig, step: int) -> AnyPath:
    """Where the workers leave the averaged weights of a step."""
    return config.run_folder / SNAPSHOTS / f"{checkpoint_name(step)}.safetensors"


def record_evaluation(
    tracking: RunHandle,
    step: int,
    metrics: Mapping[str, float],
    figures: Iterable[AnyPath],
    *,
    images: Mapping[str, AnyPath] | None = None,
    checkpoint: AnyPath | None = None,
) -> None:
    """Numbers and figures on the MLflow run, at their step, `images` with a slider over the steps;
    and which checkpoint they are of, if it is kept."""
    tracker = Tracker(tracking)
    try:
        tracker.log_metrics({f"eval/{name}": value for name, value in metrics.items()}, step)
        for name, path in (images or {}).items():
            tracker.log_image(path, name, step)
        for path in figures:
            tracker.log_figure(path)
        if checkpoint is not None:
            tracker.set_tag("checkpoint", str(checkpoint))
    finally:
        tracker.close(timeout=30.0)


def worker_gpus(config: JobConfig, around: Surroundings = ALONE) -> float:
    """GPU share of each training worker, given that they use GPUs: a part of `ray.gpus_per_worker`
    is for evaluations during training where no other GPU is."""
    whole = config.ray.gpus_per_worker
    shared = len(config.evaluation_steps) > 0 and _spare_gpus(config, around) < 1
    return whole * (1.0 - GPU_SHARE) if shared else whole


def resources_beside_training(
    config: JobConfig, use_gpu: bool, around: Surroundings = ALONE
) -> TaskResources:
    """What evaluations may take while the workers run: resources of their own if the cluster has
    them, else a share of the training's, one task at a time on each GPU or machine."""
    workers = config.ray.workers
    if use_gpu:
        spare = _spare_gpus(config, around)
        if spare >= 1:
            return TaskResources(gpus=1.0, at_once=spare)
        share = GPU_SHARE * config.ray.gpus_per_worker
        return TaskResources(cpus=0.0, gpus=share, at_once=workers)
    spare = 0
    if not around.shares_cluster:  # one more CPU is the driver's
        there = ray.cluster_resources().get("CPU", 0)
        spare = int(there - workers * config.ray.cpus_per_worker) - 1
    return TaskResources(at_once=spare) if spare >= 1 else TaskResources(cpus=0.0, at_once=1)


def resources_after_training(
    config: JobConfig, use_gpu: bool, around: Surroundings
) -> TaskResources:
    """What the evaluation of the last weights may take, if it is worth a GPU."""
    if not use_gpu:
        return TaskResources()
    if around.shares_cluster:
        return TaskResources(gpus=config.ray.gpus_per_worker, at_once=config.ray.workers)
    return TaskResources(gpus=1.0)


def _spare_gpus(config: JobConfig, around: Surroundings) -> int:
    """GPUs that no worker takes, and no other run."""
    if around.shares_cluster:
        return 0
    return int(cluster.gpus_in_cluster() - config.ray.workers * config.ray.gpus_per_worker)


class EvaluationsDuringTraining:
    """A thread that evaluates snapshots as they appear; a context around the training.

    An evaluation that fails is reported, in the log and as a tag of the MLflow run, and does not
    end the training. Leaving the context after a training that went well waits for the snapshots
    that are still to be evaluated; otherwise they stay for the next launch.
    """

    def __init__(
        self,
        config: JobConfig,
        evaluate: Evaluate,
        tracking: RunHandle,
        *,
        use_gpu: bool,
        around: Surroundings = ALONE,
    ) -> None:
        self._config, self._evaluate_snapshot, self._tracking = config, evaluate, tracking
        resources = resources_beside_training(config, use_gpu, around)
        self._map_tasks = partial(cluster.map_tasks, resources=resources, show=False)
        self._failed: set[AnyPath] = set()
        self._trained, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluations", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._abandoned.set()
        self._trained.set()
        if kind is None:
            self._thread.join()

    def _run(self) -> None:
        while not self._abandoned.is_set():
            trained = self._trained.is_set()  # before looking: the last snapshot came earlier
            snapshots = self._waiting()
            for snapshot in snapshots:
                if not self._abandoned.is_set():
                    self._evaluate(snapshot)
            if trained and not snapshots:
                return
            self._trained.wait(LOOK_EVERY_SECONDS)

    def _waiting(self) -> list[AnyPath]:
        try:
            found = matching(self._config.run_folder / SNAPSHOTS, "step-*.safetensors")
        except Exception as error:  # storage at a URL may be away for a moment
            log.warning("looking for snapshots: %s", error_line(error))
            return []
        return [path for path in found if path not in self._failed]

    def _evaluate(self, snapshot: AnyPath) -> None:
        step = int(snapshot.stem.removeprefix("step-"))
        try:
            told = self._evaluate_snapshot(load_tensors(snapshot), step, self._map_tasks)
        except Exception as error:  # whatever it is, the training is worth more
            if self._abandoned.is_set():
                return
            self._failed.add(snapshot)
            line = f"{type(error).__name__}: {' '.join(str(error).split())}"
            log.warning("evaluation at step %d failed (%s); training goes on", step, line)
            tracker = Tracker(self._tracking)
            tracker.set_tag(f"evaluation_failed.step-{step}", line)
            tracker.close(timeout=10.0)
        else:
            snapshot.unlink()
            shown = [f"{name} {value:.4g}" for name, value in told.items()]
            print(f"evaluation at step {step}: {', '.join(shown)}", flush=True)
