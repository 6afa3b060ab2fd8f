"""Weights out: a folder with the averaged weights of a checkpoint, fit to be given away.

model.safetensors   the weights and, as metadata, the arguments that rebuild their network
README.md           the model card
config.yaml         the configuration of the run
"""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cdm_ray.checkpoint import CONFIG_FILE, EMA, Checkpoint
from cdm_ray.config import ImageConfig
from cdm_ray.errors import redact
from cdm_ray.model_card import model_card
from cdm_ray.networks.exported import rebuild
from cdm_ray.networks.published import EXPORT_KEY
from cdm_ray.storage import AnyPath, publish, remove_folder, staging, whole_file, write_whole

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"


def export_folder(checkpoint: Checkpoint) -> AnyPath:
    """`RUN/export/step-N`, where the export of a checkpoint goes."""
    return checkpoint.run_folder / "export" / checkpoint.name


def export(config: ImageConfig, checkpoint: Checkpoint) -> AnyPath:
    """Write the export of a checkpoint and return its folder; an older one is replaced.

    `config` is the checkpoint's, but for what the training did not depend on.
    """
    tensors = checkpoint.tensors(EMA)
    arguments = network_arguments(config, tensors)
    rebuild(arguments, tensors, str(checkpoint.folder))  # refuses what could not be loaded again
    folder = export_folder(checkpoint)
    card = model_card(config, checkpoint, arguments, tensors)
    metadata = {"format": "pt", EXPORT_KEY: json.dumps(arguments)}
    staged = staging(folder)
    remove_folder(staged)
    write_whole(staged / CARD_FILE, card.encode())
    trained = (checkpoint.folder / CONFIG_FILE).read_text()
    write_whole(staged / CONFIG_FILE, redact(trained).encode())
    with whole_file(staged / WEIGHTS_FILE) as file:  # last: with it, the folder is whole
        save_file(tensors, file, metadata)
    publish(folder)
    return folder


def network_arguments(config: ImageConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of `build_network` for these weights, as JSON has them."""
    return {
        # Where it started from is no part of a network, and a path of this machine.
        "network": config.network.model_dump(mode="json") | {"init": None},
        "resolution": config.data.resolution,
        "channels": config.data.channels,
        "label_dim": _inputs(tensors, "model.map_label.weight"),
        "augment_dim": _inputs(tensors, "model.map_augment.weight"),
    }


def _inputs(tensors: dict[str, Tensor], layer: str) -> int:
    return tensors[layer].shape[1] if layer in tensors else 0
