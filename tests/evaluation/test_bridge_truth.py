"""Closed forms of Brownian and Ornstein-Uhlenbeck bridges against what defines them."""

import math

import numpy as np
import pytest
import torch

from cdm_ray.evaluation.bridge_truth import GaussianTruth
from cdm_ray.processes.references import (
    Brownian,
    OrnsteinUhlenbeck,
    Schedule,
    jacobian_transpose,
)

RAMP = Schedule((0.0, 0.3, 0.8), (1.5, 0.6, 0.9))
DURATION = 1.0
MEAN = (0.5, -1.0, 0.2)
PROCESSES = [
    Brownian(3, 0.7),
    Brownian(3, RAMP),
    OrnsteinUhlenbeck(3, 0.7, 2.0, mean=MEAN),
    OrnsteinUhlenbeck(3, RAMP, 2.0, mean=MEAN),
    OrnsteinUhlenbeck(3, RAMP, -1.5),
]
START = torch.tensor([1.0, 0.3, -0.4], dtype=torch.float64)
END = torch.tensor([-1.0, 0.8, 0.1], dtype=torch.float64)
every_process = pytest.mark.parametrize(
    "truth",
    [GaussianTruth(process, END, DURATION) for process in PROCESSES],
    ids=["brownian", "brownian-ramp", "ou", "ou-ramp", "unstable-ramp"],
)


def states(count=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64)


def time(t):
    return torch.tensor(t, dtype=torch.float64)


def test_score_of_the_worked_example():
    """g(1, 0) of b = -2x, sigma 1, from 1 to -1 in time 1: e^-2 (-1 - e^-2) / ((1 - e^-4) / 4)."""
    process = OrnsteinUhlenbeck(1, 1.0, 2.0)
    truth = GaussianTruth(process, torch.tensor([-1.0]), 1.0)
    x = torch.tensor([[1.0]], dtype=torch.float64)
    expected = math.exp(-2) * (-1 - math.exp(-2)) / (0.25 * (1 - math.exp(-4)))
    assert truth.score(x, 0.0).item() == pytest.approx(expected, rel=1e-12)
    assert round(expected, 5) == -0.62607


