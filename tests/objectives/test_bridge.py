"""Targets of control consistency, against the scores of linear bridges in closed form.

The process is b = M x with M a contraction by 2 and a rotation, sigma = 0.7: grad b is not
symmetric and a is not 1, so that a forgotten transpose or sigma shows.
"""

import math
import weakref
from dataclasses import dataclass
from typing import get_args

import pytest
import torch

from cdm_ray.errors import ConfigError
from cdm_ray.networks.control import BridgeControl, ControlNetwork
from cdm_ray.objectives import bridge
from cdm_ray.objectives.bridge import ControlConsistency, Weighting
from cdm_ray.processes.references import Brownian, DoubleWell, ReferenceProcess, Schedule
from cdm_ray.processes.simulation import Paths, simulate

RATE, TURN, SIGMA, T, K = 2.0, 1.5, 0.7, 1.0, 40
A = SIGMA**2
M = torch.tensor([[-RATE, -TURN], [TURN, -RATE]], dtype=torch.float64)
START = torch.tensor([1.0, 0.2], dtype=torch.float64)
END = torch.tensor([-0.6, 0.8], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)
WEIGHTINGS = get_args(Weighting)
VARIATES = ("none", "noise", "innovation")


class Linear(ReferenceProcess):
    def __init__(self, matrix, sigma=SIGMA):
        super().__init__(len(matrix), sigma)
        self.matrix = matrix

    def drift(self, x):
        return x @ self.matrix.T.to(x)


PROCESS = Linear(M)
OTHER = Linear(torch.tensor([[-0.5, 0.3], [-1.0, 0.2]], dtype=torch.float64))
AUXILIARY = {"SC1": PROCESS, "SC2": None, "other": OTHER}


def closed_form(x, t):
    """g of the bridge: X_T given x is normal, with mean exp(M tau) x and variance v."""
    tau = (T - t)[..., None]
    angle, shrink = TURN * tau, (-RATE * tau).exp()
    variance = A * (1 - shrink**2) / (2 * RATE)

    def turned(y, sign):
        s = sign * angle.sin()
        return torch.cat([angle.cos() * y[..., :1] - s * y[..., 1:],
                          s * y[..., :1] + angle.cos() * y[..., 1:]], dim=-1)  # fmt: skip

    return shrink * turned(END - shrink * turned(x, 1), -1) / variance


@dataclass(frozen=True)
class ChainScore:
    """G_k(x) = shift_k - slope_k x: what the Euler chain of the bridge has for g, exactly.

    The fixed point of G_k = J^T (I + S) E G_{k+1}(X') + S G_k, S = (grad b - grad f)^T dt / 2 and
    J = I + f dt + (f dt)^2 / 2 with f for grad f, and
    X' = x + (b + a G_k) dt + noise, from the step that leads to the end. With it targets have no
    error of the grid, and 3 standard errors are 3 standard errors.
    """

    shift: torch.Tensor
    slope: torch.Tensor

    @classmethod
    def of(cls, f, steps=K):
        dt, f = T / steps, torch.zeros_like(M) if f is None else f.matrix
        move = EYE + M * dt
        shifts, slopes = [END / (A * dt)], [move / (A * dt)]
        for _ in range(steps - 1):
            cost = dt / 2 * (M - f).T
            left = (EYE + f * dt + f @ f * dt**2 / 2).T @ (EYE + cost)
            system = EYE + A * dt * left @ slopes[0] - cost
            shifts.insert(0, torch.linalg.solve(system, left @ shifts[0]))
            slopes.insert(0, torch.linalg.solve(system, left @ slopes[0] @ move))
        return cls(torch.stack(shifts), torch.stack(slopes))

    def __call__(self, x, t):
        k = (t * len(self.shift) / T).round().long().expand(x.shape[:-1])
        return self.shift[k] - (self.slope[k] @ x[..., None]).squeeze(-1)


SCORES = {name: ChainScore.of(f) for name, f in AUXILIARY.items()}


def drive(score, steps=K, number=1000, seed=0, process=PROCESS, start=START):
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, number, len(start), generator=rng, dtype=torch.float64)
    times = torch.linspace(0, T, steps + 1, dtype=torch.float64)
    return simulate(
        lambda x, t: process.drift(x) + process.sigma(t).reshape(-1, 1) ** 2 * score(x, t),
        process,
        start.expand(number, -1),
        times,
        noise,
    )


