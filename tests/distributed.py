"""Worker processes with a gloo group, without Ray: for tests of what happens between ranks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

forkserver.set_forkserver_preload(["torch", "deepspeed"])  # imported once, not by each worker


def run_workers(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """`function(rank, world, *arguments)` in `world` processes; their results by rank."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it on import
    forkserver.ensure_running()
    del os.environ["DS_ACCELERATOR"]
    with tempfile.TemporaryDirectory() as folder:
        entering = (world, folder, function, arguments)
        mp.start_processes(_enter, entering, nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def _enter(
    rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        torch.save(function(rank, world, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
