"""DDPM++ is the published network: names, shapes and outputs of the original implementation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from cdm_ray.config import NetworkConfig
from cdm_ray.networks import build_network
from cdm_ray.networks.layers import Conv

FIXTURES = Path(__file__).parents[1] / "fixtures" / "edm"
FULL_SIZE = json.loads((FIXTURES / "full_size_state_dicts.json").read_text())


def from_edm(config):
    """Our network for a configuration of the original implementation."""
    return build_network(
        NetworkConfig(
            model_channels=config["model_channels"],
            channel_mult=tuple(config["channel_mult"]),
            num_blocks=config.get("num_blocks", 4),
            attn_resolutions=tuple(config.get("attn_resolutions", [16])),
            dropout=config.get("dropout", 0.1),
        ),
        resolution=config["img_resolution"],
        channels=config["img_channels"],
        label_dim=config["label_dim"],
        augment_dim=config["augment_dim"],
    )


@pytest.mark.parametrize("labels", ["cond", "uncond"])
@pytest.mark.parametrize("augmented", [True, False])
def test_reproduces_the_original_outputs(labels, augmented):
    with safe_open(FIXTURES / f"ddpmpp-{labels}.safetensors", "pt") as file:
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


def small(**changes):
    torch.manual_seed(0)
    config = NetworkConfig(
        model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)
    ).model_copy(update=changes)
    return build_network(config, resolution=8, channels=1, label_dim=10)


def inputs(n=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    return x, torch.rand(n, generator=generator) + 0.1, torch.eye(10)[:n]


def test_starts_as_the_best_denoiser_that_ignores_the_image():
    """Initial F is nearly 0, so D is nearly c_skip x whatever the rest of the network does."""
    x, sigma, labels = inputs()
    c_skip = (0.25 / (0.25 + sigma**2)).view(-1, 1, 1, 1)
    torch.testing.assert_close(small()(x, sigma, labels), c_skip * x, rtol=0, atol=1e-3)


def trained(**changes):
    """Weights of usual size everywhere, so that every input matters."""
    network = small(**changes)
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.requires_grad_(False)


def test_every_input_matters():
    network, (x, sigma, labels) = trained(), inputs()
    base = network(x, sigma, labels)
    assert not torch.allclose(network(x, sigma * 2, labels), base)
    assert not torch.allclose(network(x, sigma, labels.roll(1, 0)), base)


def test_scalar_sigma_is_the_same_for_all_images():
    network, (x, _, labels) = trained(), inputs()
    torch.testing.assert_close(
        network(x, torch.tensor(0.7), labels), network(x, torch.full((4,), 0.7), labels)
    )


def test_images_do_not_see_each_other():
    network, (x, sigma, labels) = trained(), inputs()
    alone = torch.cat(
        [network(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]) for i in range(4)]
    )
    torch.testing.assert_close(network(x, sigma, labels), alone, rtol=1e-4, atol=1e-5)


def test_bf16_weights_give_a_close_float32_result():
    network, (x, sigma, labels) = trained(), inputs()
    expected = network(x, sigma, labels)
    denoised = network.bfloat16()(x, sigma, labels)
    assert denoised.dtype == torch.float32
    # 8 bits of mantissa through a dozen layers
    assert (denoised - expected).norm() / expected.norm() < 0.03


def test_channels_last_changes_nothing():
    network, (x, sigma, labels) = trained(), inputs()
    expected = network(x, sigma, labels)
    network = network.to(memory_format=torch.channels_last)
    told = network(x.contiguous(memory_format=torch.channels_last), sigma, labels)
    torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("resample", "taps"),
    [("down", (1, 1)), ("up", (1, 1)), ("down", (1, 3, 3, 1)), ("up", (1, 3, 3, 1))],
)
def test_resampling_is_a_separable_filter_of_unit_gain(resample, taps):
    layer = Conv(2, 3, 1, resample=resample, resample_filter=taps)
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    kernel = torch.tensor(taps, dtype=torch.float32) / sum(taps)
    kernel = kernel.outer(kernel)[None, None].expand(2, 1, -1, -1)
    padding = (len(taps) - 1) // 2
    if resample == "down":
        resampled = F.conv2d(x, kernel, stride=2, padding=padding, groups=2)
    else:
        resampled = F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=2)
    expected = F.conv2d(resampled, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    constant = layer(torch.ones(1, 2, 8, 8))[..., 3:-3, 3:-3]
    torch.testing.assert_close(
        constant, (layer.weight.sum((1, 2, 3)) + layer.bias).view(1, 3, 1, 1).expand_as(constant)
    )
