import pytest
import torch

from cdm_ray.config import CPConfig
from cdm_ray.errors import ConfigError
from cdm_ray.objectives.cp import ConsistencyProperty, Starts, forward_units
from cdm_ray.processes.edm import spread
from cdm_ray.processes.oracles import Gaussian
from cdm_ray.randomness import BlockRng, generator
from tests.objectives.fakes import RELEASED, FakeNetwork


def config(**options):
    return CPConfig.model_validate({"weight": 1.0, "fraction": 1.0} | options)


def lanes(count, step=0):
    return BlockRng.for_lanes(7, step, range(count), "cpu")


def starts_of(network, x, sigma, class_labels=None, augment_labels=None):
    denoised = network(x, sigma)
    network.calls.clear()
    return Starts(x, sigma, denoised, class_labels, augment_labels)


def noisy(n, sigma, shape=(1, 2, 2), seed=0):
    gen = generator(11, seed)
    clean = Gaussian(0.0, 0.25).sample(torch.randn(n, *shape, generator=gen))
    return clean + spread(sigma, clean) * torch.randn(n, *shape, generator=gen)


def standard_errors_off(values, expected):
    return abs(values.mean() - expected).item() / (values.std() / len(values) ** 0.5).item()


def two_slopes(sigma):
    """Denoises by 0.5 at sigma = 1, by 0.8 below 0.99: breaks CP in a known way."""
    return torch.where(sigma > 0.99, 0.5, 0.8)


@pytest.mark.parametrize("sigma_weight", ["none", "edm"])
def test_value_is_unbiased_for_the_squared_consistency_error(sigma_weight):
    """One ancestral step from sigma = 1: E[x' | x] = D + r^2 (x - D), and sigma' = 1 - window U
    is drawn; the average over U of (0.8 E[x'] - 0.5 x)^2 is a polynomial, integrated finely."""
    n, x_value = 200_000, 2.0
    network = FakeNetwork(two_slopes).requires_grad_(False)
    x = torch.full((n, 1), x_value)
    starts = starts_of(network, x, torch.ones(n))
    told = ConsistencyProperty(config(window=0.5, sigma_weight=sigma_weight), 0.5)(
        network, starts, lanes(4)
    )
    r = 1 - 0.5 * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    slope = torch.where(r > 0.99, 0.5, 0.8)
    expected = ((slope * (0.5 + r**2 * 0.5) - 0.5) * x_value).square().mean()
    weight = (1 + 0.25) / 0.25 if sigma_weight == "edm" else 1.0
    assert standard_errors_off(told, weight * expected) < 3
    assert (told < 0).any()


@pytest.mark.parametrize("step_kind", ["ancestral", "euler_maruyama"])
def test_exact_denoiser_of_a_gaussian_has_the_value_that_the_step_leaves(step_kind):
    """0 for the ancestral step, the square of (s^2/u)(d^2/u') x for one of Euler-Maruyama."""
    n = 200_000
    sigma = torch.full((n,), 0.5)
    network = FakeNetwork().requires_grad_(False)
    x = noisy(n, sigma, (1,))
    consistency = ConsistencyProperty(config(window=0.6, step_kind=step_kind), 0.5)
    told = consistency(network, starts_of(network, x, sigma), lanes(4))
    u, d = 0.5, 0.5 * 0.6 * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    gap = 0.25 / u * d**2 / (0.25 + (0.5 - d) ** 2)
    expected = 0.0 if step_kind == "ancestral" else u * gap.square().mean()
    assert standard_errors_off(told, expected) < 3
    if step_kind == "euler_maruyama":
        assert standard_errors_off(told, 0.0) > 10


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"window": 0.25}, 0.75, 1.0),
        ({"window": 1.0}, 0.0, 1.0),
        ({"window": 0.05, "window_kind": "absolute"}, None, None),
    ],
)
def test_window_is_uniform_below_sigma(options, low, high):
    sigma = torch.logspace(-1, 1, 3).repeat_interleave(40_000)
    drawn = ConsistencyProperty(config(sigma_min=1e-6, **options), 0.5).draw_ends(sigma, lanes(4))
    share = drawn / sigma
    if low is None:
        share, low, high = drawn - sigma, -0.05, 0.0
    for level in sigma.unique():
        told = share[sigma == level]
        # extremes of 40,000 uniform draws; mean and spread within 4 standard errors, and rounding
        assert told.min() == pytest.approx(low, abs=1e-3 * (high - low) + 1e-6)
        assert told.max() == pytest.approx(high, abs=1e-3 * (high - low) + 1e-6)
        assert told.mean() == pytest.approx((low + high) / 2, abs=4 * (high - low) / 12**0.5 / 200)
        assert told.std() == pytest.approx((high - low) / 12**0.5, rel=0.02)


