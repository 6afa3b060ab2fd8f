"""What every solver promises."""

import pytest
import torch

from cdm_ray.processes.edm import karras_sigmas
from cdm_ray.processes.oracles import Gaussian, Mixture
from cdm_ray.randomness import BlockRng
from cdm_ray.samplers import SOLVERS, in_float32

DATA = Gaussian(mean=0.3, variance=0.25)
everywhere = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


class Recorded:
    """A denoiser that keeps the levels it was asked for."""

    def __init__(self, denoiser):
        self.denoiser, self.sigmas = denoiser, []

    def __call__(self, x, sigma):
        assert x.dtype == sigma.dtype == torch.float64
        assert sigma.ndim == 0
        self.sigmas.append(sigma.item())
        return self.denoiser(x, sigma)


class ConvolutionalDenoiser(torch.nn.Module):
    """A small untrained network, preconditioned as EDM's are (their table 1)."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(
                torch.nn.Conv2d(1, 8, 3, padding=1),
                torch.nn.SiLU(),
                torch.nn.Conv2d(8, 1, 3, padding=1),
            )
        self.requires_grad_(False)

    def forward(self, x, sigma):
        variance = sigma**2 + 0.25
        scaled = self.layers(x / variance.sqrt() + sigma.log() / 4)
        return 0.25 / variance * x + sigma * 0.5 / variance.sqrt() * scaled


def run(solver, denoise, seeds, sigmas, shape=(1, 8, 8)):
    """All states from the seeds' latents on, those included."""
    rng = BlockRng.for_images(seeds, "cpu")

    def draw():
        return rng.normal(len(seeds), *shape).double()

    x = draw() * sigmas[0]
    return [x, *solver.path(denoise, x, sigmas, draw)]


@everywhere
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("ends_at_zero", [True, False])
def test_evaluations_are_as_many_as_stated(solver, steps, ends_at_zero):
    denoise = Recorded(DATA)
    sigmas = torch.linspace(5.0, 1.0, steps + 1, dtype=torch.float64)
    if ends_at_zero:
        sigmas[-1] = 0
    run(solver, denoise, range(2), sigmas)
    assert len(denoise.sigmas) == solver.evaluations(steps, ends_at_zero=ends_at_zero)
    assert min(denoise.sigmas) > 0  # there is no denoiser at 0


@pytest.mark.parametrize(
    ("name", "nfe"),
    [("euler", 18), ("heun", 35), ("dpmpp_2m", 18), ("dpmpp_3m", 18), ("ancestral", 18),
     ("euler_maruyama", 18), ("churn", 35)],
)  # fmt: skip
def test_evaluations_of_18_steps_as_the_literature_counts_them(name, nfe):
    assert SOLVERS[name].evaluations(18, ends_at_zero=True) == nfe


@everywhere
def test_there_is_a_state_for_every_level_and_the_last_is_what_the_denoiser_says(solver):
    sigmas = karras_sigmas(60, 0.002, 80.0, 7.0)
    states = run(solver, DATA, range(5), sigmas)
    assert len(states) == len(sigmas)
    assert {state.dtype for state in states} == {torch.float64}
    # A step to 0 is exact for a fixed D: it ends there, whatever the order, and without noise.
    torch.testing.assert_close(states[-1], DATA(states[-2], sigmas[-2]), rtol=0, atol=1e-12)
    for state, sigma in zip(states[:20], sigmas, strict=False):
        # Far above the data, a state is noise of this spread: 320 values are off by 4 %.
        assert state.std() == pytest.approx(float(sigma), rel=0.16)


@everywhere
def test_sample_is_the_last_state_of_the_path(solver):
    sigmas = karras_sigmas(6, 0.002, 80.0, 7.0)
    rng = BlockRng.for_images(range(3), "cpu")

    def draw():
        return rng.normal(3, 1, 8, 8).double()

    end = solver.sample(DATA, draw() * sigmas[0], sigmas, draw)
    assert torch.equal(end, run(solver, DATA, range(3), sigmas)[-1])


@everywhere
def test_who_looks_at_the_states_changes_nothing(solver):
    """States may be used and the random numbers of others drawn between two of them."""
    sigmas = karras_sigmas(6, 0.002, 80.0, 7.0)
    rng, other = BlockRng.for_images(range(3), "cpu"), torch.Generator().manual_seed(1)
    x = rng.normal(3, 1, 8, 8).double() * sigmas[0]
    path = solver.path(DATA, x, sigmas, lambda: rng.normal(3, 1, 8, 8).double())
    for state, sigma in zip(path, sigmas[1:], strict=True):
        if sigma > 0:
            DATA(state + torch.randn(state.shape, generator=other), sigma)
    assert torch.equal(state, run(solver, DATA, range(3), sigmas)[-1])


@everywhere
def test_an_image_does_not_depend_on_its_batch(solver):
    denoise = in_float32(ConvolutionalDenoiser())
    sigmas = karras_sigmas(6, 0.002, 80.0, 7.0)
    whole = run(solver, denoise, range(6), sigmas)[-1]
    parts = [run(solver, denoise, seeds, sigmas)[-1] for seeds in ([0], [1, 2, 3, 4], [5])]
    # Convolutions of other batch sizes may sum in another order; the states are up to 80.
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)
    assert (whole[0] - whole[1]).abs().max() > 0.1


@everywhere
def test_the_denoiser_of_a_finite_data_set_generates_its_images(solver):
    points = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    data, sigmas = Mixture.of_points(points), karras_sigmas(30, 0.002, 40.0, 7.0)
    x = run(solver, in_float32(data), range(60), sigmas, shape=(1, 4, 4))[-1]
    distance = torch.cdist(x.flatten(1), points.double().flatten(1))
    # The last step returns D at sigma = 0.002, where one image has all the weight.
    assert distance.min(1).values.max() < 1e-3
    assert len(distance.argmin(1).unique()) == 6


@pytest.mark.parametrize("name", [n for n, solver in SOLVERS.items() if not solver.stochastic])
def test_the_ode_ends_on_the_data(name):
    latents = BlockRng.for_images(range(500), "cpu").normal(500, 1).double()
    sigmas = karras_sigmas(160, 0.002, 80.0, 7.0)
    images = SOLVERS[name].sample(DATA, 80 * latents, sigmas, lambda: latents)
    exact = DATA.ode(80 * latents, 80.0, 0.0)
    # Measured: 0.028 for order 1, 9e-4 for order 2, 6.4e-5 for order 3.
    tolerance = {1: 0.03, 2: 1e-3, 3: 7e-5}[SOLVERS[name].order]
    torch.testing.assert_close(images, exact, rtol=0, atol=tolerance)
