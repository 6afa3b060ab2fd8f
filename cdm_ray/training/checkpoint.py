"""Portable checkpoints: a folder of safetensors and JSON that no ZeRO stage or worker count shapes.

    step-00001563/
      weights.safetensors      float32 master weights (with buffers: a complete state dict)
      ema.safetensors          exponential moving average of the weights (likewise complete)
      exp_avg.safetensors      Adam's first moment
      exp_avg_sq.safetensors   Adam's second moment
      config.yaml              configuration of the run
      state.json               counters and the SHA-256 of every other file; written last

A folder is written under a temporary name and renamed when complete. Reading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cdm_ray.errors import ConfigError
from cdm_ray.training.engine import KINDS, WEIGHTS, Engine

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"


class CheckpointError(ConfigError):
    """A checkpoint that is missing, truncated, changed or of another schema; names the file."""


@dataclass(frozen=True)
class TrainingState:
    """Counters of a run; with the configuration they fix everything that follows."""

    step: int
    """Training steps done, skipped ones included."""
    images_seen: int
    optimizer_steps: int
    """Updates applied: `step` less the skipped steps."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    state: TrainingState

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Verify every file against its digest; raises CheckpointError naming the first bad one."""
        content = _read_state(folder / STATE_FILE)
        for name, digest in content["sha256"].items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; the checkpoint is incomplete")
            if sha256_of(path) != digest:
                raise CheckpointError(f"{path}: truncated or changed since it was written")
        return cls(folder, TrainingState(**content["state"]))

    def tensors(self, kind: str) -> dict[str, torch.Tensor]:
        """All tensors of one kind of `engine.KINDS`, on the CPU."""
        path = self.folder / f"{kind}.safetensors"
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file ({error})") from None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checkpoint(
    root: Path, engine: Engine, state: TrainingState, config_yaml: str, *, keep_last: int
) -> Path:
    """Write `root/step-N` and drop older checkpoints beyond `keep_last`. Collective.

    The files are dealt to the ranks; each rank gathers all tensors and keeps those of its files.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final = root / f"step-{state.step:08d}"
    temporary = root / f".{final.name}.tmp"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    buffers = {name: tensor.float().cpu() for name, tensor in engine.network.named_buffers()}
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
            save_file(tensors | buffers if kind in (WEIGHTS, "ema") else tensors, path)
            digests[path.name] = sha256_of(path)
    gathered: list[dict[str, str]] = [{}] * world
    dist.all_gather_object(gathered, digests)
    if rank == 0:
        (temporary / CONFIG_FILE).write_text(config_yaml)
        digests = {name: digest for part in gathered for name, digest in part.items()}
        digests[CONFIG_FILE] = sha256_of(temporary / CONFIG_FILE)
        content = {"schema": SCHEMA_VERSION, "state": asdict(state), "sha256": digests}
        content["digest"] = _digest_of(content)
        (temporary / STATE_FILE).write_text(json.dumps(content, indent=1))
        _publish(temporary, final)
        for old in _folders(root)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest sound checkpoint under `root`; unsound ones are passed over with a warning."""
    for folder in reversed(_folders(root)):
        try:
            return Checkpoint.open(folder)
        except CheckpointError as error:
            log.warning("%s; trying the checkpoint before it", error)
    return None


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if re.fullmatch(r"step-\d{8}", path.name))


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


def _read_state(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        schema, digest = content["schema"], content.pop("digest")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; not a checkpoint folder") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: truncated or changed since it was written") from None
    if schema != SCHEMA_VERSION:
        raise CheckpointError(f"{path}: schema {schema}, this version reads {SCHEMA_VERSION}")
    if digest != _digest_of(content):
        raise CheckpointError(f"{path}: changed since it was written")
    return content


def _digest_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
