"""Closed forms of Brownian, Ornstein-Uhlenbeck and Cox-Ingersoll-Ross bridges against what defines
them."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import ncx2

from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.backward_grid import Grid
from cdm_ray.evaluation.bridge_truth import CIRTruth, GaussianTruth
from cdm_ray.evaluation.grid_truth import solve
from cdm_ray.processes.references import (
    Brownian,
    CoxIngersollRoss,
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


def t64(*values):
    return torch.tensor(values, dtype=torch.float64)


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


# The usual example and two others: order 3, 3.9 and, at Feller's boundary, 0.
CIRS = {
    "usual": CIRTruth(CoxIngersollRoss(1.0, 2.0, 1.0), t64(math.sqrt(8)), 1.0),
    "smaller": CIRTruth(CoxIngersollRoss(0.8, 1.5, 0.7), t64(2.0), 1.5),
    "boundary": CIRTruth(CoxIngersollRoss(0.5, 1.0, 1.0), t64(0.9), 0.7),
}
every_cir = pytest.mark.parametrize("cir", CIRS.values(), ids=CIRS)
LEVELS = t64(0.3, 1.0, 2.0, 3.5, 6.0)[:, None]


def time_left(cir, share):
    """The time at which this share of the duration is left, and how much that is."""
    return cir.duration * (1 - share), cir.duration * share


@every_cir
@pytest.mark.parametrize("share", [1.0, 0.3, 0.02])
def test_cir_is_the_noncentral_chi_square_of_x(cir, share):
    """2 c x_T is noncentral chi-square with 4 rate mean / volatility^2 degrees of freedom and
    noncentrality 2 c e^{-rate tau} x; SciPy's density is good to about 1e-9 in its tails."""
    t, tau = time_left(cir, share)
    process = cir.process
    rate, square = process.rate, process.volatility**2
    x, end = process.from_lamperti(LEVELS[:, 0]).numpy(), process.from_lamperti(cir.end).item()
    scale = 4 * rate / (square * -math.expm1(-rate * tau))  # 2 c
    freedom = 4 * rate * process.mean / square
    density = ncx2.logpdf(scale * end, freedom, scale * math.exp(-rate * tau) * x)
    dx_dy = square * cir.end.item() / 2
    expected = torch.from_numpy(density) + math.log(scale * dx_dy)
    torch.testing.assert_close(cir.log_density(LEVELS, t), expected, rtol=1e-8, atol=1e-8)


def exact_cir(cir, y, t):
    """log h and g with 40 digits, in the terms of the noncentral chi-square, unsimplified."""
    process, mp = cir.process, mpmath.mp
    rate, square = mp.mpf(process.rate), mp.mpf(process.volatility) ** 2
    tau, order = mp.mpf(cir.duration) - mp.mpf(t), 2 * rate * mp.mpf(process.mean) / square - 1
    c = 2 * rate / (square * (1 - mp.exp(-rate * tau)))
    end = mp.mpf(cir.end.item())
    v = c * square * end**2 / 4

    def log_h(y):
        u = c * square * y**2 / 4 * mp.exp(-rate * tau)
        z = 2 * mp.sqrt(u * v)
        bessel = mp.log(mp.besseli(order, z))
        return mp.log(c) - u - v + order / 2 * mp.log(v / u) + bessel + mp.log(square * end / 2)

    y = mp.mpf(y)
    return float(log_h(y)), float(mp.diff(log_h, y))


@pytest.mark.parametrize(
    ("process", "end", "duration"),
    [
        (CoxIngersollRoss(1.0, 2.0, 1.0), math.sqrt(8), 1.0),
        (CoxIngersollRoss(1.0, 2.0, 1.0), math.sqrt(8), 1e-5),  # z is a million
        (CoxIngersollRoss(0.5, 1.0, 1.0), 1e-3, 1.0),
        (CoxIngersollRoss(30.0, 1.0, 1.0), 2.0, 5.0),  # z is 1e-30
        (CoxIngersollRoss(1.0, 2.0, 0.1), 28.0, 1.0),  # order 399: scaled Bessel of 1e-40
        (CoxIngersollRoss(1.0, 2.0, 0.05), 56.0, 1.0),  # order 1599: it underflows
    ],
)
def test_cir_is_exact_where_bessel_functions_are_extreme(process, end, duration):
    cir = CIRTruth(process, t64(end), duration)
    with mpmath.workdps(40):
        for y in (0.3 * end, 1.01 * end, 2.5 * end):
            log_h, score = exact_cir(cir, y, 0.0)
            assert cir.log_density(t64([y]), 0.0).item() == pytest.approx(log_h, rel=1e-10)
            assert cir.score(t64([y]), 0.0).item() == pytest.approx(score, rel=1e-9, abs=1e-10)


@every_cir
@pytest.mark.parametrize("share", [0.97, 0.4, 0.05])
def test_score_of_cir_is_the_gradient_of_the_log_density(cir, share):
    """Central differences; error of h^2 g'' / 6 and 1e-15 / h, with h = 1e-4: 1e-8 (1 + 1 / y^3)
    of g."""
    t, _ = time_left(cir, share)
    ahead, behind = cir.log_density(LEVELS + 1e-4, t), cir.log_density(LEVELS - 1e-4, t)
    slope = ((ahead - behind) / 2e-4)[:, None]
    torch.testing.assert_close(cir.score(LEVELS, t), slope, rtol=1e-6, atol=1e-6)


