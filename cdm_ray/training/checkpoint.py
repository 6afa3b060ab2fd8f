"""Writing checkpoints from the ranks of a training run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict

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
    remove_checkpoint,
    sha256_of,
)
from cdm_ray.storage import AnyPath, publish, staging, whole_file, write_whole
from cdm_ray.training.engine import Engine

ExtraTensors = Callable[[], dict[str, dict[str, torch.Tensor]]]
"""Tensors by name of each further file of a checkpoint that a rank writes by itself; the names of
the files, which differ between ranks, are without extension."""


def write_checkpoint(
    root: AnyPath,
    engine: Engine,
    state: TrainingState,
    config_yaml: str,
    *,
    keep_last: int,
    extra: dict[str, dict[str, torch.Tensor]] | None = None,
) -> AnyPath:
    """Write `root/step-N` and drop older checkpoints beyond `keep_last`. Collective.

    The files are dealt to the ranks; each rank gathers all tensors and keeps those of its files,
    and writes its `extra`, see `ExtraTensors`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final = root / checkpoint_name(state.step)
    folder = staging(final)
    if rank == 0:
        remove_checkpoint(folder)  # what a killed write has left
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
            complete = tensors | buffers if kind in (WEIGHTS, EMA) else tensors
            digests |= _write_tensors(folder / f"{kind}.safetensors", complete)
    for stem, tensors in (extra or {}).items():
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        digests |= _write_tensors(folder / f"{stem}.safetensors", tensors)
    gathered: list[dict[str, str]] = [{}] * world
    dist.all_gather_object(gathered, digests)
    if rank == 0:
        digests = {name: digest for part in gathered for name, digest in part.items()}
        digests[CONFIG_FILE] = hashlib.sha256(config_yaml.encode()).hexdigest()
        write_whole(folder / CONFIG_FILE, config_yaml.encode())
        content = {"schema": SCHEMA_VERSION, "state": asdict(state), "sha256": digests}
        content["digest"] = digest_of(content)
        write_whole(folder / STATE_FILE, json.dumps(content, indent=1).encode())
        publish(final)
        _remove_old(final, keep_last)
    dist.barrier()
    return final


def write_average(path: AnyPath, engine: Engine) -> None:
    """Write the averaged weights alone, whole or not at all. Collective."""
    tensors = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in engine.gather(EMA)
        if dist.get_rank() == 0
    }
    if dist.get_rank() == 0:
        _write_tensors(path, tensors | buffers_of(engine))


def buffers_of(engine: Engine) -> dict[str, torch.Tensor]:
    """What a complete state dict has beside the parameters."""
    return {name: tensor.float().cpu() for name, tensor in engine.network.named_buffers()}


def _write_tensors(path: AnyPath, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write a file, whole or not at all; returns its name with its digest."""
    with whole_file(path) as file:
        save_file(tensors, file)
        return {path.name: sha256_of(file)}


def _remove_old(newest: AnyPath, keep_last: int) -> None:
    """Remove what comes before the newest checkpoint, but for the last ones, and what killed writes
    have left, which would otherwise count among them."""
    folders = checkpoint_folders(newest.parent)
    leftovers = [folder for folder in folders if not (folder / STATE_FILE).is_file()]
    names = [f.name for f in folders if f not in leftovers and f.name <= newest.name]
    for folder in folders:
        if folder in leftovers or folder.name in names[:-keep_last]:
            remove_checkpoint(folder)
