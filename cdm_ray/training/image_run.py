"""The driver of an image run: data, tracking, Ray Train, evaluation, in that order."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor

from cdm_ray import cluster
from cdm_ray.checkpoint import CHECKPOINTS, EMA, Checkpoint, checkpoint_name, newest_checkpoint
from cdm_ray.config import ImageConfig
from cdm_ray.data.manifest import Manifest, check_matches
from cdm_ray.data.prepare import ensure_prepared
from cdm_ray.evaluation.evaluate import EvaluationResult, evaluate
from cdm_ray.evaluation.launch import evaluation_folder
from cdm_ray.evaluation.tasks import MapTasks
from cdm_ray.initial_weights import initialise
from cdm_ray.report import RunSummary, pace_before
from cdm_ray.storage import AnyPath, check_writable
from cdm_ray.tracking import RunHandle, ui_command
from cdm_ray.training.evaluations import (
    EvaluationsDuringTraining,
    record_evaluation,
    resources_after_training,
    worker_gpus,
)
from cdm_ray.training.image_worker import random_network, train_worker
from cdm_ray.training.launch import final_checkpoint, tracked_run, train
from cdm_ray.training.surroundings import ALONE, Surroundings
from cdm_ray.training.worker import Pace

TOLD = ("fid_", "fd_", "cp_residual")
"""Beginnings of the metrics that the driver prints during training."""


def run_images(config: ImageConfig, around: Surroundings = ALONE) -> AnyPath:
    """Train as configured, evaluate the averaged weights, record everything in MLflow.

    Returns the run's folder, which then holds the results. Continues the run of the same name. Ray
    must be initialised. Raises ConfigError for a user's mistake and RunFailed when training
    stopped for good.
    """
    config = config.resolved()
    use_gpu = cluster.uses_gpu(config.ray)
    check_writable(config.storage, "run.storage")
    manifest = ensure_prepared(config.data, cluster.map_tasks)
    check_matches(manifest, config)
    if (
        config.network.init is not None
        and newest_checkpoint(config.run_folder / CHECKPOINTS) is None
    ):
        report = initialise(random_network(config, manifest), config.network.init)
        print(report.summary(), flush=True)
    with tracked_run(config, around.parent) as tracking:
        with _evaluations(config, manifest, tracking, use_gpu, around):
            pace = train(
                config,
                train_worker,
                tracking,
                gpus_per_worker=worker_gpus(config, around) if use_gpu else 0.0,
            )
        checkpoint = final_checkpoint(config)
        evaluation = evaluate_step(
            config,
            checkpoint.tensors(EMA),
            checkpoint.state.step,
            manifest,
            partial(
                cluster.map_tasks,
                resources=resources_after_training(config, use_gpu, around),
            ),
        )
        _record(tracking, checkpoint.state.step, evaluation, checkpoint.folder)
        _save_summary(config, tracking, checkpoint, evaluation, pace)
        around.watch(checkpoint.state.step, evaluation.metrics)
    return config.run_folder


def _evaluations(
    config: ImageConfig,
    manifest: Manifest,
    tracking: RunHandle,
    use_gpu: bool,
    around: Surroundings,
) -> AbstractContextManager[object]:
    if config.eval.every_kimg is None:
        return nullcontext()

    def evaluate_snapshot(
        weights: dict[str, Tensor], step: int, map_tasks: MapTasks
    ) -> dict[str, float]:
        found = evaluate_step(config, weights, step, manifest, map_tasks)
        _record(tracking, step, found)
        around.watch(step, found.metrics)
        return {name: v for name, v in found.metrics.items() if name.startswith(TOLD)}

    return EvaluationsDuringTraining(
        config, evaluate_snapshot, tracking, use_gpu=use_gpu, around=around
    )


def evaluate_step(
    config: ImageConfig,
    weights: dict[str, Tensor],
    step: int,
    manifest: Manifest,
    map_tasks: MapTasks,
) -> EvaluationResult:
    """Evaluate averaged weights of this run."""
    return evaluate(
        config,
        weights,
        manifest,
        cache_folder=config.storage / "reference",
        out_folder=evaluation_folder(config.run_folder, checkpoint_name(step)),
        map_tasks=map_tasks,
    )


def _record(
    tracking: RunHandle, step: int, evaluation: EvaluationResult, checkpoint: AnyPath | None = None
) -> None:
    """The last sample grids are figures too: under their long names people do not find them."""
    grids, figures = evaluation.grids, evaluation.figures
    record_evaluation(
        tracking,
        step,
        evaluation.metrics,
        [*figures.values(), *grids.values()],
        images={f"samples_{name}": path for name, path in grids.items()},
        checkpoint=checkpoint,
    )


def _save_summary(
    config: ImageConfig,
    tracking: RunHandle,
    checkpoint: Checkpoint,
    evaluation: EvaluationResult,
    pace: Pace | None,
) -> None:
    folder = config.run_folder
    speed, seconds = pace or pace_before(folder)
    RunSummary(
        run=config.run_name,
        recipe=config.recipe,
        cp_weight=config.cp.weight,
        seed=config.run.seed,
        images=checkpoint.state.samples_seen,
        speed=speed,
        training_seconds=seconds,
        metrics=evaluation.metrics,
        checkpoint=str(checkpoint.folder),
        grids={name: str(path) for name, path in evaluation.grids.items()},
        figures={name: str(path) for name, path in evaluation.figures.items()},
        ui_command=ui_command(tracking),
    ).save(folder)
