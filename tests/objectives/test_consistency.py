import pytest
import torch

from cdm_ray.objectives.consistency import LEARNING_SIDES, product, regress
from cdm_ray.processes.edm import ancestral_step, ode_slope
from cdm_ray.processes.oracles import Mixture

MIXTURE = Mixture(
    means=torch.tensor([[-0.5], [0.7]], dtype=torch.float64),
    variances=torch.tensor([0.01, 0.04], dtype=torch.float64),
    weights=torch.tensor([0.4, 0.6], dtype=torch.float64),
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standard_errors_off(values, expected):
    """How far the mean of independent values is from what it should be."""
    return abs(values.mean() - expected).item() / (values.std() / len(values) ** 0.5).item()


def test_product_and_regress_sum_over_everything_but_the_batch():
    a, b, c = (normal(2, 3, 4, 5, seed=s) for s in range(3))
    by_hand = [sum((b[i] - a[i]).flatten() * (c[i] - a[i]).flatten()).item() for i in range(2)]
    assert product(a, b, c).tolist() == pytest.approx(by_hand)
    squares = [((a[i] - b[i]) ** 2).sum().item() for i in range(2)]
    assert regress(a, b).tolist() == pytest.approx(squares)


def rollout_values(rollouts, n=20_000):
    """phi0 and phi at the ends of rollouts, for a linear field that breaks CP, by one ancestral
    step; and |E[phi1] - phi0|^2 in closed form. All from one x, so that only noise varies."""
    sigma, sigma_next, slope, slope_next = 1.0, 0.7, 0.5, 0.8
    x = torch.full((n, 3), 0.4, dtype=torch.float64)
    phi0 = slope * x
    ends = [
        slope_next * ancestral_step(x, phi0, sigma, sigma_next, normal(n, 3, seed=s))
        for s in range(rollouts)
    ]
    mean_end = slope_next * (slope + 0.7**2 * (1 - slope)) * 0.4
    return phi0, ends, 3 * (mean_end - slope * 0.4) ** 2


def test_the_product_of_two_rollouts_is_unbiased_and_may_be_negative():
    phi0, ends, expected = rollout_values(2)
    values = product(phi0, *ends)
    assert standard_errors_off(values, expected) < 3
    assert (values < 0).any()


def test_the_same_test_finds_the_bias_of_squares():
    phi0, ends, expected = rollout_values(8)
    one = product(phi0, ends[0], ends[0])
    mean = torch.stack(ends).mean(0)
    of_mean = product(phi0, mean, mean)
    assert standard_errors_off(one, expected) > 30
    assert standard_errors_off(of_mean, expected) > 30
    # and they are what the theory says: a variance, or an eighth of it, too high
    variance = 3 * (0.8 * 0.7) ** 2 * (1 - 0.7**2)
    assert standard_errors_off(one, expected + variance) < 3
    assert standard_errors_off(of_mean, expected + variance / 8) < 3


def noisy(sigma, n=100_000):
    gen = torch.Generator().manual_seed(5)
    return MIXTURE.sample(n, gen) + sigma * normal(n, 1, seed=6)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.2, 0.1), (0.4, 0.3), (1.0, 0.1)])
def test_the_exact_denoiser_is_consistent_along_the_exact_reverse_sde(sigma, sigma_next):
    x = noisy(sigma)
    ends = [MIXTURE.reverse(x, sigma, sigma_next, torch.Generator().manual_seed(s)) for s in (1, 2)]
    values = product(MIXTURE(x, sigma), *(MIXTURE(end, sigma_next) for end in ends))
    assert standard_errors_off(values, 0) < 3


def test_the_exact_denoiser_is_not_consistent_along_the_ode():
    x = path = noisy(0.4)
    for k in range(20):
        level = 0.4 - k * 0.005
        path = path - 0.005 * ode_slope(path, MIXTURE(path, level), level)
    gap = MIXTURE(path, 0.3) - MIXTURE(x, 0.4)
    # on one Gaussian mode it would be sqrt(u/u') - 1, 0.2 to 0.3, of the spread of D around it
    assert gap.square().mean().sqrt() > 0.1 * MIXTURE(x, 0.4).std()


WRONG = {
    "symmetric": torch.tensor([[1.0, 0.6], [0.6, 3.0]], dtype=torch.float64),
    "no score at all": torch.tensor([[2.0, 1.0], [-1.0, 2.0]], dtype=torch.float64),
}


@pytest.mark.parametrize("name", WRONG)
def test_consistency_alone_does_not_make_a_denoiser_right(name):
    """h = (I + sigma^2 C)^-1 x is consistent for any C, whatever the data; here they are
    N(0, 0.25 I), that is C = 4 I."""

    def field(matrix, x, sigma):
        identity = torch.eye(2, dtype=torch.float64)
        return x @ torch.linalg.inv(identity + sigma**2 * matrix).T

    n, sigma, sigma_next, wrong = 50_000, 0.6, 0.3, WRONG[name]
    clean = 0.5 * normal(n, 2)
    x = clean + sigma * normal(n, 2, seed=1)
    phi0 = field(wrong, x, sigma)
    mean_end = ancestral_step(x, phi0, sigma, sigma_next, torch.zeros_like(x))
    assert regress(phi0, field(wrong, mean_end, sigma_next)).max() < 1e-20
    ends = [
        field(wrong, ancestral_step(x, phi0, sigma, sigma_next, normal(n, 2, seed=s)), sigma_next)
        for s in (2, 3)
    ]
    assert standard_errors_off(product(phi0, *ends), 0) < 3
    truth = field(4 * torch.eye(2, dtype=torch.float64), x, sigma)
    excess = regress(phi0, clean) - regress(truth, clean)
    assert standard_errors_off(excess, 0) > 30
    assert excess.mean() > 0


@pytest.mark.parametrize(
    ("name", "start", "end"), [("low", False, True), ("high", True, False), ("both", True, True)]
)
def test_gradient_reaches_exactly_the_side_that_learns(name, start, end):
    side = LEARNING_SIDES[name]
    phi0 = normal(4, 3).requires_grad_()
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with side.evaluating_end():
        ends = [weight * normal(4, 3, seed=s) for s in (1, 2)]
    product(side.at_start(phi0), *ends).sum().backward()
    one, two = (e.detach() - phi0.detach() for e in ends)
    assert (phi0.grad is not None) == start
    assert (weight.grad is not None) == end
    if start:
        torch.testing.assert_close(phi0.grad, -(one + two))
    if end:
        a, b = (normal(4, 3, seed=s) for s in (1, 2))
        torch.testing.assert_close(weight.grad, (a * two + b * one).sum(0))


def test_without_gradient_nothing_turns_it_on():
    with torch.no_grad(), LEARNING_SIDES["both"].evaluating_end():
        assert not torch.is_grad_enabled()


def test_a_regression_target_is_fixed_and_its_gradient_unbiased():
    phi0, ends, _ = rollout_values(1)
    phi0, target = phi0.clone().requires_grad_(), ends[0].clone().requires_grad_()
    regress(phi0, target).sum().backward()
    assert target.grad is None
    mean_end = 0.8 * (0.5 + 0.7**2 * 0.5) * 0.4
    assert standard_errors_off(phi0.grad[:, 0], 2 * (0.5 * 0.4 - mean_end)) < 3
