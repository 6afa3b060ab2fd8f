import pytest
import torch

from cdm_ray.processes.edm import (
    REVERSE_STEPS,
    ancestral_step,
    euler_maruyama_step,
    karras_sigmas,
    ode_slope,
    rho_levels,
)
from cdm_ray.processes.oracles import Gaussian

DATA = Gaussian(mean=0.3, variance=0.25)
X = torch.linspace(-2, 2, 7, dtype=torch.float64).view(7, 1, 1, 1).expand(7, 1, 2, 3)
SIGMA = torch.tensor([0.05, 0.1, 0.3, 1.0, 2.0, 5.0, 80.0], dtype=torch.float64)
SIGMA_NEXT = SIGMA * torch.tensor([0.9, 0.5, 0.99, 0.2, 0.75, 0.999, 0.0], dtype=torch.float64)


def column(values):
    return values.view(-1, 1, 1, 1)


def test_sampler_levels_are_those_of_edm():
    levels = karras_sigmas(18, 0.002, 80.0, 7.0)
    assert levels.dtype == torch.float64
    assert levels.shape == (19,)
    assert levels[0] == 80.0
    assert levels[-2] == 0.002
    assert levels[-1] == 0.0
    assert (levels.diff() < 0).all()
    fifth = (80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert levels[5].item() == pytest.approx(fifth, rel=1e-12)
    linear = karras_sigmas(5, 1.0, 3.0, 1.0)
    assert linear.tolist() == pytest.approx([3.0, 2.5, 2.0, 1.5, 1.0, 0.0])


def test_levels_between_two_ends_stay_between_them_however_close():
    start = torch.tensor([1.0, 0.3, 0.002, 0.7])
    end = torch.tensor([0.5, 0.3, 0.002, torch.nextafter(start[3], torch.tensor(0.0)).item()])
    levels = rho_levels(start, end, 6, 7.0)
    assert levels.shape == (6, 4)
    assert torch.equal(levels[0].float(), start)
    assert torch.equal(levels[-1].float(), end)
    # as they are used, in float32: never upwards, which would be the root of a negative variance
    assert (levels.float().diff(dim=0) <= 0).all()
    same = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(rho_levels(same, same, 6, 7.0), same.expand(6, 1000))


def test_one_euler_maruyama_step_has_the_gap_of_the_closed_form():
    """E[D(x')] - D(x) = -(s^2/u)(d^2/u')(x - mean) on Gaussian data; D is linear, so that the
    mean of x' alone matters."""
    x_next = euler_maruyama_step(X, DATA(X, SIGMA), SIGMA, SIGMA_NEXT, torch.zeros_like(X))
    gap = DATA(x_next, SIGMA_NEXT) - DATA(X, SIGMA)
    u, u_next = 0.25 + SIGMA**2, 0.25 + SIGMA_NEXT**2
    expected = -column(0.25 / u * (SIGMA - SIGMA_NEXT) ** 2 / u_next) * (X - 0.3)
    torch.testing.assert_close(gap, expected, rtol=1e-9, atol=1e-12)
    assert gap.abs().max() > 0.01  # the formula is not trivially 0 here


def test_one_ancestral_step_has_no_gap_on_gaussian_data():
    x_next = ancestral_step(X, DATA(X, SIGMA), SIGMA, SIGMA_NEXT, torch.zeros_like(X))
    torch.testing.assert_close(DATA(x_next, SIGMA_NEXT), DATA(X, SIGMA), rtol=0, atol=1e-12)


def noise_variance(step):
    zero, one = torch.zeros_like(X), torch.ones_like(X)
    ends = [step(X, DATA(X, SIGMA), SIGMA, SIGMA_NEXT, noise) for noise in (zero, one)]
    return ((ends[1] - ends[0]) ** 2)[:, 0, 0, 0]


def test_euler_maruyama_noise_is_the_exact_stochastic_integral():
    told = noise_variance(euler_maruyama_step)
    torch.testing.assert_close(told, SIGMA**2 - SIGMA_NEXT**2, rtol=1e-9, atol=0)


def test_ancestral_noise_and_the_spread_of_the_clean_image_make_up_the_exact_reverse_variance():
    told = noise_variance(ancestral_step)
    u, u_next = 0.25 + SIGMA**2, 0.25 + SIGMA_NEXT**2
    left_out = (1 - (SIGMA_NEXT / SIGMA) ** 2) ** 2 * 0.25 * SIGMA**2 / u
    torch.testing.assert_close(told + left_out, u_next * (u - u_next) / u, rtol=1e-9, atol=1e-12)


def test_the_ode_moves_along_the_closed_form():
    d = 1e-6
    moved = DATA.ode(X, SIGMA, SIGMA - d)
    slope = ode_slope(X, DATA(X, SIGMA), SIGMA)
    # a difference quotient: its own error is of the order of d / sigma
    torch.testing.assert_close((X - moved) / d, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", REVERSE_STEPS)
def test_steps_take_one_level_for_all_or_one_each_and_keep_the_dtype(name):
    step, noise = REVERSE_STEPS[name], torch.ones(7, 1, 2, 3)
    x = X.float()
    one = step(x, x / 2, torch.tensor(0.5, dtype=torch.float64), 0.4, noise)
    each = step(x, x / 2, torch.full((7,), 0.5), torch.full((7,), 0.4), noise)
    assert one.dtype == each.dtype == torch.float32
    assert torch.equal(one, each)