@every_process
@pytest.mark.parametrize("t", [0.0, 0.5, 0.99])
def test_score_is_the_gradient_of_the_log_density(truth, t):
    x = states().requires_grad_()
    log_density = truth.log_density(x, t)
    assert log_density.shape == (5,)
    (gradient,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(truth.score(x, t).detach(), gradient)


@every_process
@pytest.mark.parametrize("t", [0.05, 0.45, 0.9])
def test_log_density_solves_the_backward_equation(truth, t):
    """d/dt log h + b.g + sigma^2/2 (div g + |g|^2) = 0 with every derivative by central
    differences of log h; steps of 1e-4 leave about 1e-6 of terms that are about 10."""
    x, step = states(), 1e-4
    log_h = truth.log_density
    over_time = (log_h(x, t + step) - log_h(x, t - step)) / (2 * step)
    g, laplacian = torch.zeros_like(x), 0.0
    for i, direction in enumerate(step * torch.eye(3, dtype=torch.float64)):
        ahead, behind = log_h(x + direction, t), log_h(x - direction, t)
        g[:, i] = (ahead - behind) / (2 * step)
        laplacian = laplacian + (ahead - 2 * log_h(x, t) + behind) / step**2
    a = truth.process.sigma(time(t)) ** 2
    terms = [over_time, (truth.process.drift(x) * g).sum(1), a / 2 * laplacian]
    terms.append(a / 2 * g.square().sum(1))
    size = sum(term.abs() for term in terms)
    assert (sum(terms).abs() / size).max() < 1e-5
    wrong = sum(terms) - 0.1 * terms[-1]
    assert (wrong.abs() / size).max() > 1e-2


@every_process
def test_log_density_is_normalised_over_the_ends(truth):
    """Chapman-Kolmogorov: h(x, s) is the mean of h(X_t, t) over X_t given X_s = x. Per coordinate,
    with 60 Gauss-Hermite points."""
    s, t = 0.1, 0.4
    x = states(3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    decay = math.exp(-truth.rate * (t - s))
    mean = truth.mean.to(x) + decay * (x - truth.mean.to(x))
    product = torch.ones(3, dtype=torch.float64)
    for i in range(3):
        points = mean[:, None].repeat(1, 60, 1)  # other coordinates at their mean
        points[:, :, i] += math.sqrt(truth.variance(s, t)) * nodes
        ratio = truth.log_density(points.flatten(0, 1), t).view(3, 60)
        ratio = ratio - truth.log_density(mean, t)[:, None]
        product *= ratio.exp() @ weights
    torch.testing.assert_close(
        product.log() + truth.log_density(mean, t), truth.log_density(x, s), rtol=1e-9, atol=1e-9
    )
    normal = torch.distributions.Normal(
        truth.mean + math.exp(-truth.rate) * (START - truth.mean),
        math.sqrt(truth.variance(0.0, DURATION)),
    )
    assert truth.log_evidence(START) == pytest.approx(normal.log_prob(END).sum().item(), rel=1e-12)


@every_process
def test_float32_states_stay_float32(truth):
    x = states().float()
    for value in (truth.log_density(x, 0.3), truth.score(x, 0.3)):
        assert value.dtype == torch.float32
    torch.testing.assert_close(
        truth.score(x, 0.3).double(), truth.score(x.double(), 0.3), rtol=1e-5, atol=1e-5
    )
    path = truth.bridge(START, torch.linspace(0, DURATION, 6), torch.zeros(5, 2, 3))
    assert path.dtype == torch.float32


@every_process
def test_variance_and_mean_are_the_limit_of_euler_steps(truth):
    """First order: the error of the moments of X_T given X_0 halves with dt. The process enters
    through its drift, its vjp and its sigma alone. The steps end at the knots of the schedule."""
    process = truth.process
    errors = []
    for steps in (50, 100, 200):
        dt = DURATION / steps
        mean, variance = START[None], 0.0
        for k in range(steps):
            slope = jacobian_transpose(process, mean, torch.ones_like(mean))[0, 0].item()
            variance = (1 + slope * dt) ** 2 * variance + process.sigma(time(k * dt)) ** 2 * dt
            mean = mean + process.drift(mean) * dt
        exact = truth.mean + math.exp(-truth.rate) * (START - truth.mean)
        errors.append(
            [(mean[0] - exact).norm().item(), abs(variance - truth.variance(0.0, DURATION)).item()]
        )
    for error in zip(*errors, strict=True):
        assert_first_order(error)


def assert_first_order(error):
    """Halved twice, or at rounding from the beginning (a Brownian path)."""
    if max(error) > 1e-10:
        assert error[0] / error[1] == pytest.approx(2, abs=0.1)
        assert error[1] / error[2] == pytest.approx(2, abs=0.1)


class Linear:
    """Coefficients of `bridge` paths: noise is the unit impulses, so row 0 is the mean path and
    row j + 1 minus row 0 what draw j does. One coordinate, the others have the same."""

    def __init__(self, truth, times):
        draws = len(times) - 1
        noise = torch.zeros(draws, draws + 1, 3, dtype=torch.float64)
        for j in range(draws):
            noise[j, j + 1] = 1
        paths = truth.bridge(START, times, noise)
        self.mean = paths[:, 0]
        response = paths[:, 1:, 0] - paths[:, :1, 0]
        self.covariance = response @ response.T


@every_process
def test_bridge_has_the_law_of_the_process_given_its_end(truth):
    """Moments of (X_t1, ..., X_T) of the unconditioned process, conditioned on X_T as a dense
    Gaussian vector."""
    times = torch.tensor([0.0, 0.1, 0.35, 0.6, 0.95, 1.0], dtype=torch.float64)
    grid = times[1:].tolist()
    covariance = torch.tensor(
        [
            [truth.variance(0.0, min(s, t)) * math.exp(-truth.rate * abs(t - s)) for s in grid]
            for t in grid
        ],
        dtype=torch.float64,
    )
    decay = (-truth.rate * times[1:, None]).exp()
    mean = truth.mean + decay * (START - truth.mean)
    gain = covariance[:, -1] / covariance[-1, -1]
    bridge = Linear(truth, times)
    torch.testing.assert_close(bridge.mean[1:], mean + gain[:, None] * (END - mean[-1]))
    torch.testing.assert_close(
        bridge.covariance[1:, 1:], covariance - gain[:, None] * covariance[-1], atol=1e-12, rtol=0
    )
    assert torch.equal(bridge.mean[0], START)
    torch.testing.assert_close(bridge.mean[-1], END)


@every_process
def test_bridge_is_the_limit_of_euler_steps_with_the_doob_drift(truth):
    """dX = (b + sigma^2 g) dt + sigma dB, moments at 0.8 by the linear recursion: first order in
    dt. With b + sigma u = b + sigma (sigma g) it is the same; with b + g or b + sigma g, which
    take the score or the control for the drift, the mean ends far off."""
    bridge = Linear(truth, torch.tensor([0.0, 0.8], dtype=torch.float64))
    errors = []
    for steps in (100, 200, 400):
        mean, variance = euler_moments(truth, 0.8, steps, lambda sigma: sigma**2)
        errors.append(
            [
                (mean - bridge.mean[1]).norm().item(),
                abs(variance - bridge.covariance[1, 1]).item(),
            ]
        )
    for error in zip(*errors, strict=True):
        assert_first_order(error)
    assert max(errors[-1]) < 0.02
    for wrong in (torch.ones_like, torch.clone):
        mean, _ = euler_moments(truth, 0.8, 100, wrong)
        assert (mean - bridge.mean[1]).norm() > 0.03


def euler_moments(truth, until, steps, gain):
    """Mean [3] and variance of Euler steps of dX = (b + gain(sigma) g) dt + sigma dB to `until`."""
    dt = until / steps
    mean, variance = START[None], torch.zeros((), dtype=torch.float64)
    nudge = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    for k in range(steps):
        sigma = truth.process.sigma(time(k * dt))
        both = torch.cat((mean, mean + nudge))
        drift = truth.process.drift(both) + gain(sigma) * truth.score(both, k * dt)
        slope = drift[1, 0] - drift[0, 0]  # linear, so exact
        variance = (1 + slope * dt) ** 2 * variance + sigma**2 * dt
        mean = mean + drift[:1] * dt
    return mean[0], variance


def test_starts_may_differ_between_paths():
    truth = GaussianTruth(PROCESSES[3], END, DURATION)
    times = torch.linspace(0.2, 0.9, 4, dtype=torch.float64)
    noise = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    paths = truth.bridge(states(), times, noise)
    assert paths.shape == (4, 5, 3)
    torch.testing.assert_close(paths[:, 2], truth.bridge(states()[2], times, noise)[:, 2])


def test_a_schedule_that_does_not_change_is_a_constant():
    constant = GaussianTruth(OrnsteinUhlenbeck(3, 0.7, 2.0, MEAN), END, DURATION)
    flat = OrnsteinUhlenbeck(3, Schedule((0.2, 0.5), (0.7, 0.7)), 2.0, MEAN)
    assert GaussianTruth(flat, END, DURATION).variance(0.1, 0.9) == pytest.approx(
        constant.variance(0.1, 0.9), rel=1e-13
    )


def test_there_is_no_score_at_the_end_and_no_path_beyond_it():
    truth = GaussianTruth(PROCESSES[0], END, DURATION)
    for t in (1.0, 1.5):
        with pytest.raises(ValueError, match=f"t={t}"):
            truth.score(states(), t)
        with pytest.raises(ValueError, match="a bridge of duration 1.0 has a score before it"):
            truth.log_density(states(), t)
    with pytest.raises(ValueError, match="times up to 1.1"):
        truth.bridge(START, torch.tensor([0.0, 1.1]).double(), torch.zeros(1, 2, 3))


def test_a_grid_in_float32_that_rounds_up_still_ends_at_the_end():
    truth = GaussianTruth(PROCESSES[0], END, 0.05)
    times = torch.linspace(0, 0.05, 5)
    assert times[-1].item() > 0.05
    noise = torch.ones(4, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(truth.bridge(START, times, noise)[-1], END.expand(2, 3))
