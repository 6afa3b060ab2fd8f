"""Networks: what is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cdm_ray.errors import ConfigError
from cdm_ray.networks.ddpmpp import DDPMpp
from cdm_ray.networks.precond import EDMPrecond

if TYPE_CHECKING:
    from cdm_ray.config import NetworkConfig


def build_network(
    config: NetworkConfig, *, resolution: int, channels: int, label_dim: int, augment_dim: int = 0
) -> EDMPrecond:
    """The configured network, its weights initialised from torch's global generator.

    `label_dim` 0 builds an unconditional network; `augment_dim` is 9 with EDM's augmentation.
    Raises ConfigError for attention at a resolution that no level has, and for a conditional
    network of data without labels.
    """
    levels = [resolution >> level for level in range(len(config.channel_mult))]
    if not set(config.attn_resolutions) <= set(levels):
        raise ConfigError(
            f"network.attn_resolutions={list(config.attn_resolutions)} at {resolution} pixels: "
            f"the levels are {levels}; use some of these, or []"
        )
    if config.class_conditional and label_dim == 0:
        raise ConfigError(
            "network.class_conditional=true needs labels, and the data has none; "
            "use data with labels, or network.class_conditional=false"
        )
    network = DDPMpp(
        resolution=resolution,
        channels=channels,
        label_dim=label_dim,
        augment_dim=augment_dim,
        model_channels=config.model_channels,
        channel_mult=config.channel_mult,
        num_blocks=config.num_blocks,
        attn_resolutions=config.attn_resolutions,
        dropout=config.dropout,
    )
    return EDMPrecond(network, config.sigma_data)


__all__ = ["DDPMpp", "EDMPrecond", "build_network"]
