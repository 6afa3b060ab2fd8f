"""The driver's part of any training run: its folder, and its workers on Ray Train."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray.train.torch

from cdm_ray.checkpoint import CHECKPOINTS, Checkpoint, newest_checkpoint
from cdm_ray.cluster import ray_storage
from cdm_ray.config import JobConfig, read_config, to_yaml
from cdm_ray.errors import ConfigError, RunFailed
from cdm_ray.storage import write_whole
from cdm_ray.tracking import EndStatus, RunHandle, finish_run, open_run
from cdm_ray.training.worker import Assignment, Pace, fatal_message

CONFIG_FILE = "config.yaml"

Worker = Callable[[dict[str, Assignment]], dict[str, Any]]


@contextmanager
def tracked_run(config: JobConfig, parent: str | None = None) -> Iterator[RunHandle]:
    """The MLflow run of a (resolved) run, while its folder is worked in; ends it with the status
    that the block ended with."""
    claim_folder(config)
    tracking = open_run(
        config,
        storage=config.storage,
        run_name=config.run_name,
        run_folder=config.run_folder,
        parent=parent,
    )
    status: EndStatus = "FAILED"
    try:
        yield tracking
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        finish_run(tracking, status)


def claim_folder(config: JobConfig) -> None:
    """Write the configuration into the run folder; refuse a folder that holds another run."""
    folder = config.run_folder
    path = folder / CONFIG_FILE
    if path.is_file():
        found = config.changed_from(read_config(type(config), path))
        changed = [text for key, text in found.items() if key != config.length_field]
        if changed:
            raise ConfigError(
                f"run.name={config.run_name}: {folder} holds a run with other settings "
                f"({'; '.join(changed)}); choose another run.name"
            )
    write_whole(path, to_yaml(config).encode())


def train(
    config: JobConfig,
    worker: Worker,
    tracking: RunHandle | None,
    *,
    gpus_per_worker: float = 0.0,
) -> Pace | None:
    """Run the workers to the last step, from the newest checkpoint of the (resolved) run.

    Returns the pace, None if nothing was left to do or too little to tell. `worker` is what every
    worker runs.
    """
    newest = newest_checkpoint(config.run_folder / CHECKPOINTS)
    if newest is not None and newest.state.step >= config.steps:
        return None
    launch = f"{time.time_ns()}"
    resources = {"CPU": config.ray.cpus_per_worker}
    use_gpu = gpus_per_worker > 0
    if use_gpu:
        resources["GPU"] = gpus_per_worker
    storage_path, storage_filesystem = ray_storage(config.run_folder / "ray")
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
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
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
    return outcome["pace"]


def final_checkpoint(config: JobConfig) -> Checkpoint:
    checkpoint = newest_checkpoint(config.run_folder / CHECKPOINTS)
    if checkpoint is None or checkpoint.state.step < config.steps:
        raise RunFailed(
            f"{config.run_folder / CHECKPOINTS}: no sound checkpoint of the last step, "
            f"{config.steps}; run the same command again to continue"
        )
    return checkpoint
