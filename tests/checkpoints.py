"""Checkpoint folders without a training."""

import json

from safetensors.torch import save

from cdm_ray.checkpoint import (
    CHECKPOINTS,
    CONFIG_FILE,
    KINDS,
    SCHEMA_VERSION,
    STATE_FILE,
    Checkpoint,
    digest_of,
    sha256_of,
)
from cdm_ray.config import to_yaml


def make_checkpoint(run_folder, config, tensors, *, step=7, samples_seen=896):
    """A sound checkpoint whose averaged weights are `tensors`, and all others 0."""
    folder = run_folder / CHECKPOINTS / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        content = tensors if kind == "ema" else {n: 0 * t for n, t in tensors.items()}
        (folder / f"{kind}.safetensors").write_bytes(save(content))
    (folder / CONFIG_FILE).write_text(to_yaml(config))
    content = {
        "schema": SCHEMA_VERSION,
        "state": {"step": step, "samples_seen": samples_seen, "optimizer_steps": step},
        "sha256": {path.name: sha256_of(path) for path in folder.iterdir()},
    }
    content["digest"] = digest_of(content)
    (folder / STATE_FILE).write_text(json.dumps(content))
    return Checkpoint.open(folder)
