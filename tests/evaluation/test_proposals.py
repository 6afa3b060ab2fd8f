"""Proposals without training, and rejection, where the answer is known."""

import math

import pytest
import torch

from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.bridge_metrics import WeightSummary, evaluate_bridge, log_weights
from cdm_ray.evaluation.bridge_truth import GaussianTruth
from cdm_ray.evaluation.proposals import brownian_guide, delyon_hu, rejection
from cdm_ray.processes.bridge import Bridge
from cdm_ray.processes.references import Brownian, DoubleWell, OrnsteinUhlenbeck, Schedule
from cdm_ray.processes.simulation import simulate

SIGMA = 0.6
every_proposal = pytest.mark.parametrize("make", [brownian_guide, delyon_hu])


def t64(*values):
    return torch.tensor(values, dtype=torch.float64)


def time(t):
    return torch.tensor(t, dtype=torch.float64)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ou_bridge(sigma=SIGMA):
    process = OrnsteinUhlenbeck(2, sigma, 1.5, mean=(0.3, -0.2))
    return Bridge(process, t64(1.0, -0.5), t64(-0.4, 0.8), 2.0)


def well_bridge(height):
    return Bridge(DoubleWell(1.0, height), t64(1.0), t64(-1.0), 1.0)


def significance(estimate, expected):
    return abs(float(estimate.mean) - expected) / float(estimate.error)


# Fields


@every_proposal
def test_drift_and_score_are_one_field(make):
    """drift = b + sigma^2 g, in the dtype of the states, for one time or one per row."""
    bridge = ou_bridge()
    proposal, x = make(bridge), normal(5, 2, seed=0)
    times = torch.linspace(0.1, 1.9, 5, dtype=torch.float64)
    drift, score = proposal.drift(x, times), proposal.score(x, times)
    torch.testing.assert_close(drift, bridge.process.drift(x) + SIGMA**2 * score)
    for row, t in enumerate(times):
        torch.testing.assert_close(proposal.score(x, t)[row], score[row])
    assert proposal.score(x.float(), times).dtype == torch.float32
    assert proposal.drift(x.float(), time(0.5)).dtype == torch.float32


@pytest.mark.parametrize("sigma", [SIGMA, Schedule((0.0, 2.0), (0.4, 1.3))])
def test_the_guides_are_their_formulas(sigma):
    bridge = ou_bridge(sigma)
    x, t = normal(5, 2, seed=0), time(0.5)
    to_end = (bridge.end - x) / 1.5
    torch.testing.assert_close(brownian_guide(bridge).drift(x, t), to_end)
    torch.testing.assert_close(delyon_hu(bridge).drift(x, t), bridge.process.drift(x) + to_end)


@every_proposal
def test_all_are_exact_for_brownian_motion(make):
    bridge = Bridge(Brownian(2, SIGMA), t64(1.0, 0.0), t64(-0.4, 0.8), 2.0)
    truth, x = GaussianTruth(bridge.process, bridge.end, 2.0), normal(5, 2, seed=0)
    torch.testing.assert_close(make(bridge).score(x, time(0.7)), truth.score(x, 0.7))
    metrics = evaluate_bridge(make(bridge), bridge, steps=20, paths=50, seed=0, truth=truth).metrics
    assert metrics["ess"] == pytest.approx(1)
    assert metrics["log_p"] == pytest.approx(metrics["log_p_truth"])
    assert metrics["kl_from_truth"] == pytest.approx(0, abs=1e-20)


# Weights


def well_density(bridge, steps, half_width=2.5, nodes=401):
    """log p(end | start) of the double well's Euler chain, by quadrature between all steps."""
    x, dt = torch.linspace(-half_width, half_width, nodes, dtype=torch.float64), 1 / steps
    mean = x + dt * bridge.process.drift(x[:, None])[:, 0]
    law = torch.distributions.Normal(mean[:, None], math.sqrt(dt))
    step = law.log_prob(x).exp() * (x[1] - x[0])
    density = law.log_prob(bridge.end).exp()[:, 0]
    for _ in range(steps - 2):
        density = step @ density
    first = torch.distributions.Normal(
        bridge.start + dt * bridge.process.drift(bridge.start[None])[0], math.sqrt(dt)
    )
    return math.log((first.log_prob(x).exp() * density).sum().item() * (x[1] - x[0]).item())


def weigh(proposal, bridge, *, steps, pinned):
    count = 20_000
    paths = simulate(
        proposal.drift,
        bridge.process,
        bridge.start.expand(count, -1),
        bridge.times(steps),
        normal(steps, count, 1, seed=1),
        pinned=pinned,
    )
    return WeightSummary.of(log_weights(proposal.drift, bridge, paths, pinned=pinned))


