"""`network.init`: weights that a run starts from, and what of them fitted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from cdm_ray.checkpoint import CONFIG_FILE, EMA, open_newest
from cdm_ray.config import ImageConfig, is_of, read_config
from cdm_ray.errors import ConfigError
from cdm_ray.networks import EDMPrecond
from cdm_ray.networks.exported import differences
from cdm_ray.networks.published import Published, network_settings, read_weights
from cdm_ray.storage import path_of

SHOWN = 3
"""Tensors that an error names."""


@dataclass(frozen=True)
class Report:
    """What became of the tensors of a file and of a network."""

    origin: str
    copied: list[str]
    """Now as in the file."""
    constant: list[str]
    """Not in the file and not learned: the resampling filters."""
    zeroed: dict[str, str]
    """Not to be had from the file, so 0 now, and why."""
    unused: dict[str, str]
    """In the file only, and why."""
    numbers: int
    """Copied values."""

    def summary(self) -> str:
        """A line with the counts, then a line for each tensor that was not simply copied."""
        total = len(self.copied) + len(self.zeroed)
        lines = [
            f"network.init={self.origin}: {len(self.copied)} of {total} tensors copied, "
            f"{self.numbers:,} numbers"
        ]
        if self.constant:
            lines.append(f"  not in the file  {len(self.constant)} resampling filters, constants")
        lines += [f"  starts at 0      {name}: {why}" for name, why in self.zeroed.items()]
        lines += [f"  not used         {name}: {why}" for name, why in self.unused.items()]
        return "\n".join(lines)


def initialise(network: EDMPrecond, init: str) -> Report:
    """Put the weights of `network.init` into the network; see `read_initial` and `load_into`."""
    return load_into(network, read_initial(init))


def read_initial(init: str) -> Published:
    """Weights of EDM's .pkl or a .safetensors; of the folder of a checkpoint, or of a run for its
    newest one, the averaged weights.

    Raises ConfigError with one line that names network.init and the file.
    """
    try:
        path = path_of(init)
        if not path.exists():
            raise ConfigError(
                f"{init}: no such file or folder; give EDM's .pkl, a .safetensors, or the folder "
                "of a checkpoint or a run"
            )
        if not path.is_dir():
            if isinstance(path, Path):
                return read_weights(path)
            raise ConfigError("a file at a URL; download it, or give the folder of a run")
        checkpoint = open_newest(path)
        file = checkpoint.folder / CONFIG_FILE
        if not is_of(ImageConfig, file):
            raise ConfigError(f"not a checkpoint of {ImageConfig.JOB}")
        config = read_config(ImageConfig, file)
    except ConfigError as error:
        raise ConfigError(f"network.init={init}: {str(error).removeprefix(f'{init}: ')}") from None
    settings = network_settings(
        config.network.model_dump(mode="json"), config.data.resolution, config.data.channels
    )
    return Published(checkpoint.tensors(EMA), str(checkpoint.folder), settings)


@torch.no_grad()
def load_into(network: EDMPrecond, weights: Published) -> Report:
    """Copy every tensor of the file into the network's of the same name and shape.

    Every parameter has to be in the file, but for those of the class labels and of the augmentation
    labels: where the file's have another shape or are missing, they are set to 0, so that the
    network starts as that of the file, without these labels. Raises ConfigError for any other
    difference, and for another `sigma_data`; the network is then as it was.
    """
    ours = network.state_dict()
    missing, unused, reshaped = differences(network, weights.tensors)
    constant = [name for name in missing if _is_filter(name)]
    absent = [name for name in missing if not _is_filter(name)]
    changed_filters = [
        name
        for name, tensor in weights.tensors.items()
        if _is_filter(name) and name not in unused and name not in reshaped
        if not torch.equal(tensor, ours[name].cpu())
    ]
    shapes = {name: list(tensor.shape) for name, tensor in weights.tensors.items()}
    wanted = {name: list(tensor.shape) for name, tensor in ours.items()}
    problems = [
        *(f"{name} {wanted[name]} is not in the file" for name in absent if not _may_differ(name)),
        *(f"{name} {shapes[name]} is in the file only" for name in unused if not _may_differ(name)),
        *(
            f"{name} is {shapes[name]} in the file and {wanted[name]} in the network"
            for name in reshaped
            if not _may_differ(name)
        ),
        *(f"{name} holds another filter" for name in changed_filters),
    ]
    sigma_data = weights.settings.get("network.sigma_data", network.sigma_data)
    if sigma_data != network.sigma_data:
        problems.append(f"network.sigma_data is {sigma_data} there and {network.sigma_data} here")
    if problems:
        raise ConfigError(_misfit(weights, problems, len(ours)))
    zeroed = {name: _why_zero(name, shapes.get(name)) for name in [*absent, *reshaped]}
    copied = [name for name in ours if name in shapes and name not in zeroed]
    for name in copied:
        ours[name].copy_(weights.tensors[name])
    for name in zeroed:
        ours[name].zero_()
    return Report(
        origin=weights.origin,
        copied=copied,
        constant=constant,
        zeroed=zeroed,
        unused={name: f"{shapes[name]}, this network takes no such labels" for name in unused},
        numbers=sum(ours[name].numel() for name in copied),
    )


def _is_filter(name: str) -> bool:
    return name.endswith(".resample_filter")


def _may_differ(name: str) -> bool:
    """Whether the tensor belongs to labels, of which a run may have others than the file."""
    return name.startswith(("model.map_label.", "model.map_augment."))


def _why_zero(name: str, shape: list[int] | None) -> str:
    labels = "classes" if name.startswith("model.map_label.") else "augmentation labels"
    if shape is None:
        return f"the file's network takes no {labels}"
    return f"the file's is {shape}, for another number of {labels}"


def _misfit(weights: Published, problems: list[str], total: int) -> str:
    shown = "; ".join(problems[:SHOWN]) + ("; ..." if len(problems) > SHOWN else "")
    settings = " ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for name, value in weights.settings.items()
    )
    advice = settings or "network.* to the network that the file is of"
    return (
        f"network.init={weights.origin}: does not fit the configured network of {total} tensors "
        f"in {len(problems)} places: {shown}; set {advice}"
    )
