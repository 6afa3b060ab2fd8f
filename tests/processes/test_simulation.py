"""Paths by Euler-Maruyama."""

import math

import pytest
import torch

from cdm_ray.errors import RunFailed
from cdm_ray.processes.references import Brownian, OrnsteinUhlenbeck, Schedule
from cdm_ray.processes.simulation import check_paths, simulate, simulate_guided

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


def guided(rest, steps, noise, *, process=None, start=None, tolerance=0.0, end=None, duration=1.3):
    """Paths from [1, -1] to [0.4, 0.2] at sigma = 0.7, in float64."""
    times = torch.linspace(0, duration, steps + 1, dtype=torch.float64)
    start = torch.tensor([[1.0, -1.0]], dtype=torch.float64) if start is None else start
    end = torch.tensor([0.4, 0.2], dtype=torch.float64) if end is None else end
    process = process or Brownian(2, 0.7)
    start = start.expand(noise.shape[1], -1)
    return simulate_guided(on(rest, times), end, process, start, times, noise, tolerance=tolerance)


def on(field, times):
    return lambda x, k: field(x, times[k])


def still(x, t):
    return torch.zeros_like(x)


def test_the_guide_alone_is_the_exact_brownian_bridge_at_any_steps():
    """Its mean at every time from noise 0; its variance sigma^2 t (T - t) / T after one step."""
    quiet = torch.zeros(4, 1, 2, dtype=torch.float64)
    paths = guided(still, 4, quiet)
    share = (paths.times / 1.3)[:, None, None]
    line = (1 - share) * paths.states[:1] + share * torch.tensor([0.4, 0.2])
    torch.testing.assert_close(paths.states, line, rtol=0, atol=1e-7)  # 0.4 is float32
    loud = torch.zeros(4, 1, 2, dtype=torch.float64)
    loud[0] = 1.0
    kick = (guided(still, 4, loud).states - paths.states)[1]
    expected = 0.7 * math.sqrt(1.3 / 4 * 3 / 4)
    torch.testing.assert_close(kick, torch.full_like(kick, expected), rtol=1e-12, atol=0)
    assert torch.equal(guided(still, 4, loud).states[-1], paths.states[-1])


