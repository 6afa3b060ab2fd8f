"""Paths by Euler-Maruyama."""

import math

import pytest
import torch

from cdm_ray.processes.references import Brownian, OrnsteinUhlenbeck, Schedule
from cdm_ray.processes.simulation import simulate

PROCESS = OrnsteinUhlenbeck(2, Schedule((0.0, 1.0), (0.5, 2.0)), 1.5)
START = torch.tensor([[1.0, -1.0], [0.3, 0.2], [0.0, 2.0]], dtype=torch.float64)
TIMES = torch.tensor([0.0, 0.1, 0.35, 0.5, 1.0], dtype=torch.float64)
NOISE = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pull(x, t):
    return (1 + t) * (x.flip(-1) - 2 * x)


def test_every_state_is_the_euler_maruyama_step_of_the_one_before():
    paths = simulate(pull, PROCESS, START, TIMES, NOISE)
    assert paths.states[0].equal(START)
    assert paths.times.equal(TIMES)
    for k, (t, t_next) in enumerate(zip(TIMES[:-1].tolist(), TIMES[1:].tolist(), strict=True)):
        x, dt = paths.states[k], t_next - t
        increment = math.sqrt(dt) * NOISE[k]
        expected = x + pull(x, t) * dt + (0.5 + 1.5 * t) * increment
        torch.testing.assert_close(paths.states[k + 1], expected, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(paths.increments[k], increment, rtol=1e-13, atol=1e-14)
        assert paths.steps[k].item() == pytest.approx(dt)


def test_a_step_calls_the_drift_once_at_its_beginning_and_nothing_has_a_gradient():
    weight, seen = torch.ones(2, dtype=torch.float64, requires_grad=True), []

    def drift(x, t):
        assert not torch.is_grad_enabled()
        seen.append(t.item())
        return weight * x

    paths = simulate(drift, PROCESS, START, TIMES, NOISE)
    assert seen == TIMES[:-1].tolist()
    assert not paths.states.requires_grad


def test_float32_states_stay_float32_on_a_float64_grid():
    paths = simulate(pull, PROCESS, START.float(), TIMES, NOISE.float())
    assert paths.states.dtype == paths.increments.dtype == paths.steps.dtype == torch.float32
    exact = simulate(pull, PROCESS, START, TIMES, NOISE).states
    torch.testing.assert_close(paths.states.double(), exact, rtol=1e-5, atol=1e-5)


def test_noise_and_start_are_left_as_they_were():
    noise, start = NOISE.clone(), START.clone()
    simulate(pull, PROCESS, start, TIMES, noise)
    assert noise.equal(NOISE)
    assert start.equal(START)


def test_pinned_noise_makes_a_brownian_bridge_of_two_steps_exact():
    """Whatever the steps, X_t of the bridge from 0 to 0 has the variance sigma^2 t (T - t) / T."""
    times = torch.tensor([0.0, 0.7, 1.0], dtype=torch.float64)
    noise = torch.tensor([[[1.0]], [[1.0]]], dtype=torch.float64)
    start = torch.zeros(1, 1, dtype=torch.float64)

    def to_zero(x, t):
        return -x / (1 - t)

    pinned = simulate(to_zero, Brownian(1, 2.0), start, times, noise, pinned=True).states
    assert pinned[1].item() == pytest.approx(2.0 * math.sqrt(0.7 * 0.3), rel=1e-14)
    assert pinned[2].item() == pytest.approx(0.0, abs=1e-14)
    plain = simulate(to_zero, Brownian(1, 2.0), start, times, noise).states
    assert plain[2].item() == pytest.approx(2.0 * math.sqrt(0.3), rel=1e-14)
