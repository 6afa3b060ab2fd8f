"""What training, evaluation and later losses rely on, of every architecture: initial weights,
inputs, precision, memory format, ZeRO-3, compilation, derivatives."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from cdm_ray.errors import ConfigError
from cdm_ray.networks import EDMPrecond
from cdm_ray.networks.dropout import Dropout
from cdm_ray.randomness import BlockRng
from tests.networks.architectures import ARCHITECTURES, build, loud, noise

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def inputs(n=4):
    """x, sigma, class labels, augmentation labels."""
    sigma = torch.rand(n, generator=torch.Generator().manual_seed(1)) + 0.1
    return noise(n, 1, 8, 8), sigma, torch.eye(10)[:n], noise(n, 9, seed=3)


def conditional(architecture, **fields):
    return build(architecture, label_dim=10, augment_dim=9, **fields)


def masks(n):
    """Dropout for n images of as many lanes."""
    return Dropout(BlockRng.for_lanes(0, 0, range(n), "cpu"))


@every_architecture
def test_starts_as_the_best_denoiser_that_ignores_the_image(architecture):
    """Initial F is nearly 0, so D is nearly c_skip x whatever the rest of the network does."""
    x, sigma, *labels = inputs()
    c_skip = (0.25 / (0.25 + sigma**2)).view(-1, 1, 1, 1)
    denoised = conditional(architecture)(x, sigma, *labels)
    torch.testing.assert_close(denoised, c_skip * x, rtol=0, atol=1e-3)


def initial_bound(architecture, name, weight):
    """Initial weights are uniform within this of 0."""
    window = weight[0, 0].numel()
    fan_in, fan_out = weight.shape[1] * window, weight.shape[0] * window
    last = name.endswith((".conv1", ".proj", "_aux_conv", "out_conv"))
    if architecture == "adm":
        return 0.0 if last or name.endswith("map_augment") else 1 / math.sqrt(fan_in)
    gain = 1e-5 if last else math.sqrt(0.2) if name.endswith(".qkv") else 1.0
    return gain * math.sqrt(6 / (fan_in + fan_out))


@every_architecture
def test_initial_weights_are_those_of_the_papers(architecture):
    for name, layer in conditional(architecture, model_channels=32).named_modules():
        if not isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            continue
        # 5 standard errors of the standard deviation of n draws: uniform (kurtosis 1.8), normal
        spread = 5 * math.sqrt((0.5 if name.endswith("map_label") else 0.2) / layer.weight.numel())
        std = layer.weight.std().item()
        if architecture == "adm" and name.endswith("map_label"):  # a table of embeddings
            assert std == pytest.approx(1, rel=spread)
            assert layer.bias is None
            continue
        bound = initial_bound(architecture, name, layer.weight)
        assert layer.weight.abs().max() <= bound, name
        assert std == pytest.approx(bound / math.sqrt(3), rel=spread), name
        if architecture == "adm" and layer.bias is not None:
            assert layer.bias.abs().max() <= bound, name
            assert layer.bias.any() == (bound > 0), name
        elif layer.bias is not None:
            assert not layer.bias.any(), name


@every_architecture
def test_initial_weights_come_from_the_global_generator(architecture):
    first, again, other = (build(architecture, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(
        not torch.equal(first[key], other[key])
        for key in first
        if key.endswith("weight") and first[key].ndim > 1 and first[key].any()
    )


@every_architecture
def test_every_input_matters(architecture):
    network, (x, sigma, labels, augment) = loud(conditional(architecture)), inputs()
    base = network(x, sigma, labels, augment)
    assert not torch.allclose(network(x, sigma * 2, labels, augment), base)
    assert not torch.allclose(network(x, sigma, labels.roll(1, 0), augment), base)
    assert not torch.allclose(network(x, sigma, labels, augment.roll(1, 0)), base)


@every_architecture
def test_no_augmentation_labels_are_labels_of_zeros(architecture):
    network, (x, sigma, labels, augment) = loud(conditional(architecture)), inputs()
    without = network(x, sigma, labels)
    assert torch.equal(without, network(x, sigma, labels, torch.zeros_like(augment)))


@every_architecture
def test_scalar_sigma_is_the_same_for_all_images(architecture):
    network, (x, _, *labels) = loud(conditional(architecture)), inputs()
    torch.testing.assert_close(
        network(x, torch.tensor(0.7), *labels), network(x, torch.full((4,), 0.7), *labels)
    )


@every_architecture
def test_images_do_not_see_each_other(architecture):
    network, given = loud(conditional(architecture)), inputs()
    alone = torch.cat([network(*(tensor[i : i + 1] for tensor in given)) for i in range(4)])
    torch.testing.assert_close(network(*given), alone, rtol=1e-4, atol=1e-5)


@every_architecture
def test_bf16_weights_give_a_close_float32_result(architecture):
    network, given = loud(conditional(architecture)), inputs()
    expected = network(*given)
    denoised = network.bfloat16()(*given)
    assert denoised.dtype == torch.float32
    # 8 bits of mantissa through a dozen layers
    assert (denoised - expected).norm() / expected.norm() < 0.03


class Layouts(TorchDispatchMode):
    """Notes images that come out of an operation in another layout than channels-last, and copies.

    Views cost nothing, and what attention does between them is not square. Masks are drawn in the
    order of the contiguous layout, whatever the network's is.
    """

    DRAWING = (torch.ops.aten.empty.memory_format, torch.ops.aten.uniform_.default)

    def __init__(self):
        super().__init__()
        self.strayed, self.copied = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple) else (results,):
            if operation.is_view or operation in self.DRAWING or not result.is_floating_point():
                continue
            if result.ndim != 4 or not 1 < result.shape[2] == result.shape[3]:
                continue
            if not result.is_contiguous(memory_format=torch.channels_last):
                self.strayed.append((operation, result.shape))
            if operation in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
                self.copied.append((operation, result.shape))
        return results


@every_architecture
def test_channels_last_stays_without_copies_and_changes_nothing(architecture):
    network = loud(conditional(architecture, channels=3, dropout=0.3))
    _, sigma, *labels = inputs()
    x = noise(4, 3, 8, 8)
    expected = network(x, sigma, *labels, masks(4))
    network.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    with Layouts() as layouts:
        told = network(x, sigma, *labels, masks(4))
    assert told.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-5)
    assert not layouts.copied
    assert not layouts.strayed


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


@every_architecture
def test_weights_are_used_by_their_own_layer_alone(architecture):
    network, given = loud(conditional(architecture)), inputs()
    expected = network(*given)
    assert torch.equal(partitioned(network)(*given), expected)


@pytest.fixture
def compiler():
    """torch.compile that has seen nothing: what it compiles again depends on what it has seen."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


