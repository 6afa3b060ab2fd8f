"""Weights from files: EDM's published pickles, and safetensors of ours or anybody's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cdm_ray.errors import ConfigError
from cdm_ray.networks.unpickling import PickledObject, load_edm_pickle, one_line

EXPORT_KEY = "cdm_ray.network"
"""Entry of a safetensors file's metadata with the arguments of its network, as JSON."""
TOP_LEVEL = {"ema", "loss_fn", "augment_pipe", "dataset_kwargs"}
"""Keys of EDM's checkpoint pickles."""
PRECOND_ARGUMENTS = (
    *("img_resolution", "img_channels", "label_dim", "use_fp16"),
    *("sigma_min", "sigma_max", "sigma_data", "model_type"),
)
"""Positional arguments of EDM's `EDMPrecond`; the others are the inner network's."""
NETWORK_FIELDS = (
    *("architecture", "model_channels", "channel_mult", "num_blocks", "attn_resolutions"),
    *("class_conditional", "sigma_data"),
)
"""Fields of the configuration's network section that decide which weights fit."""


@dataclass(frozen=True)
class Published:
    """Weights as a file gives them."""

    tensors: dict[str, torch.Tensor]
    """Parameters and buffers, float32 on the CPU, by the names of `EDMPrecond.state_dict()`."""
    origin: str
    """The file."""
    settings: dict[str, Any]
    """`section.field` -> value that configures the network of these weights; empty if the file
    does not tell."""


