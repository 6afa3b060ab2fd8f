"""Portable checkpoints: a folder of safetensors and JSON that no ZeRO stage or worker count shapes.

    step-00001563/
      weights.safetensors      float32 master weights (with buffers: a complete state dict)
      ema.safetensors          exponential moving average of the weights (likewise complete)
      exp_avg.safetensors      Adam's first moment
      exp_avg_sq.safetensors   Adam's second moment
      config.yaml              configuration of the run
      state.json               counters and the SHA-256 of every other file; written last

A local folder is written under a temporary name and renamed when complete; on an object store, a
folder without a sound state.json is no checkpoint. Reading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cdm_ray.errors import ConfigError
from cdm_ray.storage import AnyPath, list_folder, local_file, remove_folder

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints inside a run's folder."""
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
WEIGHTS, EMA = "weights", "ema"
KINDS = (WEIGHTS, EMA, "exp_avg", "exp_avg_sq")
"""Tensors that a checkpoint holds of every parameter, each kind a file."""


class CheckpointError(ConfigError):
    """A checkpoint that is missing, truncated, changed or of another schema; names the file."""


@dataclass(frozen=True)
class TrainingState:
    """Counters of a run; with the configuration they fix everything that follows."""

    step: int
    """Training steps done, skipped ones included."""
    samples_seen: int
    optimizer_steps: int
    """Updates applied: `step` less the skipped steps."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: AnyPath
    state: TrainingState

    @classmethod
    def open(cls, folder: AnyPath) -> Checkpoint:
        """Verify every file against its digest; raises CheckpointError naming the first bad one."""
        content = _read_state(folder / STATE_FILE)
        for name, digest in content["sha256"].items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; the checkpoint is incomplete")
            if sha256_of(path) != digest:
                raise CheckpointError(f"{path}: truncated or changed since it was written")
        return cls(folder, TrainingState(**content["state"]))

    @property
    def name(self) -> str:
        """Such as step-00001563."""
        return self.folder.absolute().name

    @property
    def run_folder(self) -> AnyPath:
        """Folder of the run that it lies in, wherever that was moved to, or the folder around a
        checkpoint that was copied out of its run."""
        around = self.folder.absolute().parent
        return around.parent if around.name == CHECKPOINTS else around

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """All tensors of one kind of `KINDS`, on the CPU."""
        path = self.folder / f"{kind}.safetensors"
        try:
            return load_tensors(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file ({error})") from None


def checkpoint_name(step: int) -> str:
    """Name of the folder of what belongs to a step; names sort like steps."""
    return f"step-{step:08d}"


def load_tensors(path: AnyPath) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    with local_file(path) as file:
        return load_file(file)


def sha256_of(path: AnyPath) -> str:
    with path.open("rb") as file:
        # UPath's types do not tell that its files have `readinto`
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def newest_checkpoint(root: AnyPath) -> Checkpoint | None:
    """The newest sound checkpoint under `root`; unsound ones are passed over with a warning."""
    for folder in reversed(checkpoint_folders(root)):
        try:
            return Checkpoint.open(folder)
        except CheckpointError as error:
            log.warning("%s; trying the checkpoint before it", error)
    return None


def open_newest(folder: AnyPath) -> Checkpoint:
    """The checkpoint in `folder`, or the newest sound one of the run whose folder it is.

    Raises CheckpointError if there is none.
    """
    if (folder / STATE_FILE).is_file():
        return Checkpoint.open(folder)
    found = newest_checkpoint(folder / CHECKPOINTS)
    if found is None:
        raise CheckpointError(
            f"{folder}: neither a checkpoint nor the folder of a run with one; "
            f"name RUN/{CHECKPOINTS}/step-N or RUN"
        )
    return found


def checkpoint_folders(root: AnyPath) -> list[AnyPath]:
    return sorted(path for path in list_folder(root) if re.fullmatch(r"step-\d{8}", path.name))


def remove_checkpoint(folder: AnyPath) -> None:
    """Remove a checkpoint, or what there is of it; whatever is left of it by a kill on the way is
    no sound checkpoint."""
    (folder / STATE_FILE).unlink(missing_ok=True)
    remove_folder(folder)


def _read_state(path: AnyPath) -> dict:
    try:
        content = json.loads(path.read_text())
        schema, digest = content["schema"], content.pop("digest")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; not a checkpoint folder") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: truncated or changed since it was written") from None
    if schema != SCHEMA_VERSION:
        raise CheckpointError(f"{path}: schema {schema}, this version reads {SCHEMA_VERSION}")
    if digest != digest_of(content):
        raise CheckpointError(f"{path}: changed since it was written")
    return content


def digest_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