def test_a_constant_rest_is_exact_at_any_steps():
    """X_t - end = (T - t) ((start - end) / T + r log(T / (T - t))) without noise."""
    rest = torch.tensor([0.8, -2.0], dtype=torch.float64)
    paths = guided(lambda x, t: rest.expand_as(x).clone(), 5, torch.zeros(5, 1, 2).double())
    end = torch.tensor([0.4, 0.2], dtype=torch.float64)
    left = 1.3 - paths.times[1:-1, None, None]
    gained = rest * (1.3 / left).log()
    expected = end + left * ((paths.states[0] - end) / 1.3 + gained)
    torch.testing.assert_close(paths.states[1:-1], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(paths.states[-1, 0], end, rtol=0, atol=1e-12)


def test_guided_steps_are_of_second_order_where_euler_steps_are_of_first():
    """Without noise, at half of the time, against 1024 steps of the same."""

    def rest(x, t):
        return torch.stack([x[:, 1] ** 2 + t, -3 * x[:, 0] * x[:, 1]], dim=1)

    def drift(x, t):
        return rest(x, t) + (torch.tensor([0.4, 0.2], dtype=torch.float64) - x) / (1.3 - t)

    def quiet(steps):
        return torch.zeros(steps, 1, 2, dtype=torch.float64)

    fine = guided(rest, 1024, quiet(1024)).states[512]
    errors, plain = [], []
    for steps in (32, 64):
        paths = guided(rest, steps, quiet(steps))
        errors.append((paths.states[steps // 2] - fine).norm().item())
        euler = simulate(drift, Brownian(2, 0.7), paths.states[0], paths.times, quiet(steps))
        plain.append((euler.states[steps // 2] - fine).norm().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
    assert plain[0] / plain[1] == pytest.approx(2, rel=0.15)
    assert errors[1] < plain[1] / 10


def test_guided_paths_have_the_law_of_a_bridge_with_a_linear_rest():
    """OU: b = -2 (x - 0), rest = b + a (g - guide): mean and variance at half of the time within 4
    standard errors of the closed form, where Euler steps are off by many."""
    rate, sigma, duration, steps, number = 2.0, 0.7, 1.3, 12, 40000
    process = OrnsteinUhlenbeck(1, sigma, rate)
    end = torch.tensor([0.4], dtype=torch.float64)
    start = torch.tensor([[1.0]], dtype=torch.float64)

    def score(x, t):
        left = duration - t
        variance = sigma**2 * (1 - torch.exp(-2 * rate * left)) / (2 * rate)
        shrink = torch.exp(-rate * left)
        return shrink * (end - shrink * x) / variance

    def rest(x, t):
        return -rate * x + sigma**2 * score(x, t) - (end - x) / (duration - t)

    noise = torch.randn(steps, number, 1, generator=torch.Generator().manual_seed(0)).double()
    times = torch.linspace(0, duration, steps + 1, dtype=torch.float64)
    starts = start.expand(number, -1)
    own = simulate_guided(on(rest, times), end, process, starts, times, noise).states[steps // 2]
    t = duration / 2

    def variance(length):
        return sigma**2 * (1 - math.exp(-2 * rate * length)) / (2 * rate)

    shrink = math.exp(-rate * t)
    total = variance(t) + shrink**2 * variance(t)
    exact_variance = variance(t) * variance(t) / (variance(t) + shrink**2 * variance(t))
    exact_mean = (variance(t) * shrink * 1.0 + shrink * variance(t) * 0.4) / total
    mean_error = (own.mean() - exact_mean) / math.sqrt(exact_variance / number)
    variance_error = (own.var() / exact_variance - 1) / math.sqrt(2 / number)
    assert abs(mean_error) < 4
    assert abs(variance_error) < 4
    euler = simulate(
        lambda x, t: -rate * x + sigma**2 * score(x, t), process, starts, times, noise
    ).states[steps // 2]
    assert abs((euler.var() / exact_variance - 1) / math.sqrt(2 / number)) > 8


def test_a_guided_step_calls_the_rest_once():
    seen = []

    def rest(x, t):
        seen.append(round(t.item(), 12))
        return still(x, t)

    paths = guided(rest, 5, torch.zeros(5, 3, 2, dtype=torch.float64))
    assert seen == [round(t, 12) for t in paths.times[:-1].tolist()]


def test_a_tolerance_softens_the_guide():
    """As if the end were (tolerance / sigma)^2 later, of which the last part is not walked."""
    noise = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    soft = guided(still, 4, noise, tolerance=0.35)
    late = 1.3 + (0.35 / 0.7) ** 2
    times = torch.cat(
        [torch.linspace(0, 1.3, 5, dtype=torch.float64), torch.tensor([late], dtype=torch.float64)]
    )
    longer = torch.cat([noise, torch.zeros(1, 3, 2)])
    end = torch.tensor([0.4, 0.2], dtype=torch.float64)
    whole = simulate_guided(on(still, times), end, Brownian(2, 0.7), soft.states[0], times, longer)
    torch.testing.assert_close(soft.states, whole.states[:-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(soft.increments, whole.increments[:-1], rtol=1e-12, atol=1e-12)


def test_paths_that_explode_are_told_with_the_first_step_state_sigma_and_dt():
    def explode(x, t):
        return 1e3 * x**3

    start = torch.tensor([[0.0], [2.0]])
    times = torch.linspace(0, 1, 11)
    paths = simulate(explode, Brownian(1, 0.5), start, times, torch.zeros(10, 2, 1))
    bad = int((~paths.states.isfinite()).any(-1).any(-1).int().argmax())
    with pytest.raises(RunFailed) as caught:
        check_paths(paths, Brownian(1, 0.5), "iteration 7")
    message = str(caught.value)
    assert message.startswith(f"iteration 7: a path left the domain of its process at step {bad}")
    assert "sigma=0.5 and dt=0.1" in message
    assert str(paths.states[bad - 1, 1].tolist()) in message
    check_paths(simulate(still, Brownian(1, 0.5), start, times, torch.zeros(10, 2, 1)),
                Brownian(1, 0.5), "iteration 7")  # fmt: skip
