"""The numbers behind the figures of bridges, and that the figures show them; sigma is 0.7."""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_ray.evaluation import bridge_course
from cdm_ray.evaluation.bridge_course import course, course_figure
from cdm_ray.evaluation.bridge_figures import (
    QUANTILES,
    bridge_drift,
    bridge_figures,
    drift_figure,
    drift_scatter,
    index_at,
    marginals_figure,
    paths_figure,
    quantile_bands,
    shown_range,
    true_paths,
)
from cdm_ray.evaluation.bridge_truth import GaussianTruth
from cdm_ray.evaluation.figures import BLUE, ORANGE
from cdm_ray.processes.bridge import Bridge
from cdm_ray.processes.references import (
    Brownian,
    Cell,
    CoxIngersollRoss,
    DoubleWell,
    MuellerBrown,
    OrnsteinUhlenbeck,
)
from cdm_ray.processes.simulation import Paths, simulate

SIGMA, RATE, DURATION = 0.7, 2.0, 1.5
NORMAL_QUANTILES = np.array([-1.6448536, -0.6744898, 0, 0.6744898, 1.6448536])


def t64(*values):
    return torch.tensor(values, dtype=torch.float64)


def linear_bridge(dim):
    process = OrnsteinUhlenbeck(dim, SIGMA, RATE)
    return Bridge(process, t64(1.0, *[0.0] * (dim - 1)), t64(*[-0.5] * dim), DURATION)


def truth_of(bridge):
    return GaussianTruth(bridge.process, bridge.end, bridge.duration)


class ScoreOnly:
    """A truth that, as a grid's, cannot sample."""

    def __init__(self, truth):
        self.log_density, self.score = truth.log_density, truth.score


def guided(bridge):
    """The score whose bridge drift is that of a Brownian bridge."""

    def score(x, t):
        left = (bridge.duration - t).clamp(min=1e-3).reshape(-1, 1)
        sigma = bridge.process.sigma(t).to(x).reshape(-1, 1)
        return ((bridge.end.to(x) - x) / left - bridge.process.drift(x)) / sigma**2

    return score


