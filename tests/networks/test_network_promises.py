"""What training and evaluation rely on: initial weights, dropout's place, precision, ZeRO-3."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cdm_ray.config import NetworkConfig
from cdm_ray.errors import ConfigError
from cdm_ray.networks import EDMPrecond, build_network
from cdm_ray.networks.dropout import Dropout
from cdm_ray.networks.layers import UNetBlock, group_norm
from cdm_ray.randomness import BlockRng


def build(resolution=8, label_dim=0, seed=0, **fields):
    torch.manual_seed(seed)
    values = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1}
    config = NetworkConfig(**{**values, "attn_resolutions": (4,), **fields})
    return build_network(config, resolution=resolution, channels=1, label_dim=label_dim)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loud(module):
    """Adds noise to every weight, so that the nearly zero layers matter too."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.requires_grad_(False)


def expected_gain(name):
    if name.endswith((".conv1", ".proj", "_aux_conv")):
        return 1e-5
    return math.sqrt(0.2) if name.endswith(".qkv") else 1.0


def test_initial_weights_are_glorot_uniform_and_nearly_zero_at_the_end_of_each_branch():
    for name, layer in build(model_channels=32).named_modules():
        if not isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            continue
        window = layer.weight[0, 0].numel()
        fan_in, fan_out = layer.weight.shape[1] * window, layer.weight.shape[0] * window
        bound = expected_gain(name) * math.sqrt(6 / (fan_in + fan_out))
        assert layer.weight.abs().max() <= bound, name
        # std of 288 and more uniform draws: 5 standard errors are 5 * sqrt(0.2 / 288) = 13 %
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.13), name
        assert layer.bias is None or not layer.bias.any(), name


def test_initial_weights_come_from_the_global_generator():
    first, again, other = (build(seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(
        not torch.equal(first[key], other[key])
        for key in first
        if key.endswith("weight") and first[key].ndim > 1
    )


class DropAll:
    """Drops everything, and counts."""

    def __init__(self):
        self.probabilities = []

    def __call__(self, h, p):
        self.probabilities.append(p)
        return torch.zeros_like(h)


def test_dropout_is_the_input_of_the_second_convolution():
    block = loud(UNetBlock(8, 8, 4, dropout=0.3))
    x = noise(2, 8, 4, 4)
    dropped = block(x, noise(2, 4), DropAll())
    expected = (x + block.conv1.bias[:, None, None]) * math.sqrt(0.5)
    torch.testing.assert_close(dropped, expected)


def test_every_block_has_the_configured_dropout():
    network, drop = build(dropout=0.3), DropAll()
    network(noise(1, 1, 8, 8), torch.ones(1), dropout=drop)
    blocks = [module for module in network.modules() if isinstance(module, UNetBlock)]
    assert drop.probabilities == [0.3] * len(blocks)


def test_dropout_keeps_the_mean_in_bf16():
    h = torch.arange(128, 256).bfloat16()[None]  # every mantissa
    kept = Dropout(BlockRng.for_lanes(0, 0, [0], "cpu"))(h, 0.25)
    # one rounding of the exact product; a factor rounded to bf16 gives other values
    exact = (h.double() / 0.75).bfloat16()
    assert torch.equal(kept, torch.where(kept == 0, kept, exact))


class Probe(torch.nn.Module):
    """A network F = 1 that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

    def forward(self, x, noise_level, *labels):
        self.given = x, noise_level
        return self.weight.expand(x.shape)


def test_preconditioning_is_float32_around_a_bf16_network():
    network = Probe()
    x, sigma = noise(4, 1, 8, 8), torch.tensor([0.002, 0.3, 2.0, 80.0])
    denoised = EDMPrecond(network, 0.5)(x, sigma)
    wide = sigma.double().view(-1, 1, 1, 1)
    expected = x * 0.25 / (wide**2 + 0.25) + wide * 0.5 / (wide**2 + 0.25).sqrt()
    # float32 rounding of a few operations on values of order 1
    torch.testing.assert_close(denoised, expected.float(), rtol=1e-6, atol=1e-6)
    scaled, noise_level = network.given
    assert scaled.dtype == torch.bfloat16
    torch.testing.assert_close(noise_level, sigma.log() / 4, rtol=1e-6, atol=0)


def partitioned(network):
    """Weights exist only during the forward of the layer that owns them, as under ZeRO-3."""
    for layer in network.modules():
        owned = dict(layer.named_parameters(recurse=False))
        full = {name: parameter.data for name, parameter in owned.items()}

        def gather(module, inputs, owned=owned, full=full):
            for name, parameter in owned.items():
                parameter.data = full[name]

        def release(module, inputs, output, owned=owned):
            for parameter in owned.values():
                parameter.data = parameter.data.new_empty(0)

        if owned:
            release(layer, None, None)
            layer.register_forward_pre_hook(gather)
            layer.register_forward_hook(release)
    return network


def test_weights_are_used_by_their_own_layer_alone():
    network, x, sigma = loud(build()), noise(2, 1, 8, 8), torch.ones(2)
    expected = network(x, sigma)
    assert torch.equal(partitioned(network)(x, sigma), expected)


def test_forward_is_one_graph():
    network, x, sigma = loud(build(label_dim=10)), noise(2, 1, 8, 8), torch.ones(2)
    captured = torch.compile(network, fullgraph=True, backend="eager")
    labels = torch.eye(10)[:2]
    torch.testing.assert_close(captured(x, sigma, labels), network(x, sigma, labels))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_keeps_the_layout_and_may_use_the_fused_kernel(layout):
    block = UNetBlock(8, 8, 4, dropout=0.1, attention=True).to(memory_format=layout)
    x = noise(2, 8, 4, 4).contiguous(memory_format=layout)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # alone: anything else is an error
        out = block(x, noise(2, 4), Dropout(BlockRng.for_lanes(0, 0, [0], "cpu")))
    assert out.is_contiguous(memory_format=layout)


def test_jacobian_vector_product_is_the_finite_difference():
    network, x, v = loud(build()).double(), noise(1, 1, 8, 8).double(), noise(1, 1, 8, 8, seed=5)

    def inner(x):
        return network.model(x, torch.zeros(1), None, None, None)

    with sdpa_kernel(SDPBackend.MATH):
        _, product = torch.func.jvp(inner, (x,), (v.double(),))
        difference = (inner(x + 1e-5 * v) - inner(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(product, difference, rtol=1e-5, atol=1e-6)


def test_every_width_has_groups_of_at_least_four_channels():
    for channels in range(4, 1200, 4):
        groups, published = group_norm(channels).num_groups, min(32, channels // 4)
        assert groups <= published
        assert channels % groups == 0
        assert groups == published or channels % published


def test_mistakes_are_refused_with_what_would_be_right():
    with pytest.raises(ConfigError, match=r"attn_resolutions=\[12\].*\[8, 4\]"):
        build(attn_resolutions=(12,))
    with pytest.raises(ConfigError, match="class_conditional"):
        build(class_conditional=True)
    x, sigma = noise(1, 1, 8, 8), torch.ones(1)
    with pytest.raises(ValueError, match="10 classes; class_labels: none"):
        build(label_dim=10)(x, sigma)
    with pytest.raises(ValueError, match="0 classes; class_labels: some"):
        build()(x, sigma, torch.eye(10)[:1])
    with pytest.raises(ValueError, match="augment_labels"):
        build()(x, sigma, None, torch.zeros(1, 9))
