import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cdm_ray.errors import ConfigError
from cdm_ray.evaluation import grid_truth
from cdm_ray.evaluation.backward_grid import Grid, Problem, gradient, log_brownian
from cdm_ray.evaluation.grid_schemes import finite_differences, kernel_convolutions
from cdm_ray.evaluation.grid_truth import solve
from cdm_ray.processes.references import Cell, DoubleWell, ReferenceProcess, Schedule

WELL_GRID = Grid((-2.2,), (2.2,), (401,), steps=400, slices=100)


class Linear(ReferenceProcess):
    """b = -rate x."""

    def __init__(self, dim, sigma, rate):
        super().__init__(dim, sigma)
        self.rate = rate

    def drift(self, x):
        return -self.rate * x


class WellTimesLinear(ReferenceProcess):
    """A double well of height v along the first axis and b = -rate y along the second."""

    def __init__(self, sigma, v, rate):
        super().__init__(2, sigma)
        self.v, self.rate = v, rate

    def drift(self, x):
        first, second = x.unbind(1)
        return torch.stack([-4 * self.v * first * (first**2 - 1), -self.rate * second], dim=1)


class Rotation(ReferenceProcess):
    """b = (w y - x, -w x - y): no potential, but Gaussian, and isotropic since it turns."""

    def __init__(self, sigma, w):
        super().__init__(2, sigma)
        self.matrix = torch.tensor([[-1.0, w], [-w, -1.0]], dtype=torch.float64)

    def drift(self, x):
        return x @ self.matrix.T


def t64(*values):
    return torch.tensor(values, dtype=torch.float64)


def gaussian(x, end, tau, sigma, rate, turn=None):
    """log p and g of b = -rate x, or with dX = M X dt of rate 1 and exp(M tau) = `turn`."""
    turn = math.exp(-rate * tau) * torch.eye(len(end)).double() if turn is None else turn
    variance = sigma**2 * (tau if rate == 0 else -math.expm1(-2 * rate * tau) / (2 * rate))
    miss = end - x @ turn.T
    log_p = -miss.square().sum(1) / (2 * variance) - len(end) / 2 * math.log(2 * math.pi * variance)
    return log_p, miss @ turn / variance


def problem_of(process, end, duration):
    def drift(x):
        return process.drift(torch.from_numpy(x)).numpy()

    return Problem(drift, process.sigma(t64(0.0)).item(), tuple(end), duration)


def well_problem(v):
    return problem_of(DoubleWell(1.0, v), (-1.0,), 1.0)


def states_between(start, end, t, duration, spread, count=200):
    """Where a bridge of a process with little drift is at t, with 1.5 times its standard
    deviation."""
    mean = start + (end - start) * t / duration
    noise = torch.randn(count, len(start), generator=torch.Generator().manual_seed(1)).double()
    return mean + 1.5 * spread * math.sqrt(t * (duration - t) / duration) * noise


