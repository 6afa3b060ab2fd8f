import copy
import math
import pickle

import pytest
import torch

from cdm_ray.errors import ConfigError
from cdm_ray.processes.references import (
    Brownian,
    Cell,
    CoxIngersollRoss,
    DoubleWell,
    GradientProcess,
    MuellerBrown,
    OrnsteinUhlenbeck,
    ReferenceProcess,
    Schedule,
    jacobian_transpose,
    state_dependent_sigma,
)

RAMP = Schedule((0.0, 0.5, 2.0), (2.0, 0.5, 0.7))
PROCESSES = [
    Brownian(3, 0.7),
    OrnsteinUhlenbeck(3, 0.7, 2.0, mean=(0.5, -1.0, 0.0)),
    OrnsteinUhlenbeck(20, RAMP, -0.5, mean=0.3),
    DoubleWell(0.7, 3.0, well=1.5),
    Cell(0.1),
    MuellerBrown(3.0),
    CoxIngersollRoss(0.8, 1.5, 0.7),
]
CIR = PROCESSES[-1]
GRADIENT = [process for process in PROCESSES if isinstance(process, GradientProcess)]


def name(process):
    return f"{type(process).__name__}-{process.dim}"


def states(process, count=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, process.dim, generator=generator, dtype=torch.float64).to(dtype)
    return x.abs() + 0.2 if isinstance(process, CoxIngersollRoss) else x


def jacobian(process, x):
    """db_i/dx_j at every row, [N, d, d]."""
    return torch.func.vmap(torch.func.jacrev(lambda y: process.drift(y[None])[0]))(x)


def stationary(process, guess):
    """The zero of the drift next to `guess`, by Newton's method."""
    x = torch.tensor([guess], dtype=torch.float64)
    for _ in range(20):
        x = x - torch.linalg.solve(jacobian(process, x), process.drift(x)[..., None])[..., 0]
    assert process.drift(x).abs().max() < 1e-9
    return x


