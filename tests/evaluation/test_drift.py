import numpy as np
import pytest
import torch

from cdm_ray.config import EvalConfig, ImageConfig, build_config
from cdm_ray.evaluation.drift import (
    STEP_COUNTS,
    Drift,
    DriftPart,
    cp_residuals,
    drift_on_data,
    generate_with_drift,
    level_indices,
    level_sigmas,
    merge_parts,
)
from cdm_ray.evaluation.estimate import Estimate
from cdm_ray.evaluation.generate import KINDS, generate, noise_levels, to_uint8
from cdm_ray.evaluation.reference import LabelledImages
from cdm_ray.processes.edm import spread
from cdm_ray.processes.oracles import Gaussian, Mixture
from cdm_ray.randomness import BlockRng

VARIANCE = 0.06
EXACT = Gaussian(0.0, VARIANCE)
COUNT = 300


def config(**sampler):
    return build_config(
        ImageConfig,
        {
            "data": {"resolution": 8, "channels": 1},
            "network": {"attn_resolutions": []},
            "eval": EvalConfig(extractor="digits", drift_sigmas=5).model_dump(),
            "sampler": {"ode_steps": 12, "sde_steps": 30, **sampler},
        },
    )


CONFIG = config()


def as_network(denoiser):
    return lambda x, sigma, class_labels: denoiser(x, sigma)


class Inconsistent:
    """Linear, D = a(sigma) x, but the denoiser of other data above sigma = 0.4 than below."""

    def share(self, sigma):
        sigma = torch.as_tensor(sigma)
        variance = torch.where(sigma > 0.4, VARIANCE, 4 * VARIANCE)
        return variance / (variance + sigma**2)

    def __call__(self, x, sigma):
        return self.share(spread(sigma, x)) * x


def gaussian_images(count=COUNT):
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return LabelledImages(to_uint8(EXACT.sample(noise)), None)


def on_data(denoiser, images=None, seeds=range(COUNT), config=CONFIG):
    images = gaussian_images() if images is None else images
    return drift_on_data(as_network(denoiser), config, images, seeds, 0, "cpu")


def on_samples(denoiser, kind="sde", seeds=range(COUNT), probed=COUNT, config=CONFIG):
    network = as_network(denoiser)
    _, part = generate_with_drift(network, config, seeds, 0, kind, "cpu", probed=probed)
    return part


def significance(estimate):
    """Distance from zero in standard errors."""
    return np.abs(estimate.mean) / estimate.error


@pytest.mark.parametrize("measure", [on_data, on_samples], ids=["data", "own samples"])
def test_residual_of_an_exact_denoiser_of_gaussian_data_is_zero(measure):
    # The mean of an ancestral step is exact, D is linear and the noise of a pair cancels: squared
    # rounding errors of float32 are left, (1e-7 * 20)^2. The square of one rollout would be 1e-3.
    part = measure(EXACT)
    for steps in STEP_COUNTS:
        assert part.residuals[steps].shape == (COUNT, 5)
        assert np.abs(part.residuals[steps]).max() < 1e-11


@pytest.mark.parametrize("measure", [on_data, on_samples], ids=["data", "own samples"])
def test_an_inconsistent_denoiser_is_detected(measure):
    part = measure(Inconsistent())
    for steps in STEP_COUNTS:
        assert significance(Estimate.of(part.residuals[steps])).max() > 10


def test_residual_has_the_value_of_the_closed_form():
    # One ancestral step to sigma/2: E[x'|x] = (a + (1 - a)/4) x, so that the gap is
    # (a' (a + (1 - a)/4) - a) x per dimension, and E[x^2] = variance + sigma^2.
    wrong = Inconsistent()
    sigmas = torch.from_numpy(level_sigmas(CONFIG, "sde"))
    a, a_end = wrong.share(sigmas), wrong.share(sigmas / 2)
    gap = a_end * (a + (1 - a) / 4) - a
    expected = (gap**2 * (VARIANCE + sigmas**2)).numpy()
    found = Estimate.of(on_data(wrong).residuals[1])
    assert (np.abs(found.mean - expected) < 4 * found.error + 1e-12).all()
    assert expected.max() > 10 * found.error.max()


