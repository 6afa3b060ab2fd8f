import pytest
import torch

from cdm_ray.config import EvalConfig, ImageConfig, build_config
from cdm_ray.evaluation.generate import (
    KINDS,
    draw_start,
    from_uint8,
    generate,
    noise_levels,
    num_evaluations,
    sampler_states,
    to_uint8,
)
from cdm_ray.networks import build_network
from cdm_ray.processes.oracles import Gaussian

SEEDS = range(100, 108)


def config(**sampler):
    return build_config(
        ImageConfig,
        {
            "data": {"resolution": 8, "channels": 1},
            "network": {
                "model_channels": 8,
                "channel_mult": [1],
                "num_blocks": 1,
                "attn_resolutions": [],
            },
            "eval": EvalConfig(extractor="digits").model_dump(),
            "sampler": {"ode_steps": 4, "sde_steps": 6, **sampler},
        },
    )


class Denoiser:
    """A function D(x, sigma) in the place of a network; counts its calls, keeps the labels."""

    def __init__(self, function):
        self.function, self.calls, self.labels = function, 0, None

    def __call__(self, x, sigma, class_labels=None):
        assert x.dtype == torch.float32
        self.calls += 1
        self.labels = class_labels
        return self.function(x, sigma)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build_network(config().network, resolution=8, channels=1, label_dim=3)
        for parameter in net.parameters():  # EDM starts with outputs of zero
            parameter.data += 0.05 * torch.randn_like(parameter)
    return net.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seeds_image_does_not_depend_on_the_batch(network, kind):
    together = generate(network, config(), SEEDS, 3, kind, "cpu")
    parts = [
        generate(network, config(), seeds, 3, kind, "cpu")
        for seeds in (SEEDS[:1], SEEDS[1:6], SEEDS[6:])
    ]
    assert together.dtype == torch.uint8
    assert together.shape == (8, 1, 8, 8)
    assert together.float().std() > 10
    # Convolutions of another batch size round differently: a value may cross to the next integer.
    difference = (together.int() - torch.cat(parts).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_different_seeds_give_different_images_and_the_same_seed_the_same(network, kind):
    images = generate(network, config(), [5, 6, 5], 3, kind, "cpu")
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])


def test_ode_transports_the_latents_as_the_closed_form_says():
    data = Gaussian(0.1, 0.09)
    sampler = config(ode_steps=40).sampler
    images = generate(Denoiser(data), config(ode_steps=40), SEEDS, 0, "ode", "cpu")
    latents = draw_start(config(), SEEDS, 0, "cpu").latents.double()
    exact = data.ode(latents * sampler.sigma_max, sampler.sigma_max, 0.0)
    # 40 Heun steps: error below 1e-3 in [-1, 1], a tenth of a grey level.
    assert (images.int() - to_uint8(exact).int()).abs().max() <= 1


def test_sde_samples_have_the_moments_of_the_data():
    data = Gaussian(0.1, 0.09)
    # Ancestral steps, given D in place of an image, lose spread: 1 % of it with this many.
    images = generate(Denoiser(data), config(sde_steps=400), range(200), 0, "sde", "cpu")
    values = from_uint8(images)
    # 12,800 values: standard errors .0027 of the mean and .0019 of the standard deviation.
    assert values.mean() == pytest.approx(0.1, abs=0.011)
    assert values.std() == pytest.approx(0.3, abs=0.011)


def test_both_samplers_start_from_the_same_latents_and_labels(network):
    first, second = (draw_start(config(), SEEDS, 3, "cpu") for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.class_labels, second.class_labels)


def test_classes_are_one_hot_uniform_and_each_seeds_own():
    start = draw_start(config(), range(300), 3, "cpu")
    assert start.class_labels.shape == (300, 3)
    assert torch.equal(start.class_labels.sum(1), torch.ones(300))
    counts = start.class_labels.sum(0)
    assert counts.min() > 70  # 100 expected, standard deviation 8
    alone = draw_start(config(), [17], 3, "cpu")
    assert torch.equal(alone.class_labels[0], start.class_labels[17])
    assert torch.equal(alone.latents[0], start.latents[17])


def test_labels_reach_the_network_and_are_absent_without_classes():
    denoiser = Denoiser(Gaussian(0.0, 0.1))
    generate(denoiser, config(), SEEDS, 3, "ode", "cpu")
    assert torch.equal(denoiser.labels, draw_start(config(), SEEDS, 3, "cpu").class_labels)
    generate(denoiser, config(), SEEDS, 0, "ode", "cpu")
    assert denoiser.labels is None


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_are_as_many_as_reported(kind):
    denoiser = Denoiser(Gaussian(0.0, 0.1))
    generate(denoiser, config(), SEEDS, 0, kind, "cpu")
    assert denoiser.calls == num_evaluations(config().sampler, kind) == {"ode": 7, "sde": 6}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_stops_show_the_path_and_do_not_change_it(kind):
    denoiser, sampler = Gaussian(0.0, 0.1), config().sampler
    sigmas = noise_levels(sampler, kind)

    def states(stops):
        return list(
            sampler_states(denoiser, draw_start(config(), SEEDS, 0, "cpu"), sampler, kind, stops)
        )

    (end,) = states([])
    passed = states([0, 1])
    torch.testing.assert_close(passed[-1], end, rtol=1e-6, atol=1e-6)  # D is float32
    assert len(passed) == 3
    for state, sigma in zip(passed, sigmas[[0, 1]], strict=False):
        # Far above the data, a state is noise of this spread: 512 values, and few coarse steps.
        assert state.std() == pytest.approx(float(sigma), rel=0.25)


def test_uint8_round_trip_is_the_identity_and_conversion_clips():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)[None]), levels[None])
    assert to_uint8(torch.tensor([[-9.0, -1.0, 0.0, 1.0, 9.0]])).tolist() == [[0, 0, 128, 255, 255]]


def test_images_that_are_not_finite_are_no_images():
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="1 of 3 generated images are not finite"):
        to_uint8(x)
