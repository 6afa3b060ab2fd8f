"""Law of what the stochastic solvers produce from Gaussian data with its exact denoiser.

The denoiser is linear, hence so is every solver in its start and its noise: run once on unit
impulses, it shows all the coefficients, and mean and variance follow without Monte Carlo.
"""

import math

import pytest
import torch

from cdm_ray.processes.edm import REVERSE_STEPS, karras_sigmas
from cdm_ray.processes.oracles import Gaussian, Mixture
from cdm_ray.randomness import BlockRng
from cdm_ray.samplers import SOLVERS, churn

MEAN, VARIANCE = 0.3, 0.25
DATA = Gaussian(MEAN, VARIANCE)
TOP, END = 80.0, 0.05
CHURN = churn(40.0, 0.05, 50.0, noise_scale=1.0)
STOCHASTIC = [SOLVERS[name] for name in REVERSE_STEPS] + [CHURN]
NAMES = [solver.name for solver in STOCHASTIC]


class Impulses:
    """The call number n is noise in row n + 2 alone; row 0 has none, nor has row 1, the start."""

    def __init__(self, rows):
        self.rows, self.calls = rows, 0

    def __call__(self):
        noise = torch.zeros(self.rows, 1, dtype=torch.float64)
        noise[2 + self.calls] = 1
        self.calls += 1
        return noise


def law(solver, sigmas, denoise=DATA, variance=VARIANCE):
    """Mean, response to the start, variance of the end, from the exact law at sigmas[0]."""
    rows = len(sigmas) + 1
    start = torch.full((rows, 1), MEAN, dtype=torch.float64)
    start[1] += 1
    end = solver.sample(denoise, start, sigmas, Impulses(rows))[:, 0]
    response, *to_noise = (end[1:] - end[0]).tolist()
    scatter = sum(coefficient**2 for coefficient in to_noise)
    return end[0].item(), response, response**2 * (variance + sigmas[0].item() ** 2) + scatter


def levels(steps):
    return karras_sigmas(steps + 1, END, TOP, 7.0)[:-1]


@pytest.mark.parametrize("solver", STOCHASTIC, ids=NAMES)
def test_the_law_converges_to_that_of_the_noised_data_with_the_order(solver):
    found = []
    for steps in (256, 512, 1024):
        mean, _, variance = law(solver, levels(steps))
        assert mean == pytest.approx(MEAN, abs=1e-12)  # the centre of a linear map stays
        found.append(abs(variance - (VARIANCE + END**2)))
    for coarse, fine in zip(found, found[1:], strict=False):
        # Measured within 0.09 of the order.
        assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.2)
    assert found[-1] < 0.01 * VARIANCE


def test_the_conditional_mean_of_ancestral_steps_is_exact_and_that_of_euler_maruyama_of_order_one():
    exact = (VARIANCE + END**2) / (VARIANCE + TOP**2)
    assert law(SOLVERS["ancestral"], levels(16))[1] == pytest.approx(exact, rel=1e-12)
    errors = [abs(law(SOLVERS["euler_maruyama"], levels(n))[1] - exact) for n in (256, 512, 1024)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.2)


def test_churn_replaces_the_start_by_noise_of_its_own():
    """Without churn all the scatter of the images comes from the start, with it none."""
    for solver, share in ((SOLVERS["heun"], 1.0), (CHURN, 0.0)):
        _, response, variance = law(solver, levels(64))
        found = response**2 * (VARIANCE + TOP**2) / variance
        assert found == pytest.approx(share, abs=1e-10)
        assert variance == pytest.approx(VARIANCE + END**2, rel=0.04)  # 0.034 with 64 steps


def test_churn_adds_noise_of_the_stated_variance_where_it_should_and_nowhere_else():
    """For D = x the ODE stands still, and what is left of a step is the noise."""
    amount, low, high, scale = 2.0, 0.1, 5.0, 1.007
    sigmas = torch.tensor([6.0, 5.0, 1.0, 0.1, 0.09, 0.0], dtype=torch.float64)
    share = amount / 5
    evaluated = []

    def stand_still(x, sigma):
        evaluated.append(sigma.item())
        return x

    mean, response, _ = law(churn(amount, low, high, scale), sigmas, stand_still)
    rows = len(sigmas) + 1
    noise = Impulses(rows)
    end = churn(amount, low, high, scale).sample(
        stand_still, torch.zeros(rows, 1, dtype=torch.float64), sigmas, noise
    )
    raised = [level * (1 + share) for level in (5.0, 1.0, 0.1)]
    expected = [
        scale * math.sqrt(up**2 - level**2)
        for up, level in zip(raised, (5.0, 1.0, 0.1), strict=True)
    ]
    assert noise.calls == 3
    assert end[2:5, 0].tolist() == pytest.approx(expected, rel=1e-12)
    assert (mean, response) == pytest.approx((MEAN, 1.0))
    visited = [6.0, 5.0, raised[0], 1.0, raised[1], 0.1, raised[2], 0.09, 0.09]
    assert evaluated[:9] == pytest.approx(visited, rel=1e-12)


def test_churn_is_capped():
    """gamma <= sqrt(2) - 1: the variance at most doubles."""
    sigmas = torch.tensor([1.0, 0.5], dtype=torch.float64)
    noise = Impulses(3)
    x = torch.zeros(3, 1, dtype=torch.float64)
    end = churn(100.0, 0.0, 2.0, 1.0).sample(lambda x, sigma: x, x, sigmas, noise)
    assert end[2, 0].item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("steps", [2, 5, 18])
def test_churn_of_nothing_is_heun_to_the_last_bit(steps):
    start = torch.randn(7, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = karras_sigmas(steps, 0.002, 80.0, 7.0)

    def no_noise():
        raise AssertionError("nothing to add")

    states = [
        list(solver.path(DATA, 80 * start, sigmas, no_noise))
        for solver in (churn(0.0), churn(40.0, low=100.0, high=200.0), SOLVERS["heun"])
    ]
    for one, other, heun in zip(*states, strict=True):
        assert torch.equal(one, heun)
        assert torch.equal(other, heun)


@pytest.mark.parametrize("solver", STOCHASTIC, ids=NAMES)
def test_samples_of_a_mixture_reproduce_its_moments(solver):
    mixture = Mixture(
        means=torch.tensor([[-0.5], [0.7]]),
        variances=torch.tensor([0.01, 0.04]),
        weights=torch.tensor([0.4, 0.6]),
    )
    n = 20_000
    rng = BlockRng.for_lanes(0, 0, range(8), "cpu")
    sigmas = karras_sigmas(200, 0.002, 20.0, 7.0)
    start = 20 * rng.normal(n, 1).double()
    x = solver.sample(mixture, start, sigmas, lambda: rng.normal(n, 1).double())
    mean = 0.4 * -0.5 + 0.6 * 0.7
    variance = 0.4 * (0.01 + 0.25) + 0.6 * (0.04 + 0.49) - mean**2
    # 4 standard errors, and 0.01 for 200 steps
    assert abs(x.mean().item() - mean) < 4 * (variance / n) ** 0.5 + 0.01
    assert x.var().item() == pytest.approx(variance, rel=0.05)
    low = x < 0.1
    assert abs(low.double().mean().item() - 0.4) < 4 * (0.24 / n) ** 0.5 + 0.01
    for mode, expected in ((low, 0.1), (~low, 0.2)):
        assert x[mode].std().item() == pytest.approx(expected, rel=0.06)
