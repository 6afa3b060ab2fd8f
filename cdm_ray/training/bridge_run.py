"""The driver of a bridge: the truth, tracking, Ray Train, evaluation, in that order."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor

from cdm_ray import cluster
from cdm_ray.bridge_report import BridgeSummary
from cdm_ray.bridges import bridge_of
from cdm_ray.checkpoint import EMA, checkpoint_name
from cdm_ray.cluster import TaskResources
from cdm_ray.config import BridgeConfig
from cdm_ray.evaluation.bridge_course import course_figure
from cdm_ray.evaluation.bridge_evaluation import (
    CACHE,
    BridgeResult,
    course_points,
    evaluate_weights,
    truth_of,
)
from cdm_ray.evaluation.launch import EVALUATIONS, evaluation_folder
from cdm_ray.evaluation.tasks import MapTasks
from cdm_ray.report import pace_before
from cdm_ray.storage import AnyPath, check_writable
from cdm_ray.tracking import RunHandle, ui_command
from cdm_ray.training.bridge_worker import train_worker
from cdm_ray.training.evaluations import (
    EvaluationsDuringTraining,
    record_evaluation,
    worker_gpus,
)
from cdm_ray.training.launch import final_checkpoint, tracked_run, train
from cdm_ray.training.surroundings import ALONE, Surroundings
from cdm_ray.training.worker import Pace

TOLD = ("kl_from_truth", "cost", "ess")
"""Metrics that the driver prints during training."""


def run_bridge(config: BridgeConfig, around: Surroundings = ALONE) -> AnyPath:
    """Train as configured, evaluate the averaged weights, record everything in MLflow.

    Returns the run's folder, which then holds the results. Continues the run of the same name. Ray
    must be initialised. Raises ConfigError for a user's mistake and RunFailed when training
    stopped for good.
    """
    config = config.resolved()
    use_gpu = cluster.uses_gpu(config.ray)
    check_writable(config.storage, "run.storage")
    bridge = bridge_of(config)
    if config.eval.grid is not None:
        print("truth: solving the backward equation, once for this bridge", flush=True)
    truth_of(config, bridge, cache_folder(config))  # before training: a grid may be too coarse
    with tracked_run(config, around.parent) as tracking:
        with _evaluations(config, tracking, use_gpu, around):
            pace = train(
                config,
                train_worker,
                tracking,
                gpus_per_worker=worker_gpus(config, around) if use_gpu else 0.0,
            )
        checkpoint = final_checkpoint(config)
        step = checkpoint.state.step
        found = evaluate_weights(
            config,
            checkpoint.tensors(EMA),
            str(checkpoint.folder),
            cache_folder=cache_folder(config),
            out_folder=evaluation_folder(config.run_folder, checkpoint.name),
            map_tasks=partial(cluster.map_tasks, resources=TaskResources()),
            paths=config.eval.paths,
            figures=True,
        )
        course = evaluation_folder(config.run_folder, checkpoint.name) / "course.png"
        course_figure(course_points(config.run_folder / EVALUATIONS), course)
        found = BridgeResult(found.metrics, found.figures | {"course": course})
        record_evaluation(
            tracking, step, found.metrics, found.figures.values(), checkpoint=checkpoint.folder
        )
        _summary(config, step, found, checkpoint.folder, pace, tracking).save(config.run_folder)
        around.watch(step, found.metrics)
    return config.run_folder


def cache_folder(config: BridgeConfig) -> AnyPath:
    """Where solutions on grids are kept."""
    return config.storage / CACHE


def _evaluations(
    config: BridgeConfig, tracking: RunHandle, use_gpu: bool, around: Surroundings
) -> AbstractContextManager[object]:
    if config.eval.every_iterations is None:
        return nullcontext()

    def evaluate_snapshot(
        weights: dict[str, Tensor], step: int, map_tasks: MapTasks
    ) -> dict[str, float]:
        found = evaluate_weights(
            config,
            weights,
            f"step {step}",
            cache_folder=cache_folder(config),
            out_folder=evaluation_folder(config.run_folder, checkpoint_name(step)),
            map_tasks=map_tasks,
            paths=config.eval.course_paths,
            figures=False,
        )
        record_evaluation(tracking, step, found.metrics, found.figures.values())
        around.watch(step, found.metrics)
        return {name: found.metrics[name] for name in TOLD if name in found.metrics}

    return EvaluationsDuringTraining(
        config, evaluate_snapshot, tracking, use_gpu=use_gpu, around=around
    )


def _summary(
    config: BridgeConfig,
    step: int,
    found: BridgeResult,
    checkpoint: AnyPath,
    pace: Pace | None,
    tracking: RunHandle,
) -> BridgeSummary:
    speed, seconds = pace or pace_before(config.run_folder)
    return BridgeSummary(
        run=config.run_name,
        recipe=config.recipe,
        seed=config.run.seed,
        iterations=step // config.train.inner_steps,
        speed=speed,
        training_seconds=seconds,
        metrics=found.metrics,
        checkpoint=str(checkpoint),
        figures={name: str(path) for name, path in found.figures.items()},
        ui_command=ui_command(tracking),
    )
