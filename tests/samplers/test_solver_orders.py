"""Errors of the deterministic solvers against closed forms, in float64."""

import math

import pytest
import torch

from cdm_ray.processes.edm import karras_sigmas
from cdm_ray.processes.oracles import Gaussian, Mixture
from cdm_ray.samplers import SOLVERS

GAUSSIAN = Gaussian(mean=0.3, variance=0.25)
MIXTURE = Mixture(
    means=torch.tensor([[-0.5], [0.7]], dtype=torch.float64),
    variances=torch.tensor([0.01, 0.04], dtype=torch.float64),
    weights=torch.tensor([0.4, 0.6], dtype=torch.float64),
)
DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.stochastic]
QUANTILES = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]


def no_noise():
    raise AssertionError("a deterministic solver draws no noise")


def mixture_cdf(x, sigma):
    std = (MIXTURE.variances + sigma**2).sqrt()
    z = (x - MIXTURE.means.flatten()) / std
    return (MIXTURE.weights * torch.special.ndtr(z)).sum(1, keepdim=True)


def mixture_ode(x, sigma, sigma_next):
    """In one dimension the probability-flow ODE keeps the quantile: F'(x') = F(x), by bisection."""
    quantile = mixture_cdf(x, sigma)
    low, high = torch.full_like(x, -100.0), torch.full_like(x, 100.0)
    for _ in range(70):
        middle = (low + high) / 2
        below = mixture_cdf(middle, sigma_next) < quantile
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def errors(name, data, exact_ode, top, end, counts):
    """Largest error of any state at `end` from states at `top`, for each number of steps."""
    start = QUANTILES * top
    exact = exact_ode(start, top, end)
    return [
        (SOLVERS[name].sample(data, start, levels(steps, end, top), no_noise) - exact).abs().max()
        for steps in counts
    ]


def levels(steps, end, top):
    return karras_sigmas(steps + 1, end, top, 7.0)[:-1]  # without the step to 0, which is Euler's


# From sigma = 80, where the lower orders with which a multistep solver starts cost nothing, but in
# the mixture from 10: between its modes the error of Euler is not yet small with so many steps.
@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize(
    ("data", "exact_ode", "top"),
    [(GAUSSIAN, GAUSSIAN.ode, 80.0), (MIXTURE, mixture_ode, 10.0)],
    ids=["gaussian", "mixture"],
)
def test_doubling_the_steps_divides_the_error_by_two_to_the_order(name, data, exact_ode, top):
    found = errors(name, data, exact_ode, top, 0.05, (128, 256, 512))
    for coarse, fine in zip(found, found[1:], strict=False):
        # Measured within 0.13 of the order; the next whole order is 1 away.
        assert math.log2(coarse / fine) == pytest.approx(SOLVERS[name].order, abs=0.2)


@pytest.mark.parametrize(
    ("name", "bound"),
    [("euler", 0.091), ("heun", 0.0131), ("dpmpp_2m", 0.012), ("dpmpp_3m", 0.0014)],
)
def test_errors_with_32_steps(name, bound):
    """Measured values, rounded up by 2 to 3 %: a solver of the right order may have a wrong
    constant."""
    (found,) = errors(name, GAUSSIAN, GAUSSIAN.ode, 80.0, 0.05, [32])
    assert found < bound


def test_euler_of_the_step_is_ddim():
    """With D held fixed the ODE has the solution x' = D + (sigma'/sigma)(x - D), which both Euler
    in sigma and the first step of the multistep solvers give."""
    start, sigmas = QUANTILES * 3, torch.tensor([3.0, 1.2], dtype=torch.float64)
    denoised = MIXTURE(start, 3.0)
    exact = denoised + 1.2 / 3 * (start - denoised)
    for name in ("euler", "dpmpp_2m", "dpmpp_3m"):
        end = SOLVERS[name].sample(MIXTURE, start, sigmas, no_noise)
        torch.testing.assert_close(end, exact, rtol=1e-13, atol=1e-13)


def test_the_second_order_step_is_that_of_the_paper_on_uneven_levels():
    """x' = (sigma'/sigma) x - (e^-h - 1) ((1 + 1/2r) D - 1/2r D_before), r = h_before/h; even
    levels would not tell h from h_before."""
    sigmas = torch.tensor([2.0, 1.7, 0.9], dtype=torch.float64)
    before, x = QUANTILES, list(SOLVERS["dpmpp_2m"].path(MIXTURE, QUANTILES, sigmas, no_noise))
    old, new = MIXTURE(before, 2.0), MIXTURE(x[0], 1.7)
    r = math.log(2 / 1.7) / math.log(1.7 / 0.9)
    continued = (1 + 1 / (2 * r)) * new - 1 / (2 * r) * old
    exact = 0.9 / 1.7 * x[0] - (0.9 / 1.7 - 1) * continued
    torch.testing.assert_close(x[1], exact, rtol=1e-12, atol=1e-12)


def test_third_order_continues_quadratics_in_log_sigma_exactly():
    """D = l^2 with l = -log sigma, whatever x is, once there are two levels behind."""
    sigmas = torch.tensor([2.0, 1.7, 1.5, 0.9, 0.7], dtype=torch.float64)

    def quadratic(x, sigma):
        return sigma.log() ** 2 * torch.ones_like(x)

    def antiderivative(place):  # of e^l l^2, divided by e^l
        return place**2 - 2 * place + 2

    states = [QUANTILES, *SOLVERS["dpmpp_3m"].path(quadratic, QUANTILES, sigmas, no_noise)]
    for i in (2, 3):
        decay = sigmas[i + 1] / sigmas[i]
        gained = antiderivative(-sigmas[i + 1].log()) - decay * antiderivative(-sigmas[i].log())
        exact = decay * states[i] + gained
        torch.testing.assert_close(states[i + 1], exact, rtol=1e-12, atol=1e-12)