@pytest.mark.parametrize("process", GRADIENT, ids=name)
def test_drift_is_minus_the_gradient_of_the_potential(process):
    x = states(process).requires_grad_()
    potential = process.potential(x)
    assert potential.shape == (7,)
    if type(process) is Brownian:
        assert not potential.any()
        assert not process.drift(x).any()
        return
    (gradient,) = torch.autograd.grad(potential.sum(), x)
    torch.testing.assert_close(process.drift(x), -gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drift_keeps_shape_and_dtype_and_treats_rows_alone(process, dtype):
    x = states(process, dtype=dtype)
    b = process.drift(x)
    assert b.shape == x.shape
    assert b.dtype == dtype
    torch.testing.assert_close(process.drift(x[2:3]), b[2:3])
    torch.testing.assert_close(
        b.double(), process.drift(x.double()), rtol=1e-4, atol=1e-5, check_dtype=False
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("process", PROCESSES, ids=name)
def test_jacobian_transpose_is_the_full_jacobian_transposed(process):
    x, v = states(process), states(process).flip(0) + 0.3
    full = jacobian(process, x)
    expected = torch.einsum("nij,ni->nj", full, v)
    torch.testing.assert_close(jacobian_transpose(process, x, v), expected)
    forward = torch.func.vmap(torch.func.jacfwd(lambda y: process.drift(y[None])[0]))(x)
    torch.testing.assert_close(forward, full)
    with torch.no_grad():
        torch.testing.assert_close(jacobian_transpose(process, x, v), expected)
    one_by_one = torch.func.vmap(lambda y, w: jacobian_transpose(process, y[None], w[None])[0])
    torch.testing.assert_close(one_by_one(x, v), expected)
    looped = torch.stack(
        [torch.autograd.functional.jacobian(lambda y: process.drift(y[None])[0], y) for y in x]
    )
    torch.testing.assert_close(looped, full)


def test_the_cells_jacobian_is_not_symmetric_so_that_transposing_is_tested():
    full = jacobian(Cell(0.1), states(Cell(0.1)))
    assert (full - full.mT).abs().amax() > 0.1  # and so it has no potential


def test_mueller_brown_has_its_published_minima_and_saddles():
    """Positions to the three digits that are quoted, heights to two."""
    process = MuellerBrown(3.0)
    points = [
        ((-0.558, 1.442), -146.70, 0),
        ((0.623, 0.028), -108.17, 0),
        ((-0.050, 0.467), -80.77, 0),
        ((-0.822, 0.624), -40.66, 1),
        ((0.212, 0.293), -72.25, 1),
    ]
    for guess, height, downhill in points:
        x = stationary(process, guess)
        torch.testing.assert_close(x, x.new_tensor([guess]), rtol=0, atol=6e-4)
        assert process.potential(x).item() == pytest.approx(height, abs=0.006)
        curvatures = torch.linalg.eigvalsh(-jacobian(process, x)[0])
        assert (curvatures < 0).sum() == downhill


def test_double_well_has_its_minima_and_its_barrier():
    process = DoubleWell(0.7, height=3.0, well=1.5)
    x = torch.tensor([[-1.5], [1.5], [0.0]], dtype=torch.float64)
    assert not process.drift(x).any()
    assert process.potential(x).tolist() == [0, 0, 3 * 1.5**4]
    assert (jacobian(process, x).flatten() < 0).tolist() == [True, True, False]


def test_the_cell_is_stable_undifferentiated_and_in_two_kinds():
    process = Cell(0.1)
    for guess, exact in [
        ((1.0, 1.0), (1.0, 1.0)),
        ((2.0, -0.1), (1.9961, 0.0039)),
        ((-0.1, 2.0), (0.0039, 1.9961)),
    ]:
        x = stationary(process, guess)
        torch.testing.assert_close(x, x.new_tensor([exact]), rtol=0, atol=1e-4)
        assert (torch.linalg.eigvals(jacobian(process, x)[0]).real < -0.5).all()


def test_the_cell_runs_from_its_usual_start_to_the_first_kind_by_itself():
    """(.1, -.1) is no stable point, and without noise it leads next to the usual end (2, -.1);
    a start with equal genes leads to the undifferentiated cell."""
    process = Cell(0.1)
    x = torch.tensor([[0.1, -0.1], [0.1, 0.1]], dtype=torch.float64)
    assert process.drift(x)[0].norm() > 1.4
    for _ in range(2000):
        x = x + 0.01 * process.drift(x)
    torch.testing.assert_close(x, x.new_tensor([[1.9961, 0.0039], [1, 1]]), rtol=0, atol=1e-4)


def test_cox_ingersoll_ross_is_itos_formula_of_its_transformation():
    """dy = (y' b + y'' s^2 / 2) dt + y' s dB of dx = b dt + s dB, derivatives by autograd."""
    rate, mean, volatility = 0.8, 1.5, 0.7
    process = CoxIngersollRoss(rate, mean, volatility)
    x = torch.tensor([0.02, 0.4, 1.5, 6.0], dtype=torch.float64, requires_grad=True)
    y = process.to_lamperti(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    s = volatility * x.sqrt()
    drift = slope * rate * (mean - x) + curvature * s.square() / 2
    torch.testing.assert_close(process.drift(y[:, None])[:, 0], drift)
    torch.testing.assert_close(slope * s, process.sigma(torch.zeros_like(x)))
    torch.testing.assert_close(process.from_lamperti(y), x)


def test_states_of_cox_ingersoll_ross_that_jumped_over_0_are_outside_and_have_no_drift():
    process = CoxIngersollRoss(1.0, 2.0, 1.0)
    y = torch.tensor([[0.1], [0.0], [-0.1], [math.nan], [math.inf]], dtype=torch.float64)
    assert process.inside(y).tolist() == [True, False, False, False, False]
    assert process.drift(y).isfinite()[:, 0].tolist() == [True, False, False, False, False]
    assert process.potential(y).isfinite().tolist() == [True, False, False, False, False]
    transpose = jacobian_transpose(process, y, torch.ones_like(y))
    assert transpose.isfinite()[:3, 0].tolist() == [True, False, False]


def test_the_domain_of_a_process_is_every_finite_state_unless_it_says_otherwise():
    x = torch.tensor([[0.0, -9.0], [math.nan, 1.0], [1.0, -math.inf]])
    for process in (Brownian(2, 0.7), Cell(0.1), MuellerBrown(3.0)):
        assert process.inside(x).tolist() == [True, False, False]


def test_fellers_condition_includes_its_boundary():
    assert CoxIngersollRoss(0.5, 1.0, 1.0).order == 0
    assert CoxIngersollRoss(1.0, 2.0, 1.0).order == 3


def test_a_schedule_is_linear_between_its_points_and_constant_outside():
    t = torch.tensor([-1.0, 0.0, 0.25, 0.5, 1.25, 2.0, 9.0], dtype=torch.float64)
    expected = torch.tensor([2.0, 2.0, 1.25, 0.5, 0.6, 0.7, 0.7], dtype=torch.float64)
    torch.testing.assert_close(RAMP(t), expected)
    torch.testing.assert_close(RAMP(t[2]), expected[2])


@pytest.mark.parametrize("process", [Brownian(2, 0.7), Brownian(2, RAMP)], ids=["number", "ramp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigma_has_the_shape_and_dtype_of_the_times(process, dtype):
    for t in (torch.tensor(0.25, dtype=dtype), torch.full((4,), 0.25, dtype=dtype)):
        sigma = process.sigma(t)
        torch.testing.assert_close(sigma, torch.full_like(t, 0.7 if process.noise == 0.7 else 1.25))


@pytest.mark.parametrize("process", PROCESSES, ids=name)
def test_a_process_travels_between_workers(process):
    x = states(process)
    for other in (pickle.loads(pickle.dumps(process)), copy.deepcopy(process)):
        assert torch.equal(other.drift(x), process.drift(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Brownian(0, 1.0), "dim=0"),
        (lambda: Brownian(2, 0.0), "sigma=0.0; it has to be a positive number"),
        (lambda: Brownian(2, float("nan")), "sigma=nan"),
        (lambda: Brownian(2, lambda x: x.sqrt()), "sigma is a function.*depends on the state"),
        (lambda: DoubleWell(1.0, -3.0), "height=-3.0"),
        (lambda: DoubleWell(1.0, 3.0, well=0.0), "well=0.0"),
        (lambda: OrnsteinUhlenbeck(2, 1.0, float("inf")), "rate=inf"),
        (lambda: OrnsteinUhlenbeck(2, 1.0, 1.0, mean=(0.0, 0.0, 0.0)), "one number or 2"),
        (lambda: CoxIngersollRoss(0.0, 2.0, 1.0), "rate=0.0"),
        (lambda: CoxIngersollRoss(1.0, -2.0, 1.0), "mean=-2.0"),
        (lambda: CoxIngersollRoss(1.0, 2.0, float("nan")), "volatility=nan"),
        (lambda: CoxIngersollRoss(0.5, 0.9, 1.0), "2 rate mean is below volatility.2 .*reaches 0"),
        (lambda: CIR.to_lamperti(torch.tensor([2.0, 0.0])), "x=0.0 is no state .* positive"),
        (lambda: CIR.from_lamperti(torch.tensor([[1.0], [-0.5]])), "y=-0.5 is no state"),
        (lambda: Schedule((0.0,), (1.0,)), "1 times and 1 values"),
        (lambda: Schedule((0.0, 1.0), (1.0,)), "2 times and 1 values"),
        (lambda: Schedule((0.0, 0.0), (1.0, 1.0)), "increase"),
        (lambda: Schedule((0.0, 1.0), (1.0, 0.0)), "value=0.0"),
    ],
)
def test_a_process_that_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_sigma_of_the_state_is_refused_with_the_reason():
    message = str(state_dependent_sigma("process.name=cir"))
    assert message.startswith("process.name=cir: sigma may depend on time only")
    assert "biased" in message
    assert message.endswith(
        "transform the state so that sigma is constant (Lamperti), as CoxIngersollRoss does"
    )


def test_a_reference_process_needs_a_drift():
    with pytest.raises(TypeError):
        ReferenceProcess(1, 1.0)