def model_paths(bridge, score, steps=30, count=60, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn((steps, count, bridge.process.dim), generator=generator, dtype=dtype)
    start = bridge.start.to(dtype).expand(count, -1)
    drift = bridge_drift(bridge, score)
    return simulate(drift, bridge.process, start, bridge.times(steps), noise, pinned=True)


def lines(figure, colour, style):
    return [
        line
        for axes in figure.axes
        for line in axes.lines
        if line.get_color() == colour and line.get_linestyle() == style
    ]


def titles(figure):
    return " ".join([figure.get_suptitle(), *(axes.get_title("left") for axes in figure.axes)])


def labels(figure):
    return [axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes]


CELL = Bridge(Cell(0.1), t64(0.1, -0.1), t64(2.0, -0.1), 4.0)
WELL = Bridge(DoubleWell(SIGMA, 3.0), t64(1.0), t64(-1.0), DURATION)
MUELLER_BROWN = Bridge(MuellerBrown(3.0), t64(-0.558, 1.442), t64(0.624, 0.028), 0.05)


@pytest.mark.parametrize(
    ("bridge", "known"),
    [(linear_bridge(1), True), (CELL, False)],
    ids=["1-D", "2-D without potential or truth"],
)
def test_figures_are_png_files_and_need_no_pyplot(bridge, known, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    score = guided(bridge)
    paths = model_paths(bridge, score, dtype=torch.float32)  # as networks have it
    files = bridge_figures(bridge, score, paths, truth_of(bridge) if known else None, tmp_path)
    assert set(files) == {"paths", "marginals", "drift"}
    for name, path in files.items():
        assert path == tmp_path / f"{name}.png"
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.size[0] > 550


@pytest.mark.parametrize(
    ("bridge", "background", "panels"),
    [
        (WELL, "", 2),
        (MUELLER_BROWN, "over the potential", 2),
        (CELL, "over the stream of the reference drift", 1),
        (Bridge(Brownian(1, SIGMA), t64(0.0), t64(1.0), 1.0), "", 1),
        (Bridge(Brownian(2, SIGMA), t64(0.0, 0.0), t64(1.0, 1.0), 1.0), "", 1),
        (linear_bridge(5), "the first two of 5 coordinates", 1),
    ],
    ids=["well", "mueller-brown", "cell", "brownian", "brownian 2-D", "many"],
)
def test_paths_are_shown_over_the_potential_where_there_is_one(bridge, background, panels):
    """A side panel in 1-D, contours with a colour bar in 2-D."""
    figure = paths_figure(bridge, model_paths(bridge, guided(bridge)))
    assert background in titles(figure)
    assert len(figure.axes) == panels
    assert ("potential" in str([titles(figure), *labels(figure)])) == (panels == 2)


def test_the_same_model_gives_the_same_bytes(tmp_path):
    bridge = linear_bridge(5)
    score = guided(bridge)
    paths = model_paths(bridge, score)
    (tmp_path / "again").mkdir()
    first = bridge_figures(bridge, score, paths, truth_of(bridge), tmp_path)
    torch.manual_seed(5)  # of no influence
    second = bridge_figures(bridge, score, paths, truth_of(bridge), tmp_path / "again")
    for name in first:
        assert first[name].read_bytes() == second[name].read_bytes()


def test_quantile_bands_of_normal_states_are_those_of_the_normal_distribution():
    scales, means = np.array([0.5, 3.0]), np.array([1.0, -2.0])
    draws = np.random.default_rng(0).standard_normal((2, 200_000))
    bands = quantile_bands(means[:, None] + scales[:, None] * draws)
    assert bands.shape == (len(QUANTILES), 2)
    # The 5 % quantile of 200,000 has the standard error 0.0047 scale, the others less.
    assert np.abs((bands - means) / scales - NORMAL_QUANTILES[:, None]).max() < 0.02


@pytest.mark.parametrize("exact", [True, False], ids=["closed form", "simulated"])
def test_true_paths_have_the_marginals_of_the_bridge(exact):
    bridge = linear_bridge(2)
    truth = truth_of(bridge)
    like = model_paths(bridge, guided(bridge), steps=200, count=2000)
    found = true_paths(bridge, truth if exact else ScoreOnly(truth), like)
    assert found.states.shape == (201, 1000, 2)
    assert found.times is like.times
    # A last step with the full noise would miss the end by 0.06.
    assert (found.states[-1] - bridge.end).abs().max() < 0.02
    # X_t of the bridge from x to y is normal: the product of both transition densities.
    t, k = DURATION / 2, 100
    v = SIGMA**2 * -math.expm1(-2 * RATE * t) / (2 * RATE)
    decay = math.exp(-RATE * t)
    variance = v / (1 + decay**2)
    means = (decay * (bridge.start + bridge.end) / (1 + decay**2)).numpy()
    for mean, states in zip(means, found.states[k].numpy().T, strict=True):
        # Of 1000 paths: four standard errors of the mean, and of the standard deviation; 200 Euler
        # steps are off by less than half of the second.
        assert abs(states.mean() - mean) < 4 * math.sqrt(variance / 1000)
        assert states.std() == pytest.approx(math.sqrt(variance), rel=4 / math.sqrt(2000))


def test_true_paths_are_as_many_as_the_models_in_their_dtype():
    bridge = linear_bridge(1)
    like = model_paths(bridge, guided(bridge), count=7, dtype=torch.float32)
    for truth in (truth_of(bridge), ScoreOnly(truth_of(bridge))):
        states = true_paths(bridge, truth, like).states
        assert states.shape == (31, 7, 1)
        assert states.dtype == torch.float32


def test_the_shown_range_is_that_of_98_percent_widened_by_15_percent_on_each_side():
    values = np.linspace(-100, 100, 20_001)
    outliers = np.array([1e6, -1e6])
    low, high = shown_range(np.concatenate((values, outliers)))
    assert low == pytest.approx(-98 - 0.15 * 196, rel=1e-3)
    assert high == pytest.approx(98 + 0.15 * 196, rel=1e-3)
    assert shown_range(np.full(5, 3.0)) == (2.0, 4.0)


def test_the_drift_is_shown_where_the_paths_are_at_that_time():
    bridge = linear_bridge(1)
    score = guided(bridge)
    paths = model_paths(bridge, score)
    figure = drift_figure(bridge, score, paths, truth_of(bridge))
    for axes, share in zip(figure.axes, (0.1, 0.4, 0.7, 0.9), strict=True):
        k = round(share * 30)
        learned, exact = axes.lines
        assert axes.get_title("left") == f"t = {share * DURATION:.3g}"
        low, high = shown_range(paths.states[k].numpy())
        x = learned.get_xdata()
        assert (x[0], x[-1]) == (pytest.approx(low), pytest.approx(high))
        # The drift of both, not their scores or controls.
        left = DURATION * (1 - share)
        np.testing.assert_allclose(learned.get_ydata().ravel(), (-0.5 - x) / left, rtol=1e-9)
        decay = math.exp(-RATE * left)
        control = 2 * RATE * decay * (-0.5 - decay * x) / (1 - decay**2)
        np.testing.assert_allclose(exact.get_ydata().ravel(), -RATE * x + control, atol=1e-9)


@pytest.mark.parametrize("dim", [1, 2])
def test_without_a_truth_nothing_is_dashed_or_called_exact(dim):
    bridge = linear_bridge(dim)
    score = guided(bridge)
    paths, truth = model_paths(bridge, score), truth_of(bridge)
    exact = true_paths(bridge, truth, paths)
    known = [marginals_figure(bridge, paths, exact), drift_figure(bridge, score, paths, truth)]
    unknown = [marginals_figure(bridge, paths, None), drift_figure(bridge, score, paths, None)]
    assert len(lines(known[0], ORANGE, "--")) == len(QUANTILES) * dim
    assert len(lines(known[1], ORANGE, "--")) == (4 if dim == 1 else 0)
    for figure in known:
        assert "exact" in titles(figure)
    for figure in unknown:
        assert not lines(figure, ORANGE, "--")
        assert "exact" not in str([titles(figure), *labels(figure)])


def test_the_exact_score_is_on_the_line_and_an_error_of_the_score_counts_sigma_squared():
    bridge = linear_bridge(2)
    truth = truth_of(bridge)

    def wrong(x, t):
        return truth.score(x, t.item()) + 0.1

    paths = model_paths(bridge, wrong)
    cloud = drift_scatter(bridge, wrong, paths, truth)
    assert cloud.learned.shape == cloud.compared.shape == (len(cloud.times), 2)
    np.testing.assert_allclose(cloud.learned - cloud.compared, 0.1 * SIGMA**2, rtol=1e-9)
    assert cloud.times.max() == pytest.approx(0.9 * DURATION)
    against = drift_scatter(bridge, wrong, paths, None)
    # The reference's drift stays within what the paths reach; the bridge's does not.
    reach = RATE * paths.states.abs().max().item()
    assert np.abs(against.compared).max() <= reach < np.abs(against.learned).max()


def test_of_many_coordinates_the_title_says_which_are_shown():
    bridge = linear_bridge(5)
    figure = marginals_figure(bridge, model_paths(bridge, guided(bridge)), None)
    assert "the first two of 5 coordinates" in titles(figure)


def test_the_potential_is_shown_up_to_what_most_of_the_paths_reach():
    """Mueller and Brown's reaches thousands where one of the paths goes."""
    bridge, share = MUELLER_BROWN, torch.linspace(0, 1, 50).double()[:, None]
    states = bridge.start + share * (bridge.end - bridge.start)
    states = states[:, None].repeat(1, 12, 1)
    states[25, 0] = t64(1.0, 2.0)
    along = bridge.process.potential(states)
    assert along.max() > 1000
    figure = paths_figure(bridge, Paths(states, bridge.times(49)))
    lowest, highest = figure.axes[1].get_ylim()  # of the colour bar
    assert lowest <= along.min()
    assert along[:, 1].quantile(0.9) < highest < 200


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_times_of_drifts_are_before_the_last(share):
    paths = Paths(torch.zeros(21, 1, 1), torch.linspace(0, 4, 21))
    assert index_at(paths, share) == min(round(20 * share), 19)


def points():
    return [
        {
            "step": 100 * i,
            "metrics": {
                "kl_from_truth": 1 / i,
                "kl_from_truth_se": 0.3,
                "cost": 6 + 1 / i,
                "cost_se": 0.1,
                "ess": 0.5,
                "other": 1.0,
            },
        }
        for i in (1, 2, 3)
    ]


def test_a_course_has_what_was_measured_and_is_finite():
    found = [
        {"step": 1, "metrics": {"cost": 3.0}},
        {"step": 2, "metrics": {"ess": 0.5}},
        {"step": 3, "metrics": {"cost": float("nan"), "cost_se": 0.1}},
        {"step": 4, "metrics": {"cost": 2.0, "cost_se": 0.1}},
    ]
    assert course(found, "cost") == {1: (3.0, 0.0), 4: (2.0, 0.1)}


def test_courses_are_drawn_the_same_each_time_and_only_where_there_is_data(tmp_path):
    for name in ("a.png", "b.png"):
        course_figure(points(), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    less = [{"step": p["step"], "metrics": {"cost": 1.0}} for p in points()]
    course_figure(less, tmp_path / "one.png")
    with Image.open(tmp_path / "a.png") as three, Image.open(tmp_path / "one.png") as one:
        assert three.size[0] == 3 * one.size[0]


@pytest.mark.parametrize("values", [(0.0,), (-0.1, 0.5)])
def test_a_divergence_that_is_not_positive_does_not_break_the_log_axis(values, tmp_path):
    found = [{"step": i, "metrics": {"kl_to_truth": value}} for i, value in enumerate(values)]
    course_figure(found, tmp_path / "course.png")
    assert (tmp_path / "course.png").exists()


@pytest.fixture
def course_axes(tmp_path, monkeypatch):
    """Draws a course and returns its axes."""

    def draw(found):
        shown = []
        monkeypatch.setattr(bridge_course, "save_figure", lambda figure, path: shown.append(figure))
        course_figure(found, tmp_path / "course.png")
        shown[0].canvas.draw()
        return shown[0].axes

    return draw


def test_legends_of_a_course_are_beside_the_curves_and_a_share_of_1_is_inside(course_axes):
    found = points()
    for point in found:
        more = {"kl_to_truth": 0.1, "log_p_bound": -1.0, "log_p_truth": -0.9, "ess": 1.0}
        point["metrics"] |= more
    kl, cost, bound, share = course_axes(found)
    for axes in (kl, bound):
        assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1
    assert cost.get_legend() is None
    assert share.get_ylim()[1] > 1


def labelled(axes):
    low, high = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    return [label.get_text() for tick, label in ticks if low <= tick <= high]


def test_a_log_axis_is_labelled_with_numbers_over_less_than_a_decade_and_with_powers_over_many(
    course_axes,
):
    def axis(*values):
        found = [{"step": i, "metrics": {"kl_to_truth": v}} for i, v in enumerate(values)]
        return labelled(course_axes(found)[0])

    assert axis(0.15, 0.4) == ["0.2", "0.3", "0.5"]
    assert all("10^" in label for label in axis(1e-4, 10.0))


def test_a_course_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 points without any metric"):
        course_figure([{"step": 1, "metrics": {"loss": 1.0}}], tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


CIR = CoxIngersollRoss(rate=1.0, mean=2.0, volatility=0.5)


@pytest.mark.parametrize(
    ("bridge", "shown", "not_shown"),
    [
        (linear_bridge(1), "state x", "volatility"),
        (
            Bridge(CIR, CIR.to_lamperti(t64(2.0)), CIR.to_lamperti(t64(3.0)), 1.0),
            "y = 2√x / volatility",
            "state x",
        ),
    ],
    ids=["ou", "cir"],
)
def test_the_axes_of_all_figures_tell_whether_states_are_those_of_lamperti(
    bridge, shown, not_shown
):
    score = guided(bridge)
    paths = model_paths(bridge, score, steps=100)
    for figure in (
        paths_figure(bridge, paths),
        marginals_figure(bridge, paths, None),
        drift_figure(bridge, score, paths, None),
    ):
        told = " ".join(labels(figure))
        assert shown in told
        assert not_shown not in told


def test_model_and_truth_have_their_colours():
    bridge = linear_bridge(1)
    paths = model_paths(bridge, guided(bridge))
    figure = marginals_figure(bridge, paths, true_paths(bridge, truth_of(bridge), paths))
    (median,) = lines(figure, BLUE, "-")
    np.testing.assert_allclose(median.get_ydata(), np.median(paths.states[:, :, 0], axis=1))
