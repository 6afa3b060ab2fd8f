import pytest
import torch

from cdm_ray.processes.edm import spread
from cdm_ray.processes.oracles import Gaussian, Mixture

MIXTURE = Mixture(
    means=torch.tensor([[-0.5], [0.7]], dtype=torch.float64),
    variances=torch.tensor([0.01, 0.04], dtype=torch.float64),
    weights=torch.tensor([0.4, 0.6], dtype=torch.float64),
)
GENERAL = Mixture(
    means=torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double(),
    variances=torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64),
    weights=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy(data, sigma, count, seed=0):
    gen = seeded(seed)
    clean = data.sample(count, gen)
    return clean + sigma * torch.randn(clean.shape, generator=gen, dtype=clean.dtype)


def test_mixture_denoiser_is_the_score_of_its_density():
    """Tweedie: D = x + sigma^2 grad log p_sigma(x), the density written with torch.distributions
    and differentiated by autograd."""
    x = 2 * torch.randn(20, 2, 2, 2, generator=seeded(), dtype=torch.float64).requires_grad_()
    sigma = torch.logspace(-1, 1, 20, dtype=torch.float64)
    std = (GENERAL.variances + sigma[:, None] ** 2).sqrt()  # [20, 3]
    normal = torch.distributions.Normal(GENERAL.means, std.view(20, 3, 1, 1, 1))
    log_component = normal.log_prob(x[:, None]).sum((2, 3, 4)) + GENERAL.weights.log()
    (score,) = torch.autograd.grad(log_component.logsumexp(1).sum(), x)
    tweedie = x + spread(sigma, x) ** 2 * score
    torch.testing.assert_close(GENERAL(x, sigma), tweedie.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        GENERAL.responsibilities(x, sigma), log_component.softmax(1), rtol=1e-8, atol=1e-10
    )


def test_a_mixture_of_one_is_the_gaussian():
    one = Mixture(torch.full((1, 3), 0.3), torch.tensor([0.25]), torch.tensor([1.0]))
    x, sigma = torch.randn(5, 3, generator=seeded()), torch.linspace(0.1, 3, 5)
    torch.testing.assert_close(one(x, sigma), Gaussian(0.3, 0.25)(x, sigma))
    torch.testing.assert_close(one(x, 0.7), Gaussian(0.3, 0.25)(x, 0.7))


def test_a_finite_data_set_is_a_softmax_over_its_images():
    points = torch.randn(5, 3, 4, 4, generator=seeded())
    data = Mixture.of_points(points)
    x = points[[0, 3]] + 0.8 * torch.randn(2, 3, 4, 4, generator=seeded(1))
    sigma = torch.tensor([0.8, 5.0])
    for i in range(2):
        distance = ((x[i] - points) ** 2).sum((1, 2, 3))
        weight = (-distance / (2 * sigma[i] ** 2)).softmax(0)
        expected = (weight.view(5, 1, 1, 1) * points).sum(0)
        torch.testing.assert_close(data(x, sigma)[i], expected)


def test_float32_is_enough_at_both_ends_of_the_noise_range():
    points = torch.randn(50, 1, 8, 8, generator=seeded())
    for sigma in (0.002, 0.1, 80.0):
        x = points[:20] + sigma * torch.randn(20, 1, 8, 8, generator=seeded(2))
        exact = Mixture.of_points(points.double())(x.double(), sigma)
        # rounding of squared distances, amplified by the softmax
        torch.testing.assert_close(
            Mixture.of_points(points)(x, sigma).double(), exact, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (1.0, 0.1), (0.5, 0.3)])
def test_the_exact_reverse_kernel_restores_the_law_at_the_lower_level(sigma, sigma_next):
    n = 100_000
    x_next = MIXTURE.reverse(noisy(MIXTURE, sigma, n), sigma, sigma_next, seeded(3))
    direct = noisy(MIXTURE, sigma_next, n, seed=4)
    for power in (1, 2, 3, 4):
        a, b = x_next**power, direct**power
        standard_error = ((a.var() + b.var()) / n).sqrt()
        assert (a.mean() - b.mean()).abs() < 4 * standard_error


def test_the_exact_reverse_kernel_of_a_gaussian_agrees_with_the_closed_form():
    n, x = 100_000, torch.full((100_000, 1), 1.1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    drawn = Mixture(0.3 * one[:, None], 0.25 * one, one).reverse(x, 1.0, 0.4, seeded())
    noise = torch.randn(n, 1, generator=seeded(1), dtype=torch.float64)
    closed = Gaussian(0.3, 0.25).reverse(x, 1.0, 0.4, noise)
    mean, variance = 0.3 + 0.41 / 1.25 * 0.8, 0.41 * 0.84 / 1.25
    for sample in (drawn, closed):
        # 4 standard errors of the mean and of the variance of normal draws
        assert abs(sample.mean().item() - mean) < 4 * (variance / n) ** 0.5
        assert abs(sample.var().item() - variance) < 4 * variance * (2 / n) ** 0.5


def test_samples_have_the_stated_moments():
    n = 100_000
    told = MIXTURE.sample(n, seeded())
    mean = 0.4 * -0.5 + 0.6 * 0.7
    variance = 0.4 * (0.01 + 0.25) + 0.6 * (0.04 + 0.49) - mean**2
    assert abs(told.mean().item() - mean) < 4 * (variance / n) ** 0.5
    assert told.var().item() == pytest.approx(variance, rel=0.02)
    gaussian = Gaussian(0.3, 0.25).sample(torch.randn(n, generator=seeded()))
    assert abs(gaussian.mean().item() - 0.3) < 4 * 0.5 / n**0.5
    assert gaussian.var().item() == pytest.approx(0.25, rel=0.02)


def test_component_counts_must_agree():
    with pytest.raises(ValueError, match="2 means, 1 variances and 2 weights"):
        Mixture(torch.zeros(2, 1), torch.ones(1), torch.full((2,), 0.5))