@every_proposal
@pytest.mark.parametrize("pinned", [False, True], ids=["plain", "pinned"])
def test_weights_recover_the_density_of_a_low_double_well(make, pinned):
    bridge = well_bridge(0.7)
    found = weigh(make(bridge), bridge, steps=60, pinned=pinned)
    expected = well_density(bridge, 60)
    assert significance(found.log_p, expected) < 3
    assert float(found.log_p.error) < 0.02
    assert float(found.bound.mean) < expected - 0.1


@every_proposal
def test_few_samples_over_a_high_barrier_are_effective(make):
    """None of the guides knows where the well of height 3 is steep: about 1 and 2 % of 20,000. The
    weights have no variance (drifts grow faster than lines), so the share scatters and the error
    of log p is too small."""
    bridge = well_bridge(3.0)
    found = weigh(make(bridge), bridge, steps=200, pinned=False)
    assert 0.002 < found.ess < 0.06
    assert float(found.log_p.mean) == pytest.approx(well_density(bridge, 200), abs=0.4)


# Rejection


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_rejection_estimates_the_density_of_brownian_motion(dim):
    """p averaged over a ball of radius 0.25 sigma sqrt(T) is within 2 % of p here."""
    bridge = Bridge(Brownian(dim, SIGMA), torch.zeros(dim), torch.full((dim,), 0.3), 2.0)
    radius = 0.25 * SIGMA * math.sqrt(2)
    found = rejection(bridge, steps=4, paths=200_000, tolerance=radius, seed=0)
    expected = GaussianTruth(bridge.process, bridge.end, 2.0).log_evidence(bridge.start.double())
    assert abs(float(found.log_p.mean) - expected) < 3 * float(found.log_p.error) + 0.02
    assert float(found.log_p.error) < 0.04
    accepted = found.paths.states.shape[1]
    assert found.share == accepted / 200_000
    assert float(found.log_p.error) == pytest.approx(1 / math.sqrt(accepted), rel=0.1)


def test_accepted_paths_are_bridges():
    """Mean and variance of an Ornstein-Uhlenbeck bridge half way; 100 steps have the law of the
    process to 1 %."""
    process = OrnsteinUhlenbeck(1, SIGMA, 1.5)
    bridge = Bridge(process, t64(0.6), t64(-0.2), 1.0)
    found = rejection(bridge, steps=100, paths=40_000, tolerance=0.03, seed=1)
    paths = found.paths
    assert ((paths.states[-1] - bridge.end).norm(dim=1) < 0.03).all()
    assert (paths.states[0] == 0.6).all()
    assert paths.times.equal(bridge.times(100))
    exact = GaussianTruth(process, bridge.end, 1.0).bridge(
        bridge.start, t64(0.0, 0.5, 1.0), normal(2, 100_000, 1, seed=2)
    )[1]
    middle = paths.states[50]
    error = middle.std() / math.sqrt(len(middle))
    assert (middle.mean() - exact.mean()).abs() < 3 * error + 0.005
    assert middle.std().item() == pytest.approx(exact.std().item(), rel=0.06)


def test_blocks_do_not_show_in_what_rejection_finds(monkeypatch):
    """A smaller block draws other numbers, and finds the same share to its error."""
    bridge = ou_bridge()
    asked = {"steps": 10, "paths": 5001, "tolerance": 0.4, "seed": 3}
    one = rejection(bridge, **asked)
    assert rejection(bridge, **asked).paths.states.equal(one.paths.states)
    monkeypatch.setattr("cdm_ray.evaluation.proposals._BLOCK_NUMBERS", 10 * 2 * 128)
    many = rejection(bridge, **asked)
    gap = float(many.log_p.mean) - float(one.log_p.mean)
    assert 0 < abs(gap) < 3 * math.hypot(float(one.log_p.error), float(many.log_p.error))


def test_nothing_accepted_is_no_density_and_an_unknown_error():
    bridge = Bridge(Brownian(1, SIGMA), t64(0.0), t64(50.0), 1.0)
    found = rejection(bridge, steps=3, paths=100, tolerance=0.1, seed=0)
    assert found.share == 0
    assert found.paths.states.shape == (4, 0, 1)
    assert float(found.log_p.mean) == -math.inf
    assert float(found.log_p.error) == math.inf


def test_a_tolerance_that_is_not_positive_is_refused():
    with pytest.raises(ConfigError, match="tolerance=0"):
        rejection(ou_bridge(), steps=3, paths=10, tolerance=0, seed=0)
