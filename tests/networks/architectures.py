"""Small networks of every architecture, and inputs for them."""

import torch

from cdm_ray.config import NetworkConfig
from cdm_ray.networks import build_network

ARCHITECTURES = ("ddpmpp", "ncsnpp", "adm")


def build(architecture, *, seed=0, resolution=8, channels=1, label_dim=0, augment_dim=0, **fields):
    """Two levels of 16 and 32 channels (ADM: 32 and 64, a whole head), attention at the second."""
    torch.manual_seed(seed)
    values = {
        "architecture": architecture,
        "model_channels": 32 if architecture == "adm" else 16,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attn_resolutions": (4,),
    }
    return build_network(
        NetworkConfig(**values | fields),
        resolution=resolution,
        channels=channels,
        label_dim=label_dim,
        augment_dim=augment_dim,
    )


def loud(module):
    """Adds noise to every weight, so that the (nearly) zero layers matter too."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.requires_grad_(False)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
