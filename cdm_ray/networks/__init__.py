"""Networks: what is learned."""

from cdm_ray.config import NetworkConfig
from cdm_ray.networks.ddpmpp import DDPMpp
from cdm_ray.networks.precond import EDMPrecond


def build_network(
    config: NetworkConfig, *, resolution: int, channels: int, label_dim: int, augment_dim: int = 0
) -> EDMPrecond:
    """The configured network, its weights initialised from torch's global generator.

    `label_dim` 0 builds an unconditional network; `augment_dim` is 9 with EDM's augmentation.
    """
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