PATHS = {name: drive(score) for name, score in SCORES.items()}
CLOSED_FORM_PATHS = drive(closed_form)


def consistency(transport, weighting, variate="none", **options):
    return ControlConsistency(
        PROCESS, END, AUXILIARY[transport], weighting, variate=variate, window=8, **options
    )


def standard_errors(errors):
    """Means [...] of errors [..., N, d] over paths, in standard errors, the largest of the d."""
    return (errors.mean(-2) / errors.std(-2) * math.sqrt(errors.shape[-2])).abs().amax(-1)


def exact(transport, paths=None):
    """G at X_0 .. X_{K-1}, [K, N, d]."""
    states = (paths or PATHS[transport]).states[:-1]
    times = (paths or PATHS[transport]).times
    return torch.stack([SCORES[transport](x, t) for x, t in zip(states, times, strict=False)])


@pytest.mark.parametrize("transport", AUXILIARY)
def test_the_scores_of_the_chain_tend_to_the_closed_form_with_the_step(transport):
    """So what is unbiased for the chain is unbiased for the bridge up to O(dt)."""
    x = torch.stack([START, END, torch.zeros_like(END), -START])
    gaps = []
    for steps in (200, 400):
        score = ChainScore.of(AUXILIARY[transport], steps)
        at = [torch.tensor(t, dtype=torch.float64) for t in (0.0, 0.3, 0.7)]
        gaps.append(max((score(x, t) - closed_form(x, t)).abs().max().item() for t in at))
    assert gaps[0] < 0.25  # of scores up to 5
    assert gaps[1] == pytest.approx(gaps[0] / 2, rel=0.1)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("transport", AUXILIARY)
