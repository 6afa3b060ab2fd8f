"""Metrics of learned bridges against closed forms, and against wrong versions that look alike."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from cdm_ray.evaluation.backward_grid import Grid
from cdm_ray.evaluation.bridge_metrics import (
    WeightSummary,
    divergence_along,
    endpoint_error,
    evaluate_bridge,
    kl_from_truth,
    kl_to_truth,
    log_weights,
    path_cost,
    simulate_bridge,
)
from cdm_ray.evaluation.bridge_truth import GaussianTruth
from cdm_ray.evaluation.estimate import Estimate
from cdm_ray.evaluation.grid_truth import solve
from cdm_ray.processes.bridge import Bridge
from cdm_ray.processes.references import Brownian, DoubleWell, OrnsteinUhlenbeck, Schedule
from cdm_ray.processes.simulation import Paths, simulate

SIGMA = 0.6
RAMP = Schedule((0.0, 2.0), (0.4, 1.3))


def t64(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ou_bridge(sigma=SIGMA, duration=2.0):
    process = OrnsteinUhlenbeck(2, sigma, 1.5, mean=(0.3, -0.2))
    return Bridge(process, t64(1.0, -0.5), t64(-0.4, 0.8), duration)


def brownian_bridge():
    return Bridge(Brownian(1, SIGMA), t64(1.0), t64(-0.5), 2.0)


def truth_of(bridge):
    return GaussianTruth(bridge.process, bridge.end, bridge.duration)


class Off:
    """The exact bridge, its score wrong by error(x, t)."""

    def __init__(self, bridge, error=None):
        self.bridge, self.truth = bridge, truth_of(bridge)
        self.error = error or (lambda x, t: torch.zeros_like(x))

    def score(self, x, t):
        return self.truth.score(x, t.item()) + self.error(x, t)

    def drift(self, x, t):
        return self.bridge.process.drift(x) + self.bridge.process.sigma(t) ** 2 * self.score(x, t)


def significance(estimate, expected):
    return abs(float(estimate.mean) - expected) / float(estimate.error)


# KL


@pytest.mark.parametrize("kl", [kl_from_truth, kl_to_truth])
@pytest.mark.parametrize("sigma", [SIGMA, RAMP], ids=["constant", "ramp"])
def test_a_score_that_is_off_by_a_constant_has_its_kl_exactly(kl, sigma):
    """1/2 |c|^2 int sigma^2 dt, all steps included, on every path; the ramp's sum has its steps'
    beginnings."""
    bridge, c = ou_bridge(sigma), t64(0.7, -0.3)
    model = Off(bridge, lambda x, t: c)
    found = kl(model.score, model.truth, bridge, steps=8, paths=6, seed=0)
    begins = bridge.times(8)[:-1]
    expected = 0.58 / 2 * (bridge.process.sigma(begins) ** 2 * 0.25).sum().item()
    assert float(found.mean) == pytest.approx(expected, rel=1e-12)
    assert float(found.error) < 1e-12
    assert found.count == 6
    assert found.trusted_share == 1


def chain_moments(bridge, pull, steps):
    """Mean and variance of X_0 .. X_{K-1} of pinned steps with drift sigma^2 pull x +
    (end - x) / (T - t)."""
    end, left = bridge.end.item(), bridge.duration - bridge.times(steps).numpy()
    mean, variance = bridge.start.item(), 0.0
    moments = []
    for now, after in pairwise(left):
        moments.append((mean, variance))
        dt = now - after
        slope = 1 - dt / now + SIGMA**2 * pull * dt
        mean = slope * mean + end * dt / now
        variance = slope**2 * variance + SIGMA**2 * dt * after / now
    return moments


def test_the_two_directions_average_over_the_true_paths_and_over_the_models():
    """A Brownian bridge, whose pinned steps are exact, and a score that is off by pull x: both KL
    follow from the moments of their own paths, and differ by far more than their errors."""
    bridge, pull, steps = brownian_bridge(), 1.2, 20
    model = Off(bridge, lambda x, t: pull * x)
    expected = {}
    for name, own in (("from", 0.0), ("to", pull)):
        second = [mean**2 + variance for mean, variance in chain_moments(bridge, own, steps)]
        expected[name] = (SIGMA * pull) ** 2 / 2 * sum(second) * bridge.duration / steps
    asked = {"steps": steps, "paths": 4000, "seed": 1}
    found = {
        "from": kl_from_truth(model.score, model.truth, bridge, **asked),
        "to": kl_to_truth(model.score, model.truth, bridge, **asked),
    }
    for name, estimate in found.items():
        assert significance(estimate, expected[name]) < 3
    assert significance(found["from"], expected["to"]) > 10
    assert significance(found["to"], expected["from"]) > 10


def test_the_standard_error_of_a_kl_is_that_of_independent_repetitions():
    bridge = brownian_bridge()
    model = Off(bridge, lambda x, t: 1.2 * x)
    repeated = [
        kl_from_truth(model.score, model.truth, bridge, steps=5, paths=100, seed=seed)
        for seed in range(200)
    ]
    spread = np.std([float(estimate.mean) for estimate in repeated], ddof=1)
    reported = np.mean([float(estimate.error) for estimate in repeated])
    # The spread of 200 values has a relative error of 5 %.
    assert reported == pytest.approx(spread, rel=0.15)


# Cost, end


@pytest.mark.parametrize("sigma", [SIGMA, RAMP], ids=["constant", "ramp"])
def test_path_cost_is_that_of_the_control_without_the_last_step(sigma):
    bridge = ou_bridge(sigma)
    paths = simulate_bridge(Off(bridge).drift, bridge, steps=10, paths=4, seed=0)

    def score(x, t):
        return torch.full_like(x, 3.0) * (t < 1.75)  # 0 at t = 1.8, the last step's beginning

    found = path_cost(score, bridge, paths)
    squares = bridge.process.sigma(bridge.times(10)[:-2]) ** 2
    assert float(found.mean) == pytest.approx(18 / 2 * 0.2 * squares[:9].sum().item())
    with_last = path_cost(lambda x, t: score(x, t) + 1e6 * (t > 1.75), bridge, paths)
    assert float(with_last.mean) == float(found.mean)


def test_endpoint_error_is_a_distance():
    bridge = ou_bridge()
    states = torch.zeros(3, 2, 2, dtype=torch.float64)
    states[-1] = bridge.end + t64(3.0, 4.0) * t64(1, 2)[:, None]
    found = endpoint_error(bridge, Paths(states, t64(0, 1, 2)))
    assert float(found.mean) == pytest.approx(7.5)
    assert float(found.error) == pytest.approx(2.5)


# Importance weights


def euler_density(bridge, steps):
    """log p(end | start) of the Euler chain of an Ornstein-Uhlenbeck process."""
    process, times = bridge.process, bridge.times(steps)
    mean, variance = bridge.start, 0.0
    for t, dt in zip(times[:-1], times.diff(), strict=True):
        mean = mean + process.drift(mean) * dt
        variance = (1 - process.rate * dt) ** 2 * variance + process.sigma(t) ** 2 * dt
    law = torch.distributions.Normal(mean, variance.sqrt())
    return law.log_prob(bridge.end).sum().item()


def test_pinned_paths_of_a_brownian_bridge_weigh_the_same_the_density_of_the_end():
    bridge = brownian_bridge()
    exact = Off(bridge)
    paths = simulate_bridge(exact.drift, bridge, steps=30, paths=50, seed=2)
    weights = log_weights(exact.drift, bridge, paths, pinned=True)
    expected = exact.truth.log_evidence(bridge.start)
    torch.testing.assert_close(weights, torch.full_like(weights, expected), rtol=0, atol=1e-11)
    assert WeightSummary.of(weights).ess == pytest.approx(1, abs=1e-12)
    wrong = log_weights(exact.drift, bridge, paths, pinned=False)
    assert wrong.std() > 0.1


@pytest.mark.parametrize("sigma", [SIGMA, RAMP], ids=["constant", "ramp"])
@pytest.mark.parametrize("pinned", [False, True], ids=["plain", "pinned"])
@pytest.mark.parametrize("error", [0.0, 0.5], ids=["exact", "off"])
def test_weights_are_unbiased_for_the_density_of_the_euler_chain(sigma, pinned, error):
    """Of 8 coarse steps, whose density is 0.2 or more from that of the process."""
    bridge, steps, count = ou_bridge(sigma), 8, 20_000
    model = Off(bridge, lambda x, t: error * x)
    paths = simulate(
        model.drift,
        bridge.process,
        bridge.start.expand(count, -1),
        bridge.times(steps),
        normal(steps, count, 2, seed=3),
        pinned=pinned,
    )
    expected = euler_density(bridge, steps)
    found = WeightSummary.of(log_weights(model.drift, bridge, paths, pinned=pinned))
    assert significance(found.log_p, expected) < 3
    assert float(found.log_p.error) < 0.02
    assert significance(found.log_p, model.truth.log_evidence(bridge.start)) > 10
    assert float(found.bound.mean) < float(found.log_p.mean)
    wrong = WeightSummary.of(log_weights(model.drift, bridge, paths, pinned=not pinned))
    assert significance(wrong.log_p, expected) > 10


def test_the_last_factor_is_that_of_the_reference_process():
    """Weights from the end that paths reached by themselves, with no last factor, are far off."""
    bridge, steps = ou_bridge(), 8
    exact = Off(bridge)
    paths = simulate_bridge(exact.drift, bridge, steps=steps, paths=2000, seed=4)
    weights = log_weights(exact.drift, bridge, paths, pinned=True)
    moved = Paths(torch.cat([paths.states[:-1], paths.states[-1:] + 5]), paths.times)
    assert log_weights(exact.drift, bridge, moved, pinned=True).equal(weights)
    x, dt = paths.states[-2], bridge.duration / steps
    law = torch.distributions.Normal(x + bridge.process.drift(x) * dt, SIGMA * math.sqrt(dt))
    without = WeightSummary.of(weights - law.log_prob(bridge.end).sum(1))
    assert significance(without.log_p, euler_density(bridge, steps)) > 10


@pytest.mark.parametrize(
    ("weights", "ess"),
    [
        ((3.0, 3.0, 3.0, 3.0), 1.0),
        ((1.0, 1.0, 1e-30, 1e-30), 0.5),
        ((1.0, 1e-30, 1e-30, 1e-30), 0.25),
    ],
)
@pytest.mark.parametrize("scale", [0.0, -2000.0])
def test_effective_sample_size_and_mean_of_known_weights(weights, ess, scale):
    found = WeightSummary.of(t64(*weights).log() + scale)
    assert found.ess == pytest.approx(ess)
    assert float(found.log_p.mean) == pytest.approx(math.log(sum(weights) / 4) + scale)


def test_the_error_of_log_p_is_its_spread_over_repetitions():
    log_w = 0.5 * normal(400, 300, seed=5)
    repeated = [WeightSummary.of(row) for row in log_w]
    for kind, mean in (("log_p", 0.125), ("bound", 0.0)):
        estimates = [getattr(summary, kind) for summary in repeated]
        means = [float(estimate.mean) for estimate in estimates]
        reported = np.mean([float(estimate.error) for estimate in estimates])
        # The spread of 400 values has a relative error of 3.5 %.
        assert reported == pytest.approx(np.std(means, ddof=1), rel=0.11)
        assert np.mean(means) == pytest.approx(mean, abs=4 * reported / 20)


# All of it


def test_fields_are_asked_in_the_dtype_of_the_bridge_and_sums_are_in_float64():
    exact = Off(ou_bridge())
    bridge = Bridge(exact.bridge.process, exact.bridge.start.float(), exact.bridge.end.float(), 2.0)
    asked = set()

    class Float32(Off):
        def score(self, x, t):
            asked.add(x.dtype)
            return super().score(x, t)

    metrics = {}
    for name, model in (("float64", exact), ("float32", Float32(bridge))):
        found = evaluate_bridge(model, model.bridge, steps=50, paths=100, seed=6, truth=exact.truth)
        metrics[name] = found.metrics
    assert asked == {torch.float32}
    assert found.paths.states.dtype == torch.float64
    # Rounding of scores that grow to 100 near the end.
    assert metrics["float32"] == pytest.approx(metrics["float64"], rel=1e-4, abs=1e-6)
    assert metrics["float64"]["kl_from_truth"] == metrics["float64"]["kl_to_truth"] == 0


def test_without_a_truth_only_what_needs_none_is_reported():
    bridge = ou_bridge()
    found = evaluate_bridge(Off(bridge), bridge, steps=20, paths=200, seed=7)
    means = {"cost", "endpoint_error", "log_p", "log_p_bound"}
    errors = {f"{name}_se" for name in means}
    assert set(found.metrics) == means | errors | {"ess", "paths", "steps"}
    assert all(type(value) is float for value in found.metrics.values())
    assert found.paths.states.shape == (21, 200, 2)
    again = evaluate_bridge(Off(bridge), bridge, steps=20, paths=200, seed=7)
    assert again.metrics == found.metrics
    other = evaluate_bridge(Off(bridge), bridge, steps=20, paths=200, seed=8)
    assert other.metrics["cost"] != found.metrics["cost"]


def test_the_same_metrics_come_from_the_single_functions():
    bridge = ou_bridge()
    model = Off(bridge, lambda x, t: 0.5 * x)
    asked = {"steps": 20, "paths": 100, "seed": 9}
    metrics = evaluate_bridge(model, bridge, **asked, truth=model.truth).metrics
    forward = kl_from_truth(model.score, model.truth, bridge, **asked)
    backward = kl_to_truth(model.score, model.truth, bridge, **asked)
    assert metrics["kl_from_truth"] == float(forward.mean)
    assert metrics["kl_to_truth"] == pytest.approx(float(backward.mean), rel=1e-12)
    assert metrics["kl_to_truth_se"] == pytest.approx(float(backward.error), rel=1e-12)
    assert metrics["log_p_truth"] == pytest.approx(model.truth.log_evidence(bridge.start))


# Truth on a grid


@pytest.fixture(scope="module")
def well(tmp_path_factory):
    """The double well of height 3 and its truth."""
    bridge = Bridge(DoubleWell(1.0, 3.0), t64(1.0), t64(-1.0), 1.0)
    grid = Grid((-2.2,), (2.2,), (401,), steps=400, slices=100)
    folder = tmp_path_factory.mktemp("well")
    return bridge, solve(bridge.process, bridge.start, bridge.end, 1.0, grid, folder)


class Learned:
    """The double well's exact score plus an offset."""

    def __init__(self, bridge, truth, offset):
        self.process, self.truth, self.offset = bridge.process, truth, offset

    def score(self, x, t):
        return self.truth.score(x, t.item()) + self.offset

    def drift(self, x, t):
        return self.process.drift(x) + self.score(x, t)


