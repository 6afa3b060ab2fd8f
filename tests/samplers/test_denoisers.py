import pytest
import torch

from cdm_ray.processes.edm import karras_sigmas
from cdm_ray.processes.oracles import Gaussian
from cdm_ray.samplers import SOLVERS, in_float32, scale_epsilon

DATA = Gaussian(mean=0.3, variance=0.25)


def states(sigma, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return sigma * torch.randn(5, 1, 2, 2, generator=generator, dtype=dtype)


@pytest.mark.parametrize("sigma", [0.002, 0.7, 80.0])
@pytest.mark.parametrize("scale", [0.99, 1.0005, 1.005])
def test_the_predicted_noise_is_divided_by_the_scale(sigma, scale):
    x, level = states(sigma), torch.tensor(sigma, dtype=torch.float64)
    before = (x - DATA(x, level)) / sigma
    after = (x - scale_epsilon(DATA, scale)(x, level)) / sigma
    # rounding of x - D, with values up to 3 sigma + 1, divided by sigma
    torch.testing.assert_close(after, before / scale, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_the_scaled_ode_is_solved_by_a_power_of_sigma(name):
    """Data at 0: dx/dsigma = x/(b sigma), hence x ~ sigma^(1/b). Scaled in the first evaluation of
    Heun's step alone, the exponent would be (1 + 1/b)/2 to first order."""
    scale, x = 1.1, states(10.0)
    sigmas = karras_sigmas(201, 0.5, 10.0, 7.0)[:-1]
    denoise = scale_epsilon(lambda x, sigma: torch.zeros_like(x), scale)
    end = SOLVERS[name].sample(denoise, x, sigmas, lambda: x)
    expected = x * (0.5 / 10.0) ** (1 / scale)
    # 200 steps of order 2: 2e-5. The wrong exponent is off by 13 %.
    torch.testing.assert_close(end, expected, rtol=5e-5, atol=0)


def test_networks_work_in_float32_and_solvers_in_float64():
    seen = []

    def network(x, sigma):
        seen.append((x.dtype, sigma.dtype))
        return DATA(x, sigma)

    x, sigma = states(1.0), torch.tensor(1.0, dtype=torch.float64)
    denoised = in_float32(network)(x, sigma)
    assert seen == [(torch.float32, torch.float32)]
    assert denoised.dtype == torch.float64
    assert torch.equal(denoised, DATA(x.float(), sigma.float()).double())