def test_no_end_lies_below_sigma_min_or_above_its_start():
    sigma = torch.tensor([0.001, 0.002, 0.0021, 0.01, 1.0]).repeat_interleave(1000)
    for options in ({"window": 1.0}, {"window": 0.05, "window_kind": "absolute"}):
        drawn = ConsistencyProperty(config(**options), 0.5).draw_ends(sigma, lanes(4))
        assert (drawn <= sigma).all()
        assert (drawn >= torch.minimum(sigma, torch.tensor(0.002))).all()
        assert torch.equal(drawn[:2000], sigma[:2000])


class SmallestDrop(BlockRng):
    """Draws the uniform number that makes the smallest step down."""

    def uniform(self, *shape):
        return torch.full(shape, 1 - 2**-24)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("step_kind", ["ancestral", "euler_maruyama"])
def test_pairs_that_fall_together_count_nothing_and_are_finite(step_kind, steps):
    consistency = ConsistencyProperty(
        config(rollout_steps=steps, step_kind=step_kind, sigma_weight="edm"), 0.5
    )
    network = FakeNetwork()
    for sigma, rng in (
        (torch.logspace(-4, -2.7, 8), lanes(2)),
        (torch.logspace(-2.6, 1.5, 8), SmallestDrop(lanes(2).generators)),
    ):
        network.zero_grad()
        values = consistency(network, starts_of(network, noisy(8, sigma), sigma), rng)
        values.sum().backward()
        # squares of rounding errors, times w(sigma) of at most 1 / 0.0001^2
        assert values.abs().max() < 1e-4
        assert network.scale.grad.isfinite()


def test_rows_that_take_part_are_the_first_of_each_lane():
    network, sigma = FakeNetwork(), torch.linspace(0.5, 1.5, 12)
    x = noisy(12, sigma)
    consistency = ConsistencyProperty(config(fraction=0.5), 0.5)
    rows = [0, 1, 4, 5, 8, 9]
    assert consistency.taking_part(12, lanes(3)).nonzero().flatten().tolist() == rows
    consistency(network, starts_of(network, x, sigma), lanes(3))
    (end,) = network.calls
    one, two = copies(end.sigma, 3)
    assert (one <= sigma[rows]).all()
    assert (one >= 0.75 * sigma[rows]).all()
    assert torch.equal(one, two)


def copies(ends, blocks):
    """What the two rollouts of each row gave, in the order of the rows."""
    return [end.flatten(0, 1) for end in ends.unflatten(0, (blocks, 2, -1)).unbind(1)]


def test_two_rollouts_are_independent():
    network, sigma = FakeNetwork(), torch.full((4000,), 1.0)
    starts = starts_of(network, torch.zeros(4000, 1), sigma)
    ConsistencyProperty(config(), 0.5)(network, starts, lanes(4))
    one, two = (end.flatten() for end in copies(network.calls[0].x, 4))
    # 4 standard errors of a correlation coefficient
    assert torch.corrcoef(torch.stack([one, two]))[0, 1].abs() < 4 / 4000**0.5


def test_rollout_and_ends_see_the_labels_and_no_dropout():
    network, sigma = FakeNetwork(p=0.5), torch.ones(8)
    labels, augment = torch.eye(8), torch.arange(16.0).view(8, 2)
    starts = starts_of(network, noisy(8, sigma), sigma, labels, augment)
    ConsistencyProperty(config(fraction=0.5, rollout_steps=3), 0.5)(network, starts, lanes(2))
    rows = [0, 1, 0, 1, 4, 5, 4, 5]
    assert len(network.calls) == 3
    for call in network.calls:
        assert torch.equal(call.class_labels, labels[rows])
        assert torch.equal(call.augment_labels, augment[rows])
        assert call.dropout is None


def test_dropout_in_every_pass_if_asked_for():
    network, sigma = FakeNetwork(p=0.5), torch.ones(8)
    starts = starts_of(network, noisy(8, sigma) + 100, sigma)
    cp = config(rollout_steps=3, dropout=True, fraction=1)
    ConsistencyProperty(cp, 0.5)(network, starts, lanes(2))
    assert len(network.calls) == 3
    for call in network.calls:
        assert 0.2 < (call.result == 0).float().mean() < 0.8


def test_rollout_starts_from_x_and_visits_the_levels_in_between():
    network, sigma = FakeNetwork(), torch.ones(4)
    x = noisy(4, sigma)
    cp = config(rollout_steps=5, step_kind="euler_maruyama", reuse_d0=False)
    ConsistencyProperty(cp, 0.5)(network, starts_of(network, x, sigma), lanes(2))
    assert torch.equal(network.calls[0].x, x[[0, 1, 0, 1, 2, 3, 2, 3]])
    visited = torch.stack([call.sigma for call in network.calls])
    assert torch.equal(visited[0], torch.ones(8))
    roots = visited.double() ** (1 / 7)
    # evenly spaced in sigma^(1/7), as float32 tells it
    torch.testing.assert_close(
        roots.diff(dim=0), roots.diff(dim=0)[:1].expand(5, 8), rtol=1e-3, atol=1e-7
    )