def test_the_exact_control_of_the_double_well(well):
    """By quadrature over the chain of 200 steps, 76 % are effective with pinned noise, and log p is
    0.019 below that of the process."""
    bridge, truth = well
    metrics = evaluate_bridge(
        Learned(bridge, truth, 0.0), bridge, steps=200, paths=1000, seed=0, truth=truth
    ).metrics
    assert metrics["kl_from_truth"] == metrics["kl_to_truth"] == 0
    assert metrics["trusted_share"] > 0.99
    assert metrics["ess"] == pytest.approx(0.76, abs=0.05)
    difference = metrics["log_p"] - metrics["log_p_truth"] + 0.019
    assert abs(difference) < 3 * metrics["log_p_se"]
    assert metrics["log_p_bound"] < metrics["log_p_truth"] - 3 * metrics["log_p_bound_se"]
    assert metrics["endpoint_error"] < 0.01


def test_states_outside_of_the_grids_box_count_nothing_and_are_reported(well):
    bridge, truth = well
    times, offset = bridge.times(4), 2.0
    states = torch.zeros(5, 4, 1, dtype=torch.float64)
    states[1:3, 0], states[1, 1] = 3.0, math.inf
    states[2, 1] = math.nan  # diverged
    model = Learned(bridge, truth, offset)
    found = divergence_along(model.score, truth, bridge, Paths(states, times))
    assert found.trusted_share == pytest.approx(12 / 16)
    per_step = offset**2 / 2 * 0.25
    assert float(found.mean) == pytest.approx(per_step * 12 / 4, rel=1e-6)
    inside = Estimate.of(np.array([2, 2, 4, 4]) * per_step)
    assert float(found.error) == pytest.approx(float(inside.error), rel=1e-6)


def test_a_model_that_leaves_the_box_has_a_finite_kl_and_a_low_trusted_share(well):
    bridge, truth = well
    model = Learned(bridge, truth, 100.0)
    metrics = evaluate_bridge(model, bridge, steps=100, paths=50, seed=0, truth=truth).metrics
    assert metrics["trusted_share"] < 0.9
    assert math.isfinite(metrics["kl_to_truth"])
    exact_kl = 100**2 / 2
    assert metrics["kl_from_truth"] == pytest.approx(exact_kl, rel=0.02)
    assert metrics["kl_to_truth"] < exact_kl