@pytest.fixture(scope="module")
def wells(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wells")
    return {v: solve(DoubleWell(1.0, v), t64(1), t64(-1), 1.0, WELL_GRID, folder) for v in (3, 5)}


@pytest.mark.parametrize("rate", [0.0, 2.0])
@pytest.mark.parametrize("dim", [1, 2])
def test_gaussian_processes_have_their_closed_forms(dim, rate, tmp_path):
    sigma, duration = 0.6, 0.8
    start, end = t64(0.7, -0.3)[:dim], t64(-0.4, 0.5)[:dim]
    grid = Grid((-2.2,) * dim, (2.2,) * dim, (109,) * dim, steps=60, slices=30)
    truth = solve(Linear(dim, sigma, rate), start, end, duration, grid, tmp_path)
    # 0.003 is before the last slice, and 0.401 between two.
    for t in (0.0, 0.401, 0.72, duration - 0.003):
        x = states_between(start, end, t, duration, sigma)
        log_p, score = gaussian(x, end, duration - t, sigma, rate)
        # Schemes of fourth order at 30 steps per time constant leave 1e-4.
        assert (truth.log_density(x, t) - log_p).abs().max() < 1e-4
        size = score.norm(dim=1).clamp(min=1)
        assert ((truth.score(x, t) - score).norm(dim=1) / size).max() < 2e-4
    assert truth.trusted(x, t).all()


def test_a_drift_without_potential_has_its_closed_form(tmp_path):
    """In both schemes: they are compared inside, and one with the truth here."""
    sigma, duration, w = 0.7, 0.6, 1.5
    start, end = t64(0.6, 0.2), t64(-0.3, 0.4)
    grid = Grid((-2.0, -2.0), (2.0, 2.0), (81, 81), steps=40, slices=20)
    process = Rotation(sigma, w)
    truth = solve(process, start, end, duration, grid, tmp_path)
    for t in (0.0, 0.31):
        x = states_between(start, end, t, duration, sigma)
        turn = torch.linalg.matrix_exp(process.matrix * (duration - t))
        log_p, score = gaussian(x, end, duration - t, sigma, 1.0, turn)
        torch.testing.assert_close(truth.log_density(x, t), log_p, atol=2e-4, rtol=0)
        torch.testing.assert_close(truth.score(x, t), score, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("v", [3.0, 5.0])
def test_the_schemes_agree_in_the_double_well(v):
    """Where a bridge goes, to less than half of what is promised where the truth is trusted."""
    problem, grid = well_problem(v), WELL_GRID
    action, rate = finite_differences(problem, grid)
    convolved = kernel_convolutions(problem, grid)
    x = grid.axes[0]
    for j in (5, 10, 50, 100):
        tau = j / grid.slices
        difference = (
            action + tau * rate[j] + log_brownian(problem, grid.nodes, tau) - convolved[j - 1]
        )
        inner = np.abs(x) < 1.4
        bound = 4e-4 if tau <= 0.1 else 1e-4
        assert np.abs(difference[inner]).max() < bound
        assert np.abs(gradient(grid, difference)[0, inner]).max() < bound


# From 1601 nodes and 1600 steps, where the two schemes differ by less than 1e-6.
@pytest.mark.parametrize(
    ("v", "log_p", "score"), [(3, -4.581934, -0.524377), (5, -7.605424, -0.356453)]
)
def test_double_well_from_one_well_to_the_other(wells, v, log_p, score):
    truth = wells[v]
    assert truth.log_density(t64([1.0]), 0.0).item() == pytest.approx(log_p, abs=2e-5)
    assert truth.score(t64([1.0]), 0.0).item() == pytest.approx(score, abs=1e-4)
    assert truth.coverage > 0.999


def test_errors_fall_by_more_than_four_with_half_the_distance_and_step():
    """Second order at least: what both schemes tend to is their solution on a finer grid."""
    problem, x = well_problem(3.0), slice(30, -30)
    grids = [Grid((-2.0,), (2.0,), (n + 1,), steps=n, slices=10) for n in (120, 240, 480)]
    for scheme in (_finite_differences, kernel_convolutions):
        coarse, middle, fine = (
            scheme(problem, grid)[4, ::n][x] for grid, n in zip(grids, (1, 2, 4), strict=True)
        )
        assert np.abs(coarse - middle).max() > 4 * np.abs(middle - fine).max()
        assert np.abs(middle - fine).max() < 2e-4


def _finite_differences(problem, grid):
    action, rate = finite_differences(problem, grid)
    taus = np.arange(1, grid.slices + 1) / grid.slices * problem.duration
    return np.stack(
        [
            action + tau * q + log_brownian(problem, grid.nodes, tau)
            for tau, q in zip(taus, rate[1:], strict=True)
        ]
    )


def test_the_score_integrates_to_the_log_density(wells):
    x = torch.linspace(-1.4, 1.4, 2801, dtype=torch.float64)[:, None]
    for t in (0.0, 0.505, 0.9, 0.999):
        score, log_p = wells[3].score(x, t)[:, 0], wells[3].log_density(x, t)
        integral = torch.cumulative_trapezoid(score, x[:, 0])
        torch.testing.assert_close(integral, log_p[1:] - log_p[0], atol=1e-4, rtol=1e-6)


def test_the_truth_solves_the_backward_equation_between_slices(wells):
    """d_t log h + b g + (g' + g^2) / 2 = 0, with differences of what is interpolated."""
    truth, step = wells[3], 1e-3
    x, t = torch.linspace(-1.3, 1.3, 27, dtype=torch.float64)[:, None], 0.4237
    in_time = (truth.log_density(x, t + step) - truth.log_density(x, t - step)) / (2 * step)
    score = truth.score(x, t)
    slope = (truth.score(x + step, t) - truth.score(x - step, t)) / (2 * step)
    drift = -12 * x * (x**2 - 1)
    residual = in_time + (drift * score + (slope + score**2) / 2)[:, 0]
    assert residual.abs().max() < 5e-3
    assert (residual - in_time).abs().max() > 1


def test_a_separable_problem_is_the_product_of_its_parts(tmp_path):
    sigma, v, rate, duration = 0.8, 1.5, 1.5, 0.5
    start, end = t64(0.8, 0.3), t64(-0.7, -0.2)
    axes = {"steps": 60, "slices": 30}
    grid = Grid((-2.0, -2.4), (2.0, 2.4), (95, 113), **axes)
    both = solve(WellTimesLinear(sigma, v, rate), start, end, duration, grid, tmp_path)
    one = Grid((-2.0,), (2.0,), (95,), **axes)
    well = solve(DoubleWell(sigma, v), start[:1], end[:1], duration, one, tmp_path)
    for t in (0.0, 0.2, 0.433, 0.49):
        x = states_between(start, end, t, duration, sigma)
        first_log, first = well.log_density(x[:, :1], t), well.score(x[:, :1], t)
        second_log, second = gaussian(x[:, 1:], end[1:], duration - t, sigma, rate)
        kept = both.trusted(x, t)
        assert kept.double().mean() > 0.97
        expected = torch.cat([first, second], dim=1)
        error = (both.score(x, t) - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1)
        assert error[kept].max() < 1e-3
        assert (both.log_density(x, t) - first_log - second_log)[kept].abs().max() < 1e-3


def test_what_depends_on_the_box_is_not_trusted(wells):
    x = t64(-3.0, -2.19, 0.0, 2.19, 3.0)[:, None]
    assert wells[5].trusted(x, 0.0).tolist() == [False, False, True, False, False]
    assert wells[5].score(x, 0.0).isfinite().all()


def test_results_have_the_dtype_of_the_states(wells):
    x = torch.zeros(3, 1)
    assert wells[3].score(x, 0.5).dtype == wells[3].log_density(x, 0.5).dtype == torch.float32
    assert wells[3].score(x, 0.5).shape == (3, 1)
    assert wells[3].log_density(x, 0.5).shape == (3,)


@pytest.mark.parametrize("t", [-0.1, 1.0])
def test_there_is_no_score_at_the_end_or_before_the_start(wells, t):
    with pytest.raises(ValueError, match="0 <= t < 1.0"):
        wells[3].score(torch.zeros(1, 1), t)


SMALL = Grid((-3.0,), (3.0,), (81,), steps=20, slices=10)


def small_solve(folder, sigma=1.0, rate=1.0, end=0.0):
    return solve(Linear(1, sigma, rate), t64(0.5), t64(end), 0.5, SMALL, folder)


def test_a_cached_truth_is_equal_and_is_not_solved_again(tmp_path, monkeypatch):
    first = small_solve(tmp_path)
    monkeypatch.setattr(grid_truth, "finite_differences", None)
    second = small_solve(tmp_path)
    x = torch.linspace(-2, 2, 50, dtype=torch.float64)[:, None]
    for t in (0.0, 0.33):
        assert torch.equal(first.log_density(x, t), second.log_density(x, t))
        assert torch.equal(first.score(x, t), second.score(x, t))
        assert torch.equal(first.trusted(x, t), second.trusted(x, t))
    assert first.coverage == second.coverage


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[::-1]])
def test_a_damaged_cache_is_computed_again(tmp_path, damage):
    first = small_solve(tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    second = small_solve(tmp_path)
    x = torch.linspace(-2, 2, 50, dtype=torch.float64)[:, None]
    assert torch.equal(first.score(x, 0.1), second.score(x, 0.1))
    assert small_solve(tmp_path).coverage == first.coverage


@pytest.mark.parametrize("change", [{"sigma": 0.9}, {"rate": 1.1}, {"end": 0.1}])
def test_another_problem_has_another_cache(tmp_path, change):
    small_solve(tmp_path)
    small_solve(tmp_path, **change)
    assert len(list(tmp_path.iterdir())) == 2


def refused(process, start, end, grid, folder):
    with pytest.raises(ConfigError) as caught:
        solve(process, start, end, 1.0, grid, folder)
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())
    return str(caught.value)