def test_error_of_a_single_step_shows_and_goes_away_with_more_steps():
    exact = Mixture.of_points(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    x = exact.sample(20_000, generator) + 0.7 * torch.randn(20_000, 1, 1, 1, generator=generator)
    found = cp_residuals(exact, x, exact(x, 0.7), 0.7, 0.35, BlockRng([generator]))
    one, four = (Estimate.of(found[steps].numpy()) for steps in STEP_COUNTS)
    assert significance(one) > 10
    assert abs(four.mean) < 0.2 * one.mean  # twice the same sample: 0.09, its variance


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_noise_has_the_same_norm_in_samples_and_data_for_an_exact_denoiser(kind):
    # Few steps of a sampler lead it off the data by themselves: 2 % remain with these.
    steps = config(ode_steps=60, sde_steps=600)
    own = Estimate.of(on_samples(EXACT, kind, config=steps).norms[kind])
    data = Estimate.of(on_data(EXACT, config=steps).norms[kind])
    error = np.hypot(own.error, data.error)
    assert (np.abs(own.mean - data.mean) < 4 * error + 0.02 * data.mean).all()


def test_norm_of_predicted_noise_is_that_of_the_closed_form():
    sigmas = level_sigmas(CONFIG, "sde")
    expected = sigmas / np.sqrt(VARIANCE + sigmas**2)  # sqrt(E[(x - D)^2])/sigma
    found = Estimate.of(on_data(EXACT).norms["sde"])
    np.testing.assert_allclose(found.mean, expected, rtol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_drift_from_the_data_have_another_norm(kind):
    wrong = Gaussian(0.0, 4 * VARIANCE)  # consistent, but the denoiser of other data
    own, data = on_samples(wrong, kind).norms[kind], on_data(wrong).norms[kind]
    own, data = Estimate.of(own), Estimate.of(data)
    assert (np.abs(own.mean - data.mean) / np.hypot(own.error, data.error)).max() > 10


@pytest.mark.parametrize("kind", KINDS)
def test_probing_does_not_change_the_images(kind):
    network = as_network(Inconsistent())
    images, _ = generate_with_drift(network, CONFIG, range(6), 0, kind, "cpu", probed=4)
    assert torch.equal(images, generate(network, CONFIG, range(6), 0, kind, "cpu"))


def test_values_do_not_depend_on_how_images_are_batched_or_how_many_are_probed():
    whole = on_samples(Inconsistent(), seeds=range(10, 20), probed=8)
    parts = [
        on_samples(Inconsistent(), seeds=range(10, 13), probed=3),
        on_samples(Inconsistent(), seeds=range(13, 18), probed=5),
    ]
    merged = merge_parts(parts)
    images = gaussian_images(10)
    data = on_data(Inconsistent(), images, seeds=range(10))
    data_parts = merge_parts(
        [on_data(Inconsistent(), images[a:b], range(a, b)) for a, b in [(0, 4), (4, 10)]]
    )
    for one, other in ((whole, merged), (data, data_parts)):
        for steps in STEP_COUNTS:
            np.testing.assert_allclose(one.residuals[steps], other.residuals[steps], rtol=1e-5)
        for kind in one.norms:
            np.testing.assert_allclose(one.norms[kind], other.norms[kind], rtol=1e-6)


def test_labels_of_the_real_images_reach_the_network():
    images = gaussian_images(4)
    labelled = LabelledImages(images.images, torch.tensor([2, 0, 1, 2]))
    seen = []

    def network(x, sigma, class_labels):
        seen.append(class_labels)
        return EXACT(x, sigma)

    drift_on_data(network, CONFIG, labelled, range(4), 3, "cpu")
    assert all(labels.argmax(1).tolist() == [2, 0, 1, 2] for labels in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_the_samplers_own_from_about_002_to_20(kind):
    sigmas = level_sigmas(CONFIG, kind)
    own = noise_levels(CONFIG.sampler, kind).numpy()
    assert len(sigmas) == 5
    assert (np.diff(sigmas) < 0).all()
    assert np.isin(sigmas, own).all()
    assert 13 < sigmas[0] < 30
    assert 0.01 < sigmas[-1] < 0.03


def test_levels_of_a_short_sampler_do_not_repeat_and_stay_inside_its_range():
    short = config(sde_steps=3, sigma_min=0.1, sigma_max=5.0)
    indices = level_indices(short, "sde")
    assert indices == [0, 1, 2]
    assert level_sigmas(short, "sde")[[0, -1]] == pytest.approx([5.0, 0.1])


def test_summary_is_the_mean_over_levels_with_the_error_of_independent_images():
    rng = np.random.default_rng(0)
    # Values of one image at different levels are correlated: treating levels as independent gives
    # an error sqrt(3) too small here.
    residual = rng.normal(size=(50, 1)) * np.ones((50, 3)) + 2
    part = DriftPart({1: residual * 7, 4: residual}, {})
    other = DriftPart({1: residual, 4: residual * 0}, {})
    drift = Drift({}, {"sde": part, "data": other, "ode": DriftPart()})
    assert float(drift.cp_residual.mean) == pytest.approx(residual.mean())
    expected = residual[:, 0].std(ddof=1) / np.sqrt(50)
    assert float(drift.cp_residual.error) == pytest.approx(expected)
    assert drift.cp_residual.count == 50
    assert drift.cp_residual_on_data.mean == 0
