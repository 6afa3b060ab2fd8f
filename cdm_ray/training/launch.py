"""The driver of an image run: data, tracking, Ray Train, evaluation, in that order."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray.train.torch

from cdm_ray import cluster
from cdm_ray.checkpoint import CHECKPOINTS, EMA, Checkpoint, newest_checkpoint
from cdm_ray.cluster import TaskResources
from cdm_ray.config import NOT_LEARNED, ImageConfig, flatten, load_config, to_yaml
from cdm_ray.data.manifest import Manifest, check_matches
from cdm_ray.data.prepare import ensure_prepared
from cdm_ray.errors import ConfigError, RunFailed
from cdm_ray.evaluation.evaluate import EvaluationResult
from cdm_ray.initial_weights import initialise
from cdm_ray.report import RESULTS_FILE, RunSummary
from cdm_ray.tracking import EndStatus, RunHandle, finish_run, open_run, ui_command
from cdm_ray.training.evaluations import (
    EvaluationsDuringTraining,
    evaluate_step,
    record_evaluation,
    worker_gpus,
)
from cdm_ray.training.worker import Assignment, fatal_message, random_network, train_worker

CONFIG_FILE = "config.yaml"


def run_images(config: ImageConfig) -> Path:
    """Train as configured, evaluate the averaged weights, record everything in MLflow.

    Returns the run's folder, which then holds the results. Continues the run of the same name. Ray
    must be initialised. Raises ConfigError for a user's mistake and RunFailed when training
    stopped for good.
    """
    config = config.resolved()
    use_gpu = cluster.uses_gpu(config.ray)
    manifest = ensure_prepared(config.data, cluster.map_tasks)
    check_matches(manifest, config)
    if (
        config.network.init is not None
        and newest_checkpoint(config.run_folder / CHECKPOINTS) is None
    ):
        report = initialise(random_network(config, manifest), config.network.init)
        print(report.summary(), flush=True)
    _claim_folder(config)
    tracking = open_run(
        config,
        storage=Path(config.run.storage),
        run_name=config.run_name,
        run_folder=config.run_folder,
    )
    status: EndStatus = "FAILED"
    try:
        with _evaluations(config, manifest, tracking, use_gpu):
            speed = train(config, tracking, use_gpu=use_gpu)
        checkpoint = _final_checkpoint(config)
        evaluation = evaluate_step(
            config,
            checkpoint.tensors(EMA),
            checkpoint.state.step,
            manifest,
            partial(cluster.map_tasks, resources=TaskResources(gpus=float(use_gpu))),
        )
        record_evaluation(tracking, checkpoint.state.step, evaluation, checkpoint.folder)
        _save_summary(config, tracking, checkpoint, evaluation, speed)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        finish_run(tracking, status)
    return config.run_folder


def _evaluations(
    config: ImageConfig, manifest: Manifest, tracking: RunHandle, use_gpu: bool
) -> AbstractContextManager[object]:
    if config.eval.every_kimg is None:
        return nullcontext()
    return EvaluationsDuringTraining(config, manifest, tracking, use_gpu=use_gpu)


def _claim_folder(config: ImageConfig) -> None:
    """Write the configuration into the run folder; refuse a folder that holds another run."""
    folder = config.run_folder
    path = folder / CONFIG_FILE
    if path.is_file():
        before = flatten(load_config(ImageConfig, str(path)))
        now = flatten(config)
        may_change = (*NOT_LEARNED, "train.images")
        changed = [
            f"{key} was {before[key]}, is {now[key]}"
            for key in now
            if before[key] != now[key] and not key.startswith(may_change)
        ]
        if changed:
            raise ConfigError(
                f"run.name={config.run_name}: {folder} holds a run with other settings "
                f"({'; '.join(changed)}); choose another run.name"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(config))


def train(
    config: ImageConfig,
    tracking: RunHandle | None,
    *,
    use_gpu: bool = False,
    worker: Callable[[dict[str, Assignment]], dict[str, Any]] = train_worker,
) -> float | None:
    """Run the workers to the last step, from the newest checkpoint of the (resolved) run.

    Returns the median images per second, None if nothing was left to do or too little to tell.
    `worker` is what every worker runs; another one is for tests and benchmarks, around
    `train_worker`.
    """
    newest = newest_checkpoint(config.run_folder / CHECKPOINTS)
    if newest is not None and newest.state.step >= config.steps:
        return None
    launch = f"{time.time_ns()}"
    resources = {"CPU": config.ray.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = worker_gpus(config)
    api: Any = ray.train  # typed as Train V1, while V2 is what runs
    trainer = api.torch.TorchTrainer(
        worker,
        train_loop_config={
            "assignment": Assignment(config.model_dump(mode="json"), tracking, launch)
        },
        torch_config=api.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=api.ScalingConfig(
            num_workers=config.ray.workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=api.RunConfig(
            # Ray resumes by this name; our own checkpoints decide where a run goes on instead.
            name=launch,
            storage_path=str(config.run_folder / "ray"),
            failure_config=api.FailureConfig(max_failures=config.ray.max_failures),
            worker_runtime_env={"env_vars": {} if use_gpu else {"DS_ACCELERATOR": "cpu"}},
        ),
    )
    try:
        outcome: dict[str, Any] = trainer.fit().return_value
    except api.TrainingFailedError:
        if (message := fatal_message(config.run_folder, launch)) is None:
            raise
        raise RunFailed(message) from None
    if "fatal" in outcome:
        raise RunFailed(outcome["fatal"])
    return outcome["images_per_second"]


def _final_checkpoint(config: ImageConfig) -> Checkpoint:
    checkpoint = newest_checkpoint(config.run_folder / CHECKPOINTS)
    if checkpoint is None or checkpoint.state.step < config.steps:
        raise RunFailed(
            f"{config.run_folder / CHECKPOINTS}: no sound checkpoint of the last step, "
            f"{config.steps}; run the same command again to continue"
        )
    return checkpoint


def _save_summary(
    config: ImageConfig,
    tracking: RunHandle,
    checkpoint: Checkpoint,
    evaluation: EvaluationResult,
    speed: float | None,
) -> None:
    folder = config.run_folder
    if speed is None and (folder / RESULTS_FILE).is_file():
        speed = RunSummary.load(folder).images_per_second  # evaluated again, not trained
    RunSummary(
        run=config.run_name,
        recipe=config.recipe,
        cp_weight=config.cp.weight,
        seed=config.run.seed,
        images=checkpoint.state.images_seen,
        images_per_second=speed,
        metrics=evaluation.metrics,
        checkpoint=str(checkpoint.folder),
        grids={name: str(path) for name, path in evaluation.grids.items()},
        figures={name: str(path) for name, path in evaluation.figures.items()},
        ui_command=ui_command(tracking),
    ).save(folder)