def test_nodes_too_far_apart_for_the_kernel_are_refused_with_the_number_needed(tmp_path):
    process, ends = DoubleWell(1.0, 3.0), (t64(1), t64(-1))
    grid = replace(WELL_GRID, points=(101,))
    assert "raise points to (151,)" in refused(process, *ends, grid, tmp_path)
    # What it says is enough.
    solve(process, *ends, 1.0, replace(WELL_GRID, points=(151,)), tmp_path)


def test_steps_too_long_for_the_drift_are_refused_with_the_number_needed(tmp_path):
    grid = replace(WELL_GRID, steps=20, slices=10)
    message = refused(DoubleWell(1.0, 5.0), t64(1), t64(-1), grid, tmp_path)
    assert "raise steps to 4" in message


def test_schemes_that_disagree_on_the_bridge_are_refused(tmp_path):
    grid = replace(WELL_GRID, points=(101,), steps=50, slices=25)
    message = refused(DoubleWell(1.0, 5.0), t64(1), t64(-1), grid, tmp_path)
    assert "raise points=(101,) and steps=50" in message


def test_a_box_that_bridges_leave_is_refused(tmp_path):
    grid = Grid((-1.2,), (1.2,), (241,), steps=200, slices=50)
    message = refused(Linear(1, 1.0, 0.0), t64(1), t64(-1), grid, tmp_path)
    assert "widen (-1.2,) to (1.2,)" in message