def test_targets_are_unbiased_at_the_exact_score(transport, weighting):
    loss = consistency(transport, weighting)
    errors = loss.targets(SCORES[transport], PATHS[transport]) - exact(transport)
    assert errors[-1].abs().max() < 1e-9
    assert standard_errors(errors[[0, K // 3, 3 * K // 4]]).max() < 3


@pytest.mark.parametrize("variate", ["noise", "innovation"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("transport", AUXILIARY)
def test_with_the_variate_targets_of_a_linear_score_have_no_noise(transport, weighting, variate):
    loss = consistency(transport, weighting, variate)
    targets = loss.targets(SCORES[transport], PATHS[transport])
    torch.testing.assert_close(targets, exact(transport), rtol=0, atol=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("transport", ["SC1", "SC2"])
def test_at_the_closed_form_on_a_grid_the_variate_takes_most_of_the_noise(transport, weighting):
    """Here g is not what the chain has, and an error of the grid remains. Spreads over the first
    half without and with the variate have ratios of 15 (endpoint) to 350 (next) for SC1, 13 to 92
    for SC2; with grad g at t_k they would be 2 to 14."""
    spread = {}
    for variate in ("none", "noise"):
        loss = consistency(transport, weighting, variate)
        targets = loss.targets(closed_form, CLOSED_FORM_PATHS)
        errors = (targets - loss.scores(closed_form, CLOSED_FORM_PATHS)[0])[: K // 2]
        spread[variate] = errors.var(1).mean().sqrt().item()
    assert spread["none"] > 10 * spread["noise"]


def by_hand(paths, score, variate, fault=""):
    """Targets of the weighting average, written plainly; SC1 unless a fault is one of SC2."""
    dt, x = T / K, paths.states
    g = [score(x[k], paths.times[k]) for k in range(K)]
    last = x[-3] if fault == "anchor one step early" else x[-2]
    anchor = ((END - last) / dt - last @ M.T) / (1 if fault == "sigma dropped" else A)
    g[-1], targets = anchor, [anchor]
    for k in reversed(range(K - 1)):
        share = (K - k - 1) / (K - k)
        mixed = share * targets[0] + (1 - share) * g[k + 1]
        if variate:
            mixed = mixed + SIGMA * paths.increments[k] @ score.slope[k + 1].T
        later = g[k + 1]
        if variate:
            later = later + SIGMA * paths.increments[k] @ score.slope[k + 1].T
        match fault:
            case "controlled Jacobian":
                moved = mixed + dt * mixed @ (M - A * score.slope[k])
            case "no Jacobian":
                moved = mixed
            case "transposed":
                moved = mixed + dt * mixed @ M.T
            case "SC2":
                moved = mixed + dt / 2 * (g[k] + later) @ M
            case "cost at the beginnings alone":
                moved = mixed + dt * g[k] @ M
            case "wrong sign of the running term":
                moved = mixed - dt / 2 * (g[k] + later) @ M
            case "first order in the Jacobian":
                moved = mixed + dt * mixed @ M
            case _:
                moved = mixed + dt * (mixed + dt / 2 * mixed @ M) @ M
        targets.insert(0, moved)
    return torch.stack(targets)


@pytest.mark.parametrize("variate", ["none", "noise"])
@pytest.mark.parametrize("transport", ["SC1", "SC2"])
def test_targets_are_those_written_by_hand(transport, variate):
    score, paths = SCORES[transport], PATHS[transport]
    targets = consistency(transport, "average", variate).targets(score, paths)
    plain = by_hand(paths, score, variate == "noise", transport)
    torch.testing.assert_close(targets, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("fault", "transport"),
    [
        ("controlled Jacobian", "SC1"),
        ("no Jacobian", "SC1"),
        ("transposed", "SC1"),
        ("sigma dropped", "SC1"),
        ("anchor one step early", "SC1"),
        ("first order in the Jacobian", "SC1"),
        ("wrong sign of the running term", "SC2"),
        ("cost at the beginnings alone", "SC2"),
    ],
)
def test_wrong_targets_are_off_by_many_standard_errors(fault, transport):
    """With the variate, where the right ones have no error at all; 12 standard errors (sigma
    dropped) to hundreds."""
    errors = by_hand(PATHS[transport], SCORES[transport], True, fault) - exact(transport)
    assert standard_errors(errors[[0, K // 3]]).min() > 8


def test_for_brownian_motion_the_anchor_is_the_exact_score():
    process = Brownian(2, SIGMA)
    paths = drive(lambda x, t: (END - x) / (A * (T - t)), process=process)
    anchor = ControlConsistency(process, END).anchor(paths)
    torch.testing.assert_close(anchor, (END - paths.states[-2]) * K / A)


@pytest.mark.parametrize("variate", VARIATES)
def test_without_drift_inclusive_average_is_right_after_one_sweep_from_any_start(variate):
    """Scores that are far off drive the paths: path by path F_k is (end - X_k) / (a (T - t_k))
    less a martingale. Average, with the same shares, only begins to approach it."""
    process = Brownian(2, SIGMA)

    def off(x, t):
        return torch.cat([3 * (x[..., 1:] * 2).sin(), -x[..., :1] * t[..., None] + 1], dim=-1)

    paths = drive(off, process=process)
    left = (T - paths.times[:-1])[:, None, None]
    truth = (END - paths.states[:-1]) / (A * left)
    loss = ControlConsistency(process, END, weighting="inclusive", variate=variate)
    errors = loss.targets(off, paths) - truth
    assert standard_errors(errors[[0, K // 3, 3 * K // 4]]).max() < 3
    if variate == "none":
        kicks = SIGMA * paths.increments
        kicks[-1] = 0  # the last state with a target is X_{K-1}
        martingale = kicks.flip(0).cumsum(0).flip(0) / (A * left)
        torch.testing.assert_close(errors, -martingale, rtol=1e-9, atol=1e-9)
    average = ControlConsistency(process, END, weighting="average", variate=variate)
    assert standard_errors(average.targets(off, paths)[:1] - truth[:1]).min() > 20


def test_the_variate_has_mean_zero_on_paths_of_its_own_scores():
    for variate in ("noise", "innovation"):
        _, terms = consistency("SC2", "average", variate).scores(SCORES["SC2"], PATHS["SC2"])
        assert standard_errors(terms.sum(0)) < 3


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("transport", AUXILIARY)
def test_on_replayed_paths_of_other_scores_only_the_innovation_is_right(transport, weighting):
    score = SCORES[transport]
    replayed = drive(lambda x, t: 0.5 * (score(x, t) + 1), seed=1)
    errors = {
        variate: consistency(transport, weighting, variate).targets(score, replayed)
        - exact(transport, replayed)
        for variate in VARIATES
    }
    assert errors["innovation"].abs().max() < 1e-9
    middle = slice(K // 2, K // 2 + 1)
    assert standard_errors(errors["noise"][middle]).min() > 10


@pytest.mark.parametrize("transport", ["SC1", "SC2"])
def test_the_variate_has_mean_zero_where_the_drift_is_not_linear(transport):
    """The same paths with and without it, one step before the end of a window: grad b at the end
    of a step depends on the step's noise, and so must not meet the variate."""
    process, end = DoubleWell(1.0, 3.0), torch.tensor([-1.0], dtype=torch.float64)

    def score(x, t):
        return (end - x) / (T - t)[..., None] - 2 * (3 * x).sin()

    noise = torch.randn(K, 20000, 1, generator=torch.Generator().manual_seed(3)).double()
    times = torch.linspace(0, T, K + 1, dtype=torch.float64)
    start = torch.ones(20000, 1, dtype=torch.float64)
    paths = simulate(lambda x, t: process.drift(x) + score(x, t), process, start, times, noise)
    auxiliary = process if transport == "SC1" else None
    found = {
        variate: ControlConsistency(
            process, end, auxiliary, "window", window=1, variate=variate
        ).targets(score, paths)
        for variate in ("none", "noise")
    }
    change = found["noise"] - found["none"]
    # all steps but those that touch the anchor, whose score has no bound; one z-score for each
    errors = (change.mean(1) / change.std(1) * math.sqrt(20000))[: K - 3]
    assert errors.abs().max() < 4
    assert errors.square().mean() < 1.7  # 1 expected, of 37 z-scores


class Small(torch.nn.Module):
    """A learned score, small enough to count what its loss keeps."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x, t):
        return self.layer(x) * t[..., None].to(x.dtype)


def bytes_kept(iteration):
    """Most bytes that autograd holds at any time while `iteration` runs."""
    alive, peak = weakref.WeakSet(), 0

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        nonlocal peak
        held = Held(tensor)
        alive.add(held)
        peak = max(peak, sum(other.tensor.nbytes for other in alive))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        iteration()
    return peak


@pytest.mark.parametrize("variate", VARIATES)
@pytest.mark.parametrize("weighting", ["inclusive", "average", "window"])
@pytest.mark.parametrize("transport", ["SC1", "SC2"])
def test_memory_of_the_graph_does_not_grow_with_the_number_of_steps(
    monkeypatch, transport, weighting, variate
):
    # torch.func.vjp refuses the hooks that count; what it keeps is gone when it returns.
    monkeypatch.setattr(bridge, "jacobian_transpose", lambda p, x, v: v @ p.matrix)

    def iteration(steps):
        model = Small().double()
        paths = drive(model, steps=steps, number=16)
        loss = consistency(transport, weighting, variate)
        targets = loss.targets(model, paths)
        assert not paths.states.requires_grad
        assert not targets.requires_grad
        pairs = torch.arange(64)
        loss.loss(model, paths, targets, pairs).mean().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())

    few, many = (bytes_kept(lambda steps=steps: iteration(steps)) for steps in (10, 100))
    assert few == many > 0


def test_the_count_sees_a_graph_through_the_simulation(monkeypatch):
    monkeypatch.setitem(globals(), "simulate", simulate.__wrapped__)
    few, many = (
        bytes_kept(lambda s=s: drive(Small().double(), steps=s, number=16)) for s in (10, 100)
    )
    assert many > 5 * few > 0


def test_the_loss_is_that_of_the_chosen_pairs():
    model = Small().double()
    paths, loss = PATHS["SC2"], consistency("SC2", "average")
    targets = loss.targets(model, paths)
    number = paths.states.shape[1]
    pairs = torch.tensor([0, 3 * number + 7, (K - 1) * number + 1])
    expected = [
        A * (model(paths.states[k, n][None], paths.times[k]) - targets[k, n]).square().sum()
        for k, n in ((0, 0), (3, 7), (K - 1, 1))
    ]
    torch.testing.assert_close(loss.loss(model, paths, targets, pairs), torch.stack(expected))


@pytest.mark.parametrize("transport", AUXILIARY)
def test_chunks_change_nothing(monkeypatch, transport):
    paths = drive(SCORES[transport], number=10)
    for weighting in ("average", "window"):
        loss = consistency(transport, weighting, "innovation")
        whole = loss.targets(SCORES[transport], paths)
        monkeypatch.setattr(bridge, "CHUNK_ROWS", 7)
        torch.testing.assert_close(loss.targets(SCORES[transport], paths), whole)
        monkeypatch.undo()


def test_sigma_may_depend_on_time():
    """Brownian motion with sigma(t): g = (end - x) / int_t^T a; the grid's own sum of a dt makes
    the chain exact."""
    process = Brownian(2, Schedule((0.0, T), (0.5, 1.5)))
    times = torch.linspace(0, T, K + 1, dtype=torch.float64)
    a = (0.5 + times[:-1]) ** 2 * T / K
    left = a.flip(0).cumsum(0).flip(0)

    def score(x, t):
        return (END - x) / left[(t * K / T).round().long()][..., None]

    paths = drive(score, process=process)
    truth = torch.stack([score(x, t) for x, t in zip(paths.states, times[:-1], strict=False)])
    for variate in VARIATES:
        loss = ControlConsistency(process, END, weighting="average", variate=variate)
        errors = loss.targets(score, paths) - truth
        assert errors[-1].abs().max() < 1e-9
        if variate == "none":
            assert standard_errors(errors[[0, K // 3, 3 * K // 4]]).max() < 3
        else:
            assert errors.abs().max() < 1e-9


def test_one_step_has_the_anchor_as_its_only_target():
    paths = drive(lambda x, t: x, steps=1, number=5)
    for weighting in WEIGHTINGS:
        loss = consistency("SC1", weighting, "innovation")
        targets = loss.targets(lambda x, t: x, paths)
        torch.testing.assert_close(targets, loss.anchor(paths)[None])


@pytest.mark.parametrize(
    ("weighting", "variate"), [("inclusive", "innovation"), ("window", "none")]
)
def test_a_short_training_finds_the_score(weighting, variate):
    """rms of sigma (g_theta - g) over the first three quarters of the bridge: 2.84 before, 0.30 and
    0.34 after 120 steps; half as much again is allowed for other machines' rounding."""
    torch.manual_seed(0)
    network = ControlNetwork(2, T, width=32, depth=2, form="gradient")
    process, end = Linear(M.float()), END.float()
    control = BridgeControl(network, process, end, T)
    loss = ControlConsistency(process, end, weighting=weighting, variate=variate, window=4)
    optimizer = torch.optim.Adam(control.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    times, rng = torch.linspace(0, T, 31), torch.Generator().manual_seed(0)
    x = PATHS["SC2"].states[: 3 * K // 4 : 3, :200].flatten(0, 1).float()
    t = PATHS["SC2"].times[: 3 * K // 4 : 3].repeat_interleave(200).float()

    def error():
        with torch.no_grad():
            gap = control.score(x, t) - closed_form(x.double(), t.double())
            return (SIGMA * gap).square().sum(1).mean().sqrt().item()

    before = error()
    for _ in range(120):
        noise = torch.randn(30, 64, 2, generator=rng)
        paths = simulate(control.drift, process, START.float().expand(64, 2), times, noise)
        targets = loss.targets(control, paths)
        pairs = torch.randint(30 * 64, (512,), generator=rng)
        optimizer.zero_grad()
        loss.loss(control, paths, targets, pairs).mean().backward()
        torch.nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert before > 2.5
    assert error() < 0.5


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="weighting=mean; use one of inclusive, average"):
        consistency("SC1", "mean")
    with pytest.raises(ConfigError, match="variate=on; use one of none, noise, innovation"):
        consistency("SC1", "next", "on")
    with pytest.raises(ConfigError, match=r"decay=1.5 .* \[0, 1\]"):
        consistency("SC1", "geom", decay=1.5)
    with pytest.raises(ConfigError, match="window=0"):
        ControlConsistency(PROCESS, END, weighting="window", window=0)
    replayed = Paths(PATHS["SC1"].states, PATHS["SC1"].times)
    with pytest.raises(ConfigError, match="use variate=innovation for replayed paths"):
        consistency("SC1", "next", "noise").targets(SCORES["SC1"], replayed)
