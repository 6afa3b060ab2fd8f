import pytest
import torch

from cdm_ray.config import NetworkConfig
from cdm_ray.networks import build_network
from cdm_ray.processes.edm import REVERSE_STEPS, karras_sigmas
from cdm_ray.processes.oracles import Gaussian, Mixture
from cdm_ray.randomness import BlockRng
from cdm_ray.samplers.edm import sample_ode, sample_sde

DATA = Gaussian(mean=0.3, variance=0.25)
MIXTURE = Mixture(
    means=torch.tensor([[-0.5], [0.7]]),
    variances=torch.tensor([0.01, 0.04]),
    weights=torch.tensor([0.4, 0.6]),
)


def latents(count, shape=(1, 2, 2)):
    return BlockRng.for_images(range(count), "cpu").normal(count, *shape)


class Recorded:
    def __init__(self, denoiser):
        self.denoiser, self.calls = denoiser, []

    def __call__(self, x, sigma):
        self.calls.append((x.dtype, sigma.dtype, sigma.item(), torch.is_grad_enabled()))
        return self.denoiser(x, sigma)


def small_network():
    torch.manual_seed(0)
    config = NetworkConfig(
        model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)
    )
    network = build_network(config, resolution=8, channels=1, label_dim=0).requires_grad_(False)
    for parameter in network.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return network


def test_heun_has_order_two():
    start, errors = latents(4), []
    for steps in (16, 32, 64):
        sigmas = karras_sigmas(steps, 0.05, 10.0, 7.0)[:-1]  # without the step to 0, which is Euler
        exact = DATA.ode(start.double() * 10, 10.0, 0.05)
        errors.append((sample_ode(DATA, start, sigmas) - exact).abs().max().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 3.4 < coarse / fine < 4.6
    assert errors[-1] < 2e-3


def test_the_ode_ends_on_the_data():
    start = latents(500, (1,))
    exact = DATA.ode(start.double() * 80, 80.0, 0.0)
    for steps in (40, 160):
        images = sample_ode(DATA, start, karras_sigmas(steps, 0.002, 80.0, 7.0))
        # Heun's error at 40 steps is 0.02 on latents of up to 3.5, 16 times less at 160
        torch.testing.assert_close(images, exact, rtol=0, atol=0.03 * (40 / steps) ** 2)


def test_evaluations_per_image_and_their_precision():
    sigmas = karras_sigmas(5, 0.1, 10.0, 7.0)
    ode = Recorded(DATA)
    told = sample_ode(ode, latents(2), sigmas)
    levels = [float(s) for s in sigmas.float()]
    assert [c[2] for c in ode.calls] == [levels[i] for i in (0, 1, 1, 2, 2, 3, 3, 4, 4)]
    sde = Recorded(DATA)
    rng = BlockRng.for_images(range(2), "cpu")
    also = sample_sde(sde, latents(2), sigmas, REVERSE_STEPS["ancestral"], rng)
    assert [c[2] for c in sde.calls] == levels[:5]
    assert told.dtype == also.dtype == torch.float64
    for dtype_x, dtype_sigma, _, grad in ode.calls + sde.calls:
        assert (dtype_x, dtype_sigma, grad) == (torch.float32, torch.float32, False)


@pytest.mark.parametrize("name", REVERSE_STEPS)
def test_an_image_does_not_depend_on_its_batch(name):
    network, sigmas = small_network(), karras_sigmas(6, 0.002, 80.0, 7.0)

    def generate(seeds):
        rng = BlockRng.for_images(seeds, "cpu")
        start = rng.normal(len(seeds), 1, 8, 8)
        return sample_sde(network, start, sigmas, REVERSE_STEPS[name], rng)

    whole = generate(range(6))
    parts = torch.cat([generate([0]), generate([1, 2, 3, 4]), generate([5])])
    # convolutions of other batch sizes may sum in another order
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
    assert (whole[0] - whole[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", REVERSE_STEPS)
def test_sde_samples_of_a_mixture_reproduce_its_moments(name):
    n = 20_000
    rng = BlockRng.for_lanes(0, 0, range(8), "cpu")
    start = rng.normal(n, 1)
    sigmas = karras_sigmas(200, 0.002, 20.0, 7.0)
    x = sample_sde(MIXTURE, start, sigmas, REVERSE_STEPS[name], rng)
    mean = 0.4 * -0.5 + 0.6 * 0.7
    variance = 0.4 * (0.01 + 0.25) + 0.6 * (0.04 + 0.49) - mean**2
    # 4 standard errors, and 0.01 for 200 steps of order 1
    assert abs(x.mean().item() - mean) < 4 * (variance / n) ** 0.5 + 0.01
    assert x.var().item() == pytest.approx(variance, rel=0.05)
    low = x < 0.1
    assert abs(low.double().mean().item() - 0.4) < 4 * (0.24 / n) ** 0.5 + 0.01
    for mode, expected in ((low, 0.1), (~low, 0.2)):
        assert x[mode].std().item() == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("kind", ["ode", *REVERSE_STEPS])
def test_the_denoiser_of_a_finite_data_set_generates_its_images(kind):
    points = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    data, sigmas = Mixture.of_points(points), karras_sigmas(30, 0.002, 40.0, 7.0)
    rng = BlockRng.for_images(range(60), "cpu")
    start = rng.normal(60, 1, 4, 4)
    if kind == "ode":
        x = sample_ode(data, start, sigmas)
    else:
        x = sample_sde(data, start, sigmas, REVERSE_STEPS[kind], rng)
    distance = torch.cdist(x.flatten(1), points.double().flatten(1))
    # the last step returns D at sigma = 0.002, where one image has all the weight
    assert distance.min(1).values.max() < 1e-3
    assert len(distance.argmin(1).unique()) == 6
