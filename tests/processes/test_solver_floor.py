"""What a solver leaves of the Consistency Property of an exact denoiser: below that, a measured CP
value says nothing. Expectations over a step's noise are quadratures, so that nothing is random."""

import pytest
import torch

from cdm_ray.processes.edm import REVERSE_STEPS, rho_levels
from cdm_ray.processes.oracles import Mixture

MIXTURE = Mixture(
    means=torch.tensor([[-0.5], [0.7]], dtype=torch.float64),
    variances=torch.tensor([0.01, 0.04], dtype=torch.float64),
    weights=torch.tensor([0.4, 0.6], dtype=torch.float64),
)
SIGMAS = (0.1, 0.2, 0.3, 0.5, 1.0)


def rms_gap(kind, steps, sigma, sigma_next, points=601):
    """Root mean square over x of E[D(x') | x] - D(x)."""
    reach = 6 * (0.04 + sigma**2) ** 0.5
    x = torch.linspace(-0.5 - reach, 0.7 + reach, points, dtype=torch.float64)[:, None]
    levels = rho_levels(torch.tensor(sigma), torch.tensor(sigma_next), steps + 1, 7.0)
    value = MIXTURE(x, sigma_next)
    for s, s_next in reversed(list(zip(levels[:-1], levels[1:], strict=True))):
        mean, one = (
            REVERSE_STEPS[kind](x, MIXTURE(x, s), s, s_next, torch.full_like(x, z)) for z in (0, 1)
        )
        kernel = (-(((x.T - mean) / (one - mean)) ** 2) / 2).exp()
        value = kernel @ value / kernel.sum(1, keepdim=True)
    u = MIXTURE.variances + sigma**2
    density = (MIXTURE.weights * (-((x - MIXTURE.means.T) ** 2) / (2 * u)).exp() / u.sqrt()).sum(1)
    gap = (value - MIXTURE(x, sigma))[:, 0]
    return float(((density * gap**2).sum() / density.sum()).sqrt())


@pytest.fixture(scope="module")
def floor():
    cases = [("euler_maruyama", 1), ("euler_maruyama", 2), ("euler_maruyama", 5), ("ancestral", 1)]
    return {
        (kind, steps, sigma): rms_gap(kind, steps, sigma, sigma - 0.05)
        for kind, steps in cases
        for sigma in SIGMAS
    }


def test_euler_maruyama_leaves_a_gap_of_the_order_of_its_step(floor):
    for sigma in SIGMAS:
        one, two, five = (floor["euler_maruyama", k, sigma] for k in (1, 2, 5))
        assert 1.6 < one / two < 2.4
        assert 2 < two / five < 3


def test_the_ancestral_step_beats_it_where_the_modes_are_apart(floor):
    """One Gaussian mode at a time is seen at low noise, where the ancestral step has no gap."""
    assert floor["ancestral", 1, 0.1] < floor["euler_maruyama", 1, 0.1] / 10


def test_where_modes_merge_one_ancestral_step_has_the_floor_of_euler_maruyama(floor):
    """The spread of the clean image over two modes is what it leaves out."""
    assert 0.5 < floor["ancestral", 1, 0.3] / floor["euler_maruyama", 1, 0.3] < 4


def test_the_ancestral_gap_vanishes_with_the_step():
    wide, narrow = (rms_gap("ancestral", 1, 0.4, 0.4 - d) for d in (0.1, 0.05))
    assert 2.5 < wide / narrow < 4.5  # a single step: local order 2


def test_the_gap_of_a_gaussian_mode_is_the_closed_form(floor):
    """At sigma = 0.1 the modes are apart: a mean of the two closed forms -(s^2/u)(d^2/u')(x - m),
    whose root mean square over x ~ N(m, u) is s^2 d^2 / (u' sqrt(u))."""
    squares = [
        w * (v * 0.05**2 / ((v + 0.05**2) * (v + 0.1**2) ** 0.5)) ** 2
        for w, v in ((0.4, 0.01), (0.6, 0.04))
    ]
    # the modes still touch: 1 % of the gap
    assert floor["euler_maruyama", 1, 0.1] == pytest.approx(sum(squares) ** 0.5, rel=0.01)
