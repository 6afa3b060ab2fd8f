"""Networks: what is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cdm_ray.errors import ConfigError
from cdm_ray.networks.adm import ADM
from cdm_ray.networks.block import ADM_STYLE
from cdm_ray.networks.precond import EDMPrecond
from cdm_ray.networks.song_unet import DDPMPP, NCSNPP, SongUNet
from cdm_ray.networks.unet import UNetSize

if TYPE_CHECKING:
    from cdm_ray.config import NetworkConfig


def build_network(
    config: NetworkConfig, *, resolution: int, channels: int, label_dim: int, augment_dim: int = 0
) -> EDMPrecond:
    """The configured network, its weights initialised from torch's global generator.

    `label_dim` 0 builds an unconditional network; `augment_dim` is 9 with EDM's augmentation.
    Raises ConfigError for a resolution that cannot be halved from level to level, attention at a
    resolution that no level has or (ADM) where the heads do not fit, and a conditional network of
    data without labels.
    """
    size = UNetSize(
        resolution=resolution,
        channels=channels,
        label_dim=label_dim,
        augment_dim=augment_dim,
        model_channels=config.model_channels,
        channel_mult=config.channel_mult,
        num_blocks=config.num_blocks,
        attn_resolutions=config.attn_resolutions,
        dropout=config.dropout,
        activation_checkpointing=config.activation_checkpointing,
    )
    _check(config, size)
    match config.architecture:
        case "ddpmpp":
            return EDMPrecond(SongUNet(size, DDPMPP), config.sigma_data)
        case "ncsnpp":
            return EDMPrecond(SongUNet(size, NCSNPP), config.sigma_data)
        case "adm":
            return EDMPrecond(ADM(size), config.sigma_data)


def _check(config: NetworkConfig, size: UNetSize) -> None:
    halvings = len(size.channel_mult) - 1
    if size.resolution % 2**halvings:
        raise ConfigError(
            f"images of {size.resolution} pixels cannot be halved {halvings} times for the "
            f"{halvings + 1} levels of network.channel_mult; use fewer levels, "
            f"or a resolution that is a multiple of {2**halvings}"
        )
    resolutions = [resolution for resolution, _ in size.levels]
    if not set(size.attn_resolutions) <= set(resolutions):
        raise ConfigError(
            f"network.attn_resolutions={list(size.attn_resolutions)} at {size.resolution} pixels: "
            f"the levels are {resolutions}; use some of these, or []"
        )
    if config.architecture == "adm":
        attending = {*size.attn_resolutions, resolutions[-1]}
        heads_of = ADM_STYLE.head_channels
        assert heads_of is not None
        for resolution, width in size.levels:
            if resolution in attending and width % heads_of:
                raise ConfigError(
                    f"network.architecture=adm has attention at {resolution} pixels, where "
                    f"network.model_channels and channel_mult give {width} channels; its heads "
                    f"have {heads_of} channels each: use a multiple of {heads_of} there"
                )
    if config.class_conditional and size.label_dim == 0:
        raise ConfigError(
            "network.class_conditional=true needs labels, and the data has none; "
            "use data with labels, or network.class_conditional=false"
        )


__all__ = ["ADM", "EDMPrecond", "SongUNet", "build_network"]
