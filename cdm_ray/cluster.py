"""Where work runs: joining or starting a Ray cluster, and mapping a function over it."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs  # type: ignore[import-untyped]
import ray
from tqdm import tqdm

from cdm_ray.config import RayConfig
from cdm_ray.errors import ConfigError
from cdm_ray.storage import AnyPath

T = TypeVar("T")
R = TypeVar("R")

LOCAL_OBJECT_STORE_BYTES = 200 * 2**20
"""Objects are weights and image batches; Ray's default takes 30 % of a laptop's memory."""


@contextmanager
def connected(config: RayConfig, *, show_logs: bool = True) -> Iterator[None]:
    """Join the cluster of `ray.address` or RAY_ADDRESS, else start a local one; leave it after.

    `show_logs`: print what the workers print. Raises ConfigError when an address is given and
    nothing answers there.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": show_logs, "logging_level": "WARNING"}
    if address:
        try:
            _knock(address)
            ray.init(address=address, **options)
        except OSError as error:  # Ray's own errors of connection included
            raise ConfigError(
                f"ray.address={address}: no Ray cluster answers there ({error}); start one with "
                "`ray start --head`, or leave the address empty to run locally"
            ) from None
    else:
        _quiet_local_defaults()
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, config.workers),
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=True,  # on loopback; Train frees its workers through its state API
            **options,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError where nothing listens; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def _quiet_local_defaults() -> None:
    """Settings of a cluster that belongs to this process alone; the user's own ones win."""
    for name, value in {
        "RAY_AUTH_MODE": "disabled",  # loopback only; a token would outlive the job in $HOME
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every line of a worker arrives twice
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # default 2 s delays start and end
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each run; nobody preempts this
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TMPDIR": tempfile.gettempdir(),
    }.items():
        os.environ.setdefault(name, value)


def ray_storage(folder: AnyPath) -> tuple[str, pyarrow.fs.FileSystem | None]:
    """`storage_path` and `storage_filesystem` of a RunConfig of Ray Train or Ray Tune."""
    if isinstance(folder, Path):
        return str(folder), None
    return folder.path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.fs))


def gpus_in_cluster() -> float:
    """GPUs of all nodes together."""
    return ray.cluster_resources().get("GPU", 0.0)


def uses_gpu(config: RayConfig) -> bool:
    """Whether workers get GPUs; raises ConfigError when they cannot."""
    available, needed = gpus_in_cluster(), config.workers * config.gpus_per_worker
    if config.use_gpu == "auto":
        return available >= needed
    if config.use_gpu and available < needed:
        raise ConfigError(
            f"ray.use_gpu=true needs {needed:g} GPUs for ray.workers={config.workers}, the cluster "
            f"has {available:g}; use fewer workers or ray.use_gpu=false"
        )
    return config.use_gpu


def room_for_workers(config: RayConfig) -> int:
    """Workers that fit on the nodes of the cluster, each on one node, if nothing else runs."""
    gpus = config.gpus_per_worker if uses_gpu(config) else 0.0
    room = 0
    for node in _alive_nodes():
        fits = int(node.get("CPU", 0.0) / config.cpus_per_worker)
        room += min(fits, int(node.get("GPU", 0.0) / gpus)) if gpus else fits
    return room


def room_told() -> str:
    """What the nodes have, for people."""
    nodes = _alive_nodes()
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs together"


def devices(config: RayConfig) -> float:
    """What a second of a run's workers counts as: their GPUs, or without any their CPUs."""
    each = config.gpus_per_worker if uses_gpu(config) else config.cpus_per_worker
    return config.workers * each


def _alive_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@dataclass(frozen=True)
class TaskResources:
    """What each of the tasks of a map takes, and how many of them may run at once."""

    cpus: float = 1.0
    gpus: float = 0.0
    at_once: int | None = None
    """None: as many as the cluster has room for."""


def task_resources(config: RayConfig) -> TaskResources:
    """For tasks that generate images: a GPU each, where there are any and `ray.use_gpu` allows."""
    one = config.model_copy(update={"workers": 1})
    return TaskResources(gpus=float(uses_gpu(one)))


def map_tasks(
    function: Callable[[T], R],
    items: Sequence[T],
    description: str,
    *,
    resources: TaskResources = TaskResources(),
    show: bool = True,
) -> list[R]:
    """`[function(item) for item in items]` as Ray tasks, with a progress bar if `show`.

    The function, with whatever it closes over, is put into the object store once. A task whose
    worker dies is run again by Ray; the first one that fails ends the map with its own exception.
    """
    shared = ray.put(function)
    # max_calls=0: by default Ray starts a process for each task that has a GPU.
    # DEFAULT: a trial of a sweep has a placement group, which its tasks would have to fit into.
    remote = ray.remote(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        max_calls=0,
        scheduling_strategy="DEFAULT",
    )
    task: Any = remote(_call)
    waiting = list(enumerate(items))[::-1]
    running: dict[ray.ObjectRef, int] = {}
    results: dict[int, R] = {}
    with tqdm(
        total=len(items), desc=description, file=sys.stderr, dynamic_ncols=True, disable=not show
    ) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < (resources.at_once or len(items)):
                    index, item = waiting.pop()
                    running[task.remote(shared, item)] = index
                (done,), _ = ray.wait(list(running), num_returns=1)
                results[running.pop(done)] = ray.get(done)
                bar.update()
        except ray.exceptions.RayTaskError as error:
            for reference in running:
                ray.cancel(reference)
            raise error.cause from error
    return [results[index] for index in range(len(items))]


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)
