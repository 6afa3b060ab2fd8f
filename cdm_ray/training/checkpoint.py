"""Writing checkpoints from the ranks of a training run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from cdm_ray.checkpoint import (
    CONFIG_FILE,
    EMA,
    KINDS,
    SCHEMA_VERSION,
    STATE_FILE,
    WEIGHTS,
    TrainingState,
    checkpoint_folders,
    checkpoint_name,
    digest_of,
    sha256_of,
)
from cdm_ray.training.engine import Engine

ExtraTensors = Callable[[], dict[str, dict[str, torch.Tensor]]]
"""Tensors by name of each further file of a checkpoint that a rank writes by itself; the names of
the files, which differ between ranks, are without extension."""


def write_checkpoint(
    root: Path,
    engine: Engine,
    state: TrainingState,
    config_yaml: str,
    *,
    keep_last: int,
    extra: dict[str, dict[str, torch.Tensor]] | None = None,
) -> Path:
    """Write `root/step-N` and drop older checkpoints beyond `keep_last`. Collective.

    The files are dealt to the ranks; each rank gathers all tensors and keeps those of its files,
    and writes its `extra`, see `ExtraTensors`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final = root / checkpoint_name(state.step)
    temporary = root / f".{final.name}.tmp"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    buffers = buffers_of(engine)
    digests: dict[str, str] = {}
    for index, kind in enumerate(KINDS):
        mine = index % world == rank
        tensors = {
            name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, tensor in engine.gather(kind)
            if mine
        }
        if mine:
            path = temporary / f"{kind}.safetensors"
            save_file(tensors | buffers if kind in (WEIGHTS, EMA) else tensors, path)
            digests[path.name] = sha256_of(path)
    for stem, tensors in (extra or {}).items():
        path = temporary / f"{stem}.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
        digests[path.name] = sha256_of(path)
    gathered: list[dict[str, str]] = [{}] * world
    dist.all_gather_object(gathered, digests)
    if rank == 0:
        (temporary / CONFIG_FILE).write_text(config_yaml)
        digests = {name: digest for part in gathered for name, digest in part.items()}
        digests[CONFIG_FILE] = sha256_of(temporary / CONFIG_FILE)
        content = {"schema": SCHEMA_VERSION, "state": asdict(state), "sha256": digests}
        content["digest"] = digest_of(content)
        (temporary / STATE_FILE).write_text(json.dumps(content, indent=1))
        _publish(temporary, final)
        for old in checkpoint_folders(root)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def write_average(path: Path, engine: Engine) -> None:
    """Write the averaged weights alone, whole or not at all. Collective."""
    tensors = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in engine.gather(EMA)
        if dist.get_rank() == 0
    }
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        save_file(tensors | buffers_of(engine), temporary)
        temporary.replace(path)


def buffers_of(engine: Engine) -> dict[str, torch.Tensor]:
    """What a complete state dict has beside the parameters."""
    return {name: tensor.float().cpu() for name, tensor in engine.network.named_buffers()}


def _publish(temporary: Path, final: Path) -> None:
    """Make the folder durable, then visible under its name."""
    for path in [*temporary.iterdir(), temporary]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    shutil.rmtree(final, ignore_errors=True)  # an unsound one of the same step
    temporary.rename(final)
