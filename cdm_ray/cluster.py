"""Where work runs: joining or starting a Ray cluster, and mapping a function over it."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from tqdm import tqdm

from cdm_ray.config import RayConfig
from cdm_ray.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")

LOCAL_OBJECT_STORE_BYTES = 200 * 2**20
"""Objects are weights and image batches; Ray's default takes 30 % of a laptop's memory."""


@contextmanager
def connected(config: RayConfig) -> Iterator[None]:
    """Join the cluster of `ray.address` or RAY_ADDRESS, else start a local one; leave it after.

    Raises ConfigError when an address is given and nothing answers there.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": "WARNING"}
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
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TMPDIR": tempfile.gettempdir(),
    }.items():
        os.environ.setdefault(name, value)


def gpus_in_cluster() -> float:
    """GPUs of all nodes together."""
    return ray.cluster_resources().get("GPU", 0.0)


def uses_gpu(config: RayConfig) -> bool:
    """Whether workers get a GPU each; raises ConfigError when they cannot."""
    available = gpus_in_cluster()
    if config.use_gpu == "auto":
        return available >= config.workers
    if config.use_gpu and available < config.workers:
        raise ConfigError(
            f"ray.use_gpu=true needs ray.workers={config.workers} GPUs, the cluster has "
            f"{available:g}; use fewer workers or ray.use_gpu=false"
        )
    return config.use_gpu


def map_tasks(
    function: Callable[[T], R],
    items: Sequence[T],
    description: str,
    *,
    gpus_per_task: float = 0.0,
) -> list[R]:
    """`[function(item) for item in items]` as Ray tasks with a progress bar.

    The function, with whatever it closes over, is put into the object store once. The first task
    that fails ends the map with that task's own exception.
    """
    shared = ray.put(function)
    task: Any = ray.remote(num_cpus=1, num_gpus=gpus_per_task)(_call)
    references = [task.remote(shared, item) for item in items]
    pending = list(references)
    with tqdm(total=len(items), desc=description, file=sys.stderr, dynamic_ncols=True) as bar:
        try:
            while pending:
                done, pending = ray.wait(pending, num_returns=1)
                ray.get(done)
                bar.update(len(done))
        except ray.exceptions.RayTaskError as error:
            for reference in pending:
                ray.cancel(reference)
            raise error.cause from error
    return ray.get(references)


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)