@every_cir
@pytest.mark.parametrize("share", [0.97, 0.4, 0.05])
def test_log_density_of_cir_solves_the_backward_equation(cir, share):
    """As for the others; the process enters through its drift alone, since sigma = 1."""
    t, _ = time_left(cir, share)
    step = 1e-4
    over_time = (cir.log_density(LEVELS, t + step) - cir.log_density(LEVELS, t - step)) / (2 * step)
    g = cir.score(LEVELS, t)[:, 0]
    slope = (cir.score(LEVELS + step, t) - cir.score(LEVELS - step, t))[:, 0] / (2 * step)
    terms = [over_time, cir.process.drift(LEVELS)[:, 0] * g, slope / 2, g.square() / 2]
    size = sum(term.abs() for term in terms)
    assert (sum(terms).abs() / size).max() < 1e-5
    assert ((sum(terms) - 0.1 * terms[-1]).abs() / size).max() > 1e-2


@every_cir
def test_cir_satisfies_chapman_kolmogorov_and_is_normalised(cir):
    """Trapezoidal sums over the state between, and over the end. At the boundary the density at 0
    goes as y, which leaves spacing^2 / 12."""
    s, t = 0.2 * cir.duration, 0.6 * cir.duration
    nodes = torch.linspace(0, 12, 801, dtype=torch.float64)[1:]
    spacing = nodes[0].item()
    to_node = [CIRTruth(cir.process, node[None], t).log_density(LEVELS, s) for node in nodes]
    density = torch.stack(to_node, dim=1).exp()
    torch.testing.assert_close(density.sum(1) * spacing, torch.ones(5).double(), rtol=0, atol=1e-4)
    integral = density @ cir.log_density(nodes[:, None], t).exp() * spacing
    torch.testing.assert_close(integral, cir.log_density(LEVELS, s).exp(), rtol=1e-4, atol=0)


@every_cir
def test_score_of_cir_tends_to_the_brownian_guide_less_the_drift(cir):
    """g = (end - y) / tau - b(y) + O(tau): h is exp(int_y^end b) times the Brownian density."""
    y = cir.end * t64([0.7], [0.95], [1.2])
    errors = []
    for tau in (1e-3, 1e-4, 1e-5):
        guide = (cir.end - y) / tau
        score = cir.score(y, cir.duration - tau)
        errors.append((score - (guide - cir.process.drift(y))).abs().max().item())
        assert ((score - guide) / guide).abs().max() < 200 * tau
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)
    assert errors[2] < 1e-3


def test_cir_forgets_its_start_in_a_long_time():
    """The law of x is a gamma law then, with 2 rate mean / volatility^2 degrees."""
    cir = CIRTruth(CoxIngersollRoss(1.0, 2.0, 1.0), t64(2.2), 60.0)
    assert cir.score(LEVELS, 0.0).abs().max() < 1e-12
    x = cir.process.from_lamperti(cir.end)
    gamma = torch.distributions.Gamma(t64(4.0), t64(2.0))  # rate 2 rate / volatility^2
    expected = (gamma.log_prob(x) + (cir.end / 2).log()).expand(5)
    torch.testing.assert_close(cir.log_density(LEVELS, 0.0), expected)


def test_grids_find_the_closed_form_of_cir(tmp_path):
    process, start, duration = CoxIngersollRoss(1.0, 2.0, 1.0), t64(math.sqrt(8)), 1.0
    cir = CIRTruth(process, start, duration)
    grid = Grid((0.3,), (6.3,), (301,), steps=200, slices=50)
    found = solve(process, start, start, duration, grid, tmp_path)
    y = torch.linspace(1.2, 4.8, 37, dtype=torch.float64)[:, None]
    for t in (0.0, 0.5, 0.9):
        torch.testing.assert_close(
            found.log_density(y, t), cir.log_density(y, t), rtol=0, atol=1e-3
        )
        torch.testing.assert_close(found.score(y, t), cir.score(y, t), rtol=1e-3, atol=1e-3)
    assert found.trusted(y, 0.5).all()


def test_evidence_dtype_and_limits_of_cir():
    cir = CIRS["usual"]
    start = cir.end + 0.4
    assert cir.log_evidence(start) == cir.log_density(start[None], 0.0).item()
    x = LEVELS.float()
    assert cir.log_density(x, 0.3).dtype == cir.score(x, 0.3).dtype == torch.float32
    assert cir.log_density(x, 0.3).shape == (5,)
    torch.testing.assert_close(cir.score(x, 0.3).double(), cir.score(x.double(), 0.3))
    outside = t64([0.0], [-1.0], [math.nan])
    assert cir.log_density(outside, 0.3).isnan().all()
    assert cir.score(outside, 0.3).isnan().all()
    for value in (cir.log_density, cir.score):
        with pytest.raises(ValueError, match="t=1.0; a bridge of duration 1.0"):
            value(x, 1.0)
    with pytest.raises(ConfigError, match="end=.-2.0. .* positive"):
        CIRTruth(cir.process, t64(-2.0), 1.0)
