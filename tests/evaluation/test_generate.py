from typing import get_args

import pytest
import torch

from cdm_ray.config import EvalConfig, ImageConfig, SamplerConfig, build_config
from cdm_ray.evaluation.generate import (
    KINDS,
    configured_solver,
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
SOLVERS = [
    *(("ode", solver) for solver in ("euler", "heun", "dpmpp_2m", "dpmpp_3m")),
    *(("sde", solver) for solver in ("ancestral", "euler_maruyama", "churn")),
]
with_every_solver = pytest.mark.parametrize(("kind", "solver"), SOLVERS)


def test_every_solver_of_the_configuration_is_there():
    fields = SamplerConfig.model_fields
    for kind in KINDS:
        names = get_args(fields[f"{kind}_solver"].annotation)
        assert [(kind, name) for name in names] == [pair for pair in SOLVERS if pair[0] == kind]
        for name in names:
            solver = configured_solver(config(**{f"{kind}_solver": name}).sampler, kind)
            assert solver.name == name
            assert solver.stochastic == (kind == "sde")


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


@with_every_solver
def test_a_seeds_image_does_not_depend_on_the_batch(network, kind, solver):
    chosen = config(**{f"{kind}_solver": solver})
    together = generate(network, chosen, SEEDS, 3, kind, "cpu")
    parts = [
        generate(network, chosen, seeds, 3, kind, "cpu")
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


@with_every_solver
def test_evaluations_are_as_many_as_reported(kind, solver):
    denoiser, chosen = Denoiser(Gaussian(0.0, 0.1)), config(**{f"{kind}_solver": solver})
    generate(denoiser, chosen, SEEDS, 0, kind, "cpu")
    steps = {"ode": 4, "sde": 6}[kind]
    expected = 2 * steps - 1 if solver in ("heun", "churn") else steps
    assert denoiser.calls == num_evaluations(chosen.sampler, kind) == expected


@with_every_solver
def test_states_are_at_the_noise_levels_from_the_latents_to_the_image(kind, solver):
    denoiser, chosen = Gaussian(0.0, 0.1), config(**{f"{kind}_solver": solver})
    start = draw_start(chosen, SEEDS, 0, "cpu")
    states = list(sampler_states(denoiser, start, chosen.sampler, kind))
    sigmas = noise_levels(chosen.sampler, kind)
    assert len(states) == len(sigmas) == {"ode": 5, "sde": 7}[kind]
    assert torch.equal(states[0], start.latents.double() * 80)
    images = generate(Denoiser(denoiser), chosen, SEEDS, 0, kind, "cpu")
    assert torch.equal(to_uint8(states[-1]), images)


def test_settings_of_churn_reach_it():
    """Without churn the states are Heun's; otherwise they show where noise comes in, how loud."""
    as_heun = config(ode_solver="heun", ode_steps=8).sampler

    def states(sampler, kind):
        start = draw_start(config(), SEEDS, 0, "cpu")
        return torch.stack(list(sampler_states(Gaussian(0.0, 0.1), start, sampler, kind)))

    def churned(**changes):
        settings = {"churn": 2.0, "churn_min": 0.1, "churn_max": 20.0, "churn_noise": 1.0}
        chosen = config(sde_solver="churn", sde_steps=8, **settings | changes)
        return states(chosen.sampler, "sde")

    heun, usual = states(as_heun, "ode"), churned()
    assert torch.equal(churned(churn=0.0), heun)
    sigmas = noise_levels(as_heun, "ode")
    first = int((sigmas <= 20).nonzero()[0])
    assert torch.equal(usual[: first + 1], heun[: first + 1])
    assert not torch.equal(usual[first + 1], heun[first + 1])
    # A state is linear in the noise; D is float32.
    step = [churned(churn_noise=scale)[first + 1] for scale in (1.0, 1.5, 2.0)]
    torch.testing.assert_close(step[2] - step[1], step[1] - step[0], rtol=0, atol=1e-5)
    assert (step[1] - step[0]).std() > 1
    last = int((sigmas >= 1).nonzero()[-1])
    short = churned(churn_min=1.0)
    assert torch.equal(short[: last + 2], usual[: last + 2])
    assert not torch.equal(short[last + 2], usual[last + 2])


def test_epsilon_scaling_reaches_every_evaluation_of_the_sampler():
    """D <- x - (x - D)/b, in both stages of Heun's method and in the last step."""
    data, scale = Gaussian(0.1, 0.09), 1.05
    scaled = Denoiser(lambda x, sigma: x - (x - data(x, sigma)) / scale)
    for kind in KINDS:
        by_option = generate(
            Denoiser(data), config(epsilon_scale=scale), SEEDS, 0, kind, "cpu"
        ).int()
        by_hand = generate(scaled, config(), SEEDS, 0, kind, "cpu").int()
        without = generate(Denoiser(data), config(), SEEDS, 0, kind, "cpu").int()
        # x - D is taken in float64 by the option: a value may cross to the next integer
        assert (by_option - by_hand).abs().max() <= 1
        assert (by_option - without).abs().max() > 1


def test_uint8_round_trip_is_the_identity_and_conversion_clips():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)[None]), levels[None])
    assert to_uint8(torch.tensor([[-9.0, -1.0, 0.0, 1.0, 9.0]])).tolist() == [[0, 0, 128, 255, 255]]


def test_images_that_are_not_finite_are_no_images():
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="1 of 3 generated images are not finite"):
        to_uint8(x)
