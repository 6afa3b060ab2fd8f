"""The networks are the published ones: names, shapes and outputs of the original implementation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cdm_ray.config import NetworkConfig
from cdm_ray.networks import build_network
from tests.networks.architectures import ARCHITECTURES

FIXTURES = Path(__file__).parents[1] / "fixtures" / "edm"
FULL_SIZE = json.loads((FIXTURES / "full_size_state_dicts.json").read_text())
DEFAULTS = {
    "SongUNet": {"num_blocks": 4, "attn_resolutions": [16], "augment_dim": 0},
    "DhariwalUNet": {"num_blocks": 3, "attn_resolutions": [32, 16, 8], "augment_dim": 0},
}
"""Of the original constructors, where a configuration leaves them out."""


def architecture(config):
    if config["model_type"] == "DhariwalUNet":
        return "adm"
    return {"positional": "ddpmpp", "fourier": "ncsnpp"}[config["embedding_type"]]


def from_edm(config):
    """Our network for a configuration of the original implementation."""
    config = DEFAULTS[config["model_type"]] | config
    return build_network(
        NetworkConfig(
            architecture=architecture(config),
            model_channels=config["model_channels"],
            channel_mult=tuple(config["channel_mult"]),
            num_blocks=config["num_blocks"],
            attn_resolutions=tuple(config["attn_resolutions"]),
        ),
        resolution=config["img_resolution"],
        channels=config["img_channels"],
        label_dim=config["label_dim"],
        augment_dim=config["augment_dim"],
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("labels", ["cond", "uncond"])
@pytest.mark.parametrize("augmented", [True, False])
def test_reproduces_the_original_outputs(architecture, labels, augmented):
    with safe_open(FIXTURES / f"{architecture}-{labels}.safetensors", "pt") as file:
        network = from_edm(json.loads(file.metadata()["config"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    prefix = "weights."
    network.load_state_dict(
        {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    )
    with torch.no_grad():
        denoised = network(
            tensors["x"],
            tensors["sigma"],
            tensors.get("class_labels"),
            tensors["augment_labels"] if augmented else None,
        )
    expected = tensors["D_with_augment_labels" if augmented else "D_without_augment_labels"]
    torch.testing.assert_close(denoised, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_published_sizes_have_the_published_names_and_shapes(name):
    published = FULL_SIZE[name]
    with torch.device("meta"):
        network = from_edm(published["config"])
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert shapes == published["tensors"]
    assert sum(p.numel() for p in network.parameters()) == published["num_params"]
