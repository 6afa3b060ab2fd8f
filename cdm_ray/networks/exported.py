"""Exported weights: one safetensors file with everything that rebuilding its network takes.

    network = load_exported("model.safetensors")

needs torch, numpy and safetensors, and nothing else of this package than its networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from cdm_ray.errors import ConfigError
from cdm_ray.networks import EDMPrecond, build_network
from cdm_ray.networks.published import export_arguments, load_safetensors


class Differences(NamedTuple):
    """Names of tensors on which a network and a file do not agree."""

    missing: list[str]
    """The network has them, the file does not."""
    unused: list[str]
    """The file has them, the network does not."""
    reshaped: list[str]
    """Both have them, in different shapes."""


def differences(network: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Differences:
    """How the file's tensors differ from the network's parameters and buffers."""
    ours = network.state_dict()
    return Differences(
        missing=[name for name in ours if name not in tensors],
        unused=[name for name in tensors if name not in ours],
        reshaped=[n for n in ours if n in tensors and ours[n].shape != tensors[n].shape],
    )


def load_exported(path: str | Path) -> EDMPrecond:
    """The network of a file that `jobs/export.py` wrote, on the CPU, without gradients.

    It is called as network(x [N, C, H, W], sigma [N] or scalar, one-hot class labels [N, K] if it
    has classes) and gives the denoised images. Raises ConfigError naming the file if it is none.
    """
    tensors, metadata = load_safetensors(Path(path))
    return rebuild(export_arguments(Path(path), metadata), tensors, str(path))


def rebuild(
    arguments: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], origin: str
) -> EDMPrecond:
    """The network of `arguments`, as `export_arguments` gives them, with exactly these tensors.

    Raises ConfigError when they do not fit.
    """
    # Plain attributes: the configuration's classes are not there without pydantic.
    config: Any = SimpleNamespace(**arguments["network"])
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten at once
        network = build_network(
            config, **{name: value for name, value in arguments.items() if name != "network"}
        )
    differing = [name for names in differences(network, tensors) for name in names]
    if differing:
        raise ConfigError(
            f"{origin}: {len(differing)} tensors do not fit the network that goes with them, "
            f"e.g. {differing[0]}; the file was changed"
        )
    network.load_state_dict(dict(tensors))
    return network.eval().requires_grad_(False)