def read_weights(path: Path) -> Published:
    """Weights of a `.pkl` of EDM's or of a `.safetensors` file; runs no code from either.

    Raises ConfigError naming the file when it cannot be read, holds anything but weights, or holds
    numbers that are not finite.
    """
    if path.suffix == ".pkl":
        return read_edm_pickle(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    raise ConfigError(f"{path}: weights of an unknown kind; give EDM's .pkl or a .safetensors")


def read_safetensors(path: Path) -> Published:
    """All tensors of the file; the settings only of one that this package exported."""
    tensors, metadata = load_safetensors(path)
    settings: dict[str, Any] = {}
    if EXPORT_KEY in metadata:
        arguments = export_arguments(path, metadata)
        settings = network_settings(
            arguments["network"], arguments["resolution"], arguments["channels"]
        )
    return Published(tensors, str(path), settings)


def load_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of the file, float32 on the CPU, and its metadata.

    Raises ConfigError when it cannot be read or holds anything but finite numbers.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({one_line(str(error))})") from None
    except SafetensorError as error:
        raise ConfigError(f"{path}: no sound safetensors file ({one_line(str(error))})") from None
    return _as_float32(tensors, path), metadata


def export_arguments(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `build_network` from the metadata of an exported file.

    Raises ConfigError when there are none.
    """
    try:
        arguments = json.loads(metadata[EXPORT_KEY])
        whole = all(name in arguments["network"] for name in NETWORK_FIELDS)
        numbers = ("resolution", "channels", "label_dim", "augment_dim")
        whole = whole and all(type(arguments[name]) is int for name in numbers)
    except (KeyError, ValueError, TypeError):
        whole = False
    if not whole:
        raise ConfigError(
            f"{path}: the metadata does not tell which network the weights are of; "
            "use a file that jobs/export.py wrote"
        )
    return arguments


def network_settings(network: Mapping[str, Any], resolution: int, channels: int) -> dict[str, Any]:
    """`Published.settings` from the fields of a network section."""
    fields = {f"network.{name}": network[name] for name in NETWORK_FIELDS}
    return {"data.resolution": resolution, "data.channels": channels} | fields


def read_edm_pickle(path: Path) -> Published:
    """The averaged weights `ema` of EDM's checkpoint pickle (Karras et al. 2022, released code).

    Raises ConfigError when the file is no such checkpoint, and for the networks of its baselines,
    whose preconditioning is another one.
    """
    content = load_edm_pickle(path)
    keys = sorted(map(str, content)) if isinstance(content, dict) else []
    if not isinstance(content, dict) or "ema" not in content or not set(keys) <= TOP_LEVEL:
        found = f"the keys {one_line(', '.join(keys))}" if keys else f"a {type(content).__name__}"
        raise ConfigError(
            f"{path}: not an EDM checkpoint: it holds {found}, and should have "
            f"{', '.join(sorted(TOP_LEVEL))}"
        )
    ema = content["ema"]
    if not isinstance(ema, PickledObject) or ema.class_name != "EDMPrecond":
        name = ema.class_name if isinstance(ema, PickledObject) else type(ema).__name__
        raise ConfigError(
            f"{path}: the network is a {name[:100]!r}; only EDMPrecond can be used, "
            "the preconditioning of EDM's own models"
        )
    tensors = _as_float32(_flatten(ema, path), path)
    return Published(tensors, str(path), edm_settings(_constructor_arguments(ema, path)))


def edm_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`Published.settings` from the arguments of EDM's `EDMPrecond`, whose defaults they are;
    without what has no counterpart here."""
    adm = arguments.get("model_type", "DhariwalUNet") == "DhariwalUNet"
    embedding = arguments.get("embedding_type", "positional")
    encoder = arguments.get("encoder_type", "standard")
    architecture = None
    if adm:
        architecture = "adm"
    elif (embedding, encoder) == ("positional", "standard"):
        architecture = "ddpmpp"
    elif (embedding, encoder) == ("fourier", "residual"):
        architecture = "ncsnpp"
    defaults: dict[str, tuple[str, Any]] = {
        "network.model_channels": ("model_channels", 192 if adm else 128),
        "network.channel_mult": ("channel_mult", [1, 2, 3, 4] if adm else [1, 2, 2, 2]),
        "network.num_blocks": ("num_blocks", 3 if adm else 4),
        "network.attn_resolutions": ("attn_resolutions", [32, 16, 8] if adm else [16]),
        "network.sigma_data": ("sigma_data", 0.5),
    }
    settings: dict[str, Any] = {
        "data.resolution": _numbers(arguments.get("img_resolution")),
        "data.channels": _numbers(arguments.get("img_channels")),
        "network.architecture": architecture,
    }
    for name, (argument, default) in defaults.items():
        settings[name] = _numbers(arguments.get(argument, default))
    settings["network.class_conditional"] = bool(_numbers(arguments.get("label_dim", 0)))
    return {name: value for name, value in settings.items() if value is not None}


def _numbers(value: object) -> object:
    """A number, or a list of numbers, as it is; None for anything else that a file may hold."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if any(type(item) not in (int, float) for item in items):
        return None
    return items if isinstance(value, list | tuple) else value


def _constructor_arguments(ema: PickledObject, path: Path) -> dict[str, Any]:
    positional = ema.state.get("_init_args", ())
    named = ema.state.get("_init_kwargs", {})
    if type(positional) not in (tuple, list) or type(named) is not dict:
        raise ConfigError(f"{path}: not an EDM checkpoint: no _init_args, _init_kwargs in ema")
    return dict(zip(PRECOND_ARGUMENTS, positional, strict=False)) | named


def _flatten(root: PickledObject, path: Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a pickled torch module and its children, by dotted names.

    Raises ConfigError for what is no module or tensor, and for a module found twice, which a
    module that contains itself is.
    """
    tensors: dict[str, torch.Tensor] = {}
    found: set[int] = set()
    waiting: list[tuple[str, PickledObject]] = [("", root)]
    while waiting:
        prefix, module = waiting.pop()
        where = one_line(prefix.rstrip(".")) or "ema"
        if id(module) in found:
            raise ConfigError(f"{path}: the module {where} contains itself or is there twice")
        found.add(id(module))
        for group in ("_parameters", "_buffers", "_modules"):
            members = module.state.get(group)
            if type(members) is not dict:
                raise ConfigError(f"{path}: the module {where} has no {group}")
            expected = PickledObject if group == "_modules" else torch.Tensor
            for name, member in members.items():
                full = f"{prefix}{name}"
                if member is None:
                    continue
                if not isinstance(member, expected) or full in tensors:
                    what = "there twice" if full in tensors else f"a {type(member).__name__}"
                    raise ConfigError(f"{path}: {one_line(full)} in {group} is {what}")
                if isinstance(member, PickledObject):
                    waiting.append((f"{full}.", member))
                else:
                    tensors[full] = member
    return tensors


def _as_float32(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Copies that share no memory; raises ConfigError for what no weights are."""
    converted: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ConfigError(f"{path}: {name} is {tensor.dtype}; weights are floating point")
        converted[name] = tensor.to(torch.float32, copy=True).contiguous()
        if not converted[name].isfinite().all():
            raise ConfigError(f"{path}: {name} holds numbers that are not finite; file damaged?")
    if not converted:
        raise ConfigError(f"{path}: no tensors in it")
    return converted