# Compiling takes seconds: the parts that the architectures share are compiled in one of them.
@pytest.mark.parametrize(
    ("architecture", "checkpointing"), [*((a, False) for a in ARCHITECTURES), ("adm", True)]
)
def test_forward_is_one_graph(architecture, checkpointing, compiler):
    network = loud(conditional(architecture, activation_checkpointing=checkpointing))
    given = inputs()
    captured = compiler(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(captured(*given), network(*given))


def test_dropout_breaks_the_graph_once_and_not_in_every_block(compiler):
    network, given, graphs = loud(conditional("ddpmpp", dropout=0.3)), inputs(), []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    captured = compiler(network, backend=backend)
    told = [captured(*given, masks(4)) for _ in range(2)][-1]
    torch.testing.assert_close(told, network(*given, masks(4)))
    # before the masks, after them, and the preconditioning around the network
    assert len(graphs) == 3


@every_architecture
def test_jacobian_vector_product_is_the_finite_difference(architecture):
    network = loud(build(architecture)).double()
    x, v = noise(1, 1, 8, 8).double(), noise(1, 1, 8, 8, seed=5).double()

    def inner(x):
        return network.model(x, torch.zeros(1), None, None, None)

    with sdpa_kernel(SDPBackend.MATH):
        _, product = torch.func.jvp(inner, (x,), (v,))
        difference = (inner(x + 1e-5 * v) - inner(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(product, difference, rtol=1e-5, atol=1e-6)


@every_architecture
def test_second_derivative_is_the_finite_difference_of_the_first(architecture):
    network = loud(build(architecture)).double()
    x, v = noise(1, 1, 8, 8).double(), noise(1, 1, 8, 8, seed=5).double()

    def gradient(x):
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        value = network.model(x, torch.zeros(1), None, None, None).square().sum()
        return torch.autograd.grad(value, x, create_graph=True)[0]

    with sdpa_kernel(SDPBackend.MATH):
        leaf = x.clone().requires_grad_()
        (product,) = torch.autograd.grad((gradient(leaf) * v).sum(), leaf)
        difference = (gradient(x + 1e-5 * v) - gradient(x - 1e-5 * v)).detach() / 2e-5
    torch.testing.assert_close(product, difference, rtol=1e-4, atol=1e-5)


@every_architecture
def test_labels_that_are_missing_or_of_no_use_are_refused(architecture):
    x, sigma = noise(1, 1, 8, 8), torch.ones(1)
    with pytest.raises(ValueError, match="10 classes; class_labels: none"):
        build(architecture, label_dim=10)(x, sigma)
    with pytest.raises(ValueError, match="0 classes; class_labels: some"):
        build(architecture)(x, sigma, torch.eye(10)[:1])
    with pytest.raises(ValueError, match="augment_labels"):
        build(architecture)(x, sigma, None, torch.zeros(1, 9))


@every_architecture
def test_what_does_not_fit_is_refused_with_what_would(architecture):
    with pytest.raises(ConfigError, match=r"attn_resolutions=\[12\].*\[8, 4\]"):
        build(architecture, attn_resolutions=(12,))
    with pytest.raises(ConfigError, match="class_conditional"):
        build(architecture, class_conditional=True)
    with pytest.raises(ConfigError, match="12 pixels.* 3 times.* multiple of 8"):
        build(architecture, resolution=12, channel_mult=(1, 1, 1, 2))


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"attn_resolutions": (8, 4)}, "at 8 pixels.* 32 channels"),
        ({"attn_resolutions": (), "channel_mult": (2, 3)}, "at 4 pixels.* 96 channels"),
    ],
)
def test_channels_that_are_no_whole_heads_are_refused(fields, place):
    """The innermost level has attention, configured or not."""
    with pytest.raises(ConfigError, match=f"adm.*{place}.* multiple of 64"):
        build("adm", **fields)
    build("ddpmpp", **fields)