def test_a_solution_that_diverges_is_refused():
    """With little noise log h has kinks between two valleys that these nodes do not resolve."""
    grid = Grid((-1.0, -1.0), (3.0, 1.0), (101, 51), steps=20, slices=10)
    with pytest.raises(ConfigError, match="diverged at time 0.2 of 4"):
        finite_differences(problem_of(Cell(0.1), (2.0, -0.1), 4.0), grid)


@pytest.mark.parametrize(("start", "end", "named"), [(2.5, -1, "start"), (1, -2.2, "end")])
def test_states_outside_of_the_box_are_refused(tmp_path, start, end, named):
    message = refused(DoubleWell(1.0, 3.0), t64(start), t64(end), WELL_GRID, tmp_path)
    assert message.startswith(f"{named}=")


def test_a_sigma_that_varies_is_refused(tmp_path):
    process = Linear(1, Schedule((0.0, 1.0), (1.0, 0.5)), 1.0)
    assert "sigma varies" in refused(process, t64(1), t64(-1), WELL_GRID, tmp_path)


def test_a_drift_that_is_not_finite_in_the_box_is_refused(tmp_path):
    class Pole(Linear):
        def drift(self, x):
            return 1 / (x - 2.2)

    assert "not finite at [2.2]" in refused(Pole(1, 1.0, 0), t64(1), t64(-1), WELL_GRID, tmp_path)


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ({"points": (5,)}, "points"),
        ({"steps": 30, "slices": 20}, "multiple"),
        ({"lower": (3.0,)}, "empty"),
        ({"points": (61, 61)}, "1 or 2 axes"),
    ],
)
def test_grids_whose_numbers_do_not_fit_are_refused(numbers, named):
    with pytest.raises(ConfigError, match=named):
        replace(SMALL, **numbers)


@pytest.mark.parametrize("numbers", [{"points": (60,)}, {"steps": 10}])
def test_a_grid_without_every_other_node_and_step_is_refused(tmp_path, numbers):
    grid = replace(SMALL, **numbers)
    assert "multiple of 2 slices" in refused(Linear(1, 1.0, 1.0), t64(0.5), t64(0), grid, tmp_path)