@pytest.mark.parametrize(
    ("gradient", "start", "end"),
    [("low", False, True), ("high", True, False), ("both", True, True)],
)
def test_only_the_chosen_side_learns(gradient, start, end):
    network, sigma = FakeNetwork(), torch.ones(8)
    starts = starts_of(network, noisy(8, sigma), sigma)
    d0 = starts.denoised.detach().requires_grad_()
    starts = Starts(starts.x, sigma, d0, None, None)
    values = ConsistencyProperty(config(gradient=gradient), 0.5)(network, starts, lanes(2))
    values.sum().backward()
    ends = copies(network.calls[-1].result, 2)
    assert (d0.grad is not None) == start
    assert (network.scale.grad is not None) == end
    if start:
        torch.testing.assert_close(d0.grad, 2 * d0.detach() - ends[0] - ends[1])
    if end:
        one, two = (e - d0.detach() for e in ends)
        torch.testing.assert_close(network.scale.grad, (ends[0] * two + ends[1] * one).sum())


def test_regression_trains_the_start_towards_one_rollout():
    network, sigma = FakeNetwork(), torch.ones(8)
    starts = starts_of(network, noisy(8, sigma), sigma)
    d0 = starts.denoised.detach().requires_grad_()
    cp = config(estimator="regress", gradient="high")
    values = ConsistencyProperty(cp, 0.5)(
        network, Starts(starts.x, sigma, d0, None, None), lanes(2)
    )
    values.sum().backward()
    (end,) = network.calls
    assert end.rows == 8
    torch.testing.assert_close(d0.grad, 2 * (d0.detach() - end.result))
    assert network.scale.grad is None


def test_averaged_weights_drive_the_rollouts_and_only_them():
    live, averaged, sigma = FakeNetwork(), FakeNetwork(scale=0.5), torch.ones(8)
    cp = config(rollout_weights="ema", reuse_d0=False, rollout_steps=2)
    consistency = ConsistencyProperty(cp, 0.5, averaged)
    consistency(live, starts_of(live, noisy(8, sigma), sigma), lanes(2)).sum().backward()
    assert [call.grad for call in averaged.calls] == [False, False]
    assert [call.grad for call in live.calls] == [True]
    assert averaged.scale.grad is None


def test_reusing_d0_changes_the_cost_and_not_the_value():
    network, sigma = FakeNetwork(), torch.linspace(0.1, 2, 8)
    x = noisy(8, sigma)
    told = {}
    for reuse in (True, False):
        consistency = ConsistencyProperty(config(reuse_d0=reuse, rollout_steps=3), 0.5)
        starts = starts_of(network, x, sigma)
        told[reuse] = consistency(network, starts, lanes(2)), len(network.calls)
    assert torch.equal(told[True][0], told[False][0])
    assert (told[True][1], told[False][1]) == (3, 4)


@pytest.mark.parametrize("dropout", [False, True])
def test_blocks_own_their_draws(dropout):
    network, sigma = FakeNetwork(p=0.3), torch.linspace(0.1, 2, 16)
    x, cp = noisy(16, sigma), config(fraction=0.5, rollout_steps=2, dropout=dropout)
    consistency = ConsistencyProperty(cp, 0.5)
    together = consistency(network, starts_of(network, x, sigma), lanes(4))
    for half in range(2):
        rows = slice(8 * half, 8 * half + 8)
        rng = BlockRng.for_lanes(7, 0, range(2 * half, 2 * half + 2), "cpu")
        apart = consistency(network, starts_of(network, x[rows], sigma[rows]), rng)
        torch.testing.assert_close(apart, together[4 * half : 4 * half + 4])


def test_cost_in_forward_passes():
    assert forward_units(config(weight=0.0)) == 3
    assert forward_units(config(fraction=0.25)) == 4.5
    assert forward_units(config(**RELEASED)) == 19


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"rollout_weights": "ema", "reuse_d0": False}, None, "ema without a rollout_model"),
        ({}, FakeNetwork(), "live with a rollout_model"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, model, message):
    with pytest.raises(ConfigError, match=message):
        ConsistencyProperty(config(**options), 0.5, model)


def test_a_share_of_no_image_is_refused():
    network, sigma = FakeNetwork(), torch.ones(8)
    consistency = ConsistencyProperty(config(fraction=0.1), 0.5)
    with pytest.raises(ConfigError, match="cp.fraction=0.1 of 4 images per lane is none"):
        consistency(network, starts_of(network, noisy(8, sigma), sigma), lanes(2))
