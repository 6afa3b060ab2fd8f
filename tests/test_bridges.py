"""Bridges from their configuration, the refusals, and the control of a checkpoint."""

import textwrap

import pytest
import torch

from cdm_ray.bridges import (
    bridge_of,
    consistency_of,
    control_of,
    load_control,
    process_of,
    trained_control,
)
from cdm_ray.cli import run_checkpoint_job
from cdm_ray.config import BridgeConfig, ImageConfig, build_config, load_config
from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.bridge_evaluation import truth_of
from cdm_ray.evaluation.bridge_truth import CIRTruth, GaussianTruth
from cdm_ray.evaluation.grid_truth import GridTruth
from cdm_ray.processes.references import (
    Brownian,
    Cell,
    CoxIngersollRoss,
    DoubleWell,
    MuellerBrown,
    OrnsteinUhlenbeck,
    Schedule,
)
from cdm_ray.processes.user_drift import UserProcess
from tests.checkpoints import make_checkpoint

SIGMA = 0.7
MINIMA = {"start": [-0.558, 1.442], "end": [0.623, 0.028]}
"""Of Mueller's and Brown's potential."""


def config(kind="ou", *, process=None, start=(1.0,), end=(-0.4,), duration=1.0, **sections):
    return build_config(
        BridgeConfig,
        {
            "process": {"kind": kind} | (process or {}),
            "bridge": {"start": start, "end": end, "duration": duration},
            "network": {"width": 5, "depth": 2},
        }
        | sections,
    )


def refused(make):
    """The message of the ConfigError that a call raises: one line."""
    with pytest.raises(ConfigError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def drifts(tmp_path, monkeypatch):
    """A module of drifts, by its name."""
    code = """
        def pull(x):
            return -2 * x

        def pole(x):
            return 1 / (x - 1)
    """
    (tmp_path / "my_drifts.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    return "my_drifts"


def randomised(config, seed=0):
    """The control of a configuration with weights of which none is as initialised."""
    control = control_of(config, bridge_of(config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in control.parameters():
        parameter.data.normal_(generator=generator)
    return control


def batch(dim, horizon=1.0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, dim, generator=generator)
    return x, horizon * torch.rand(6, generator=generator)


# Processes


@pytest.mark.parametrize(
    ("kind", "given", "start", "expected"),
    [
        ("brownian", {}, (1.0, 2.0), Brownian(2, 1.0)),
        ("brownian", {"sigma": SIGMA}, (1.0,), Brownian(1, SIGMA)),
        ("ou", {}, (1.0,), OrnsteinUhlenbeck(1, 1.0, 1.0, 0.0)),
        (
            "ou",
            {"sigma": SIGMA, "rate": -0.5, "mean": [0.3, 2.0]},
            (1.0, 2.0),
            OrnsteinUhlenbeck(2, SIGMA, -0.5, (0.3, 2.0)),
        ),
        ("ou", {"mean": [0.3]}, (1.0, 2.0), OrnsteinUhlenbeck(2, 1.0, 1.0, 0.3)),
        ("double-well", {}, (1.0,), DoubleWell(1.0, 3.0)),
        (
            "double-well",
            {"sigma": SIGMA, "height": 2, "well": 1.2},
            (1.0,),
            DoubleWell(SIGMA, 2.0, 1.2),
        ),
        ("cell", {}, (1.0, 1.0), Cell(0.1)),
        ("cell", {"sigma": SIGMA}, (1.0, 1.0), Cell(SIGMA)),
        ("mueller-brown", {}, (0.6, 0.0), MuellerBrown(3.0)),
        ("cir", {}, (1.0,), CoxIngersollRoss(1.0, 2.0, 1.0)),
        (
            "cir",
            {"rate": 1.5, "mean": [0.8], "volatility": 0.6},
            (1.0,),
            CoxIngersollRoss(1.5, 0.8, 0.6),
        ),
    ],
)
def test_every_kind_of_process_has_its_parameters(kind, given, start, expected):
    process = process_of(config(kind, process=given, start=start, end=start))
    assert type(process) is type(expected)
    x, t = batch(len(start))
    x = x.abs() + 0.1  # inside of every domain
    assert torch.equal(process.drift(x), expected.drift(x))
    assert torch.equal(process.sigma(t), expected.sigma(t))


def test_a_drift_of_the_users_is_a_process(drifts):
    process = process_of(config("user", process={"drift": f"{drifts}:pull", "sigma": SIGMA}))
    assert isinstance(process, UserProcess)
    x, t = batch(1)
    assert torch.equal(process.drift(x), -2 * x)
    assert torch.equal(process.sigma(t), torch.full_like(t, SIGMA))


def test_sigma_may_be_a_schedule_of_time():
    schedule = {"times": [0, 0.5, 1], "values": [SIGMA, 1.4, 0.2]}
    posed = config(process={"sigma": schedule, "rate": 2})
    process = process_of(posed)
    assert process.noise == Schedule((0.0, 0.5, 1.0), (SIGMA, 1.4, 0.2))
    assert process.sigma(torch.tensor(0.25)).item() == pytest.approx((SIGMA + 1.4) / 2)
    x, t = batch(1)
    control = randomised(posed)
    found = control.drift(x, t) - process.drift(x)
    torch.testing.assert_close(found, process.sigma(t)[:, None] ** 2 * control.score(x, t))
    schedule["values"] = [SIGMA, 1.4]
    assert "3 times and 2 values" in refused(lambda: bridge_of(config(process={"sigma": schedule})))


def test_a_bridge_is_from_start_to_end_and_that_of_a_square_root_process_in_its_own_states():
    bridge = bridge_of(config(start=(1.0, 2.0), end=(-0.4, 0.3), duration=0.6))
    assert (bridge.start.tolist(), bridge.end.tolist()) == ([1.0, 2.0], [-0.4, 0.3])
    assert (bridge.start.dtype, bridge.duration) == (torch.float64, 0.6)
    bridge = bridge_of(config("cir", process={"volatility": 0.5}, start=(1.0,), end=(2.25,)))
    assert (bridge.start.tolist(), bridge.end.tolist()) == ([4.0], [6.0])  # 2 sqrt(x) / 0.5


def test_the_truth_is_the_closed_form_or_the_grids_or_unknown(tmp_path):
    def truth(*arguments, **options):
        posed = config(*arguments, **options)
        return truth_of(posed, bridge_of(posed), tmp_path)

    assert isinstance(truth("brownian"), GaussianTruth)
    assert isinstance(truth("ou", process={"sigma": SIGMA}), GaussianTruth)
    assert isinstance(truth("cir", start=(1.0,), end=(2.0,)), CIRTruth)
    assert truth("double-well") is None
    grid = {"lower": [-2.5], "upper": [2.5], "points": [201], "steps": 80, "slices": 20}
    ends = {"start": (0.9,), "end": (-0.9,), "process": {"height": 0.5}}
    assert isinstance(truth("double-well", **ends, eval={"grid": grid}), GridTruth)


# Refusals


@pytest.mark.parametrize("which", ["start", "end"])
@pytest.mark.parametrize("state", [0.0, -1.0])
def test_a_state_outside_of_the_domain_is_refused(which, state):
    states = {"start": (1.0,), "end": (2.0,)} | {which: (state,)}
    message = refused(lambda: bridge_of(config("cir", **states)))
    assert message.startswith(
        f"bridge.{which}=[{state}]: outside of the domain of process.kind=cir"
    )


def test_a_process_that_would_reach_the_border_of_its_domain_is_refused():
    message = refused(lambda: bridge_of(config("cir", process={"volatility": 3}, end=(2.0,))))
    assert "Feller" in message


@pytest.mark.parametrize("which", ["start", "end"])
def test_a_state_where_the_drift_is_not_finite_is_refused(which):
    states = MINIMA | {which: [100.0, 100.0]}
    message = refused(lambda: bridge_of(config("mueller-brown", **states, duration=0.01)))
    assert message.startswith(f"bridge.{which}=[100.0, 100.0]: the drift of process.kind=mueller-b")
    assert "inf" in message
    assert "choose a state where it is finite" in message


def test_a_drift_of_the_users_that_is_not_finite_is_refused(drifts):
    process = {"drift": f"{drifts}:pole"}
    message = refused(lambda: bridge_of(config("user", process=process)))
    assert message == (
        "drift=my_drifts:pole: it is [inf] at the start [1.0]; it has to be finite there"
    )


@pytest.mark.parametrize(
    "field", ["simulation.steps", "eval.steps"]
)  # fmt: skip
def test_steps_that_are_too_long_for_the_drift_are_refused_with_how_many_it_takes(field):
    section, name = field.split(".")

    def posed(steps):
        enough = {"simulation": {"steps": 10**5}, "eval": {"steps": 10**5}}
        return config("mueller-brown", **MINIMA, **enough | {section: {name: steps}})

    message = refused(lambda: bridge_of(posed(200)))
    assert message.startswith(f"{field}=200: steps of 0.005 are too long for the drift at bridge.s")
    least = int(message.split("use at least ")[1].split(",")[0])
    # The largest curvature at the deepest minimum, by differences of the drift.
    step = 1e-5 * torch.eye(2, dtype=torch.float64)
    x = torch.tensor(MINIMA["start"], dtype=torch.float64)
    drift = MuellerBrown(3.0).drift
    hessian = -(drift(x + step) - drift(x - step)) / 2e-5
    assert least == -(-torch.linalg.eigvalsh(hessian)[-1].item() // 2)
    assert bridge_of(posed(least))
    assert refused(lambda: bridge_of(posed(least - 1))).startswith(field)


# The loss


def test_the_auxiliary_drift_is_that_of_the_consistency(drifts):
    for consistency, expected in (
        ({"consistency": "sc2"}, None),
        ({"consistency": "sc1"}, lambda x: -3 * x),
        ({"consistency": "auxiliary", "auxiliary": f"{drifts}:pull"}, lambda x: -2 * x),
    ):
        posed = config(process={"rate": 3, "sigma": SIGMA}, control=consistency)
        loss = consistency_of(posed, bridge_of(posed))
        x, _ = batch(1)
        if expected is None:
            assert loss.auxiliary is None
        else:
            assert torch.equal(loss.auxiliary.drift(x), expected(x))
        assert loss.process.sigma(torch.tensor(0.0)) == torch.tensor(SIGMA)


def test_an_auxiliary_drift_is_tried_on_the_states_that_it_will_get(drifts):
    # Its pole is at 1: a start of a square root process, but no state y = 2 sqrt(x) / volatility.
    auxiliary = {"consistency": "auxiliary", "auxiliary": f"{drifts}:pole"}
    posed = config("cir", start=(1.0,), end=(2.0,), control=auxiliary)
    assert consistency_of(posed, bridge_of(posed))
    posed = config("cir", start=(0.25,), end=(2.0,), control=auxiliary)
    assert "at the start [1.0]" in refused(lambda: consistency_of(posed, bridge_of(posed)))


# Controls


def test_a_control_has_the_weights_of_its_seed_and_leaves_torchs_seed_alone():
    posed = config(start=(1.0, 2.0), end=(0.0, 0.5))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again = (control_of(posed, bridge_of(posed)).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = config(start=(1.0, 2.0), end=(0.0, 0.5), run={"seed": 1})
    other = control_of(other, bridge_of(other)).state_dict()
    assert not torch.equal(first["network.hidden.0.weight"], other["network.hidden.0.weight"])


@pytest.mark.parametrize(("dim", "form", "share"), [(1, "free", 0.0), (3, "gradient", 1.0)])
def test_form_and_share_of_the_drift_are_chosen_by_the_dimension(dim, form, share):
    posed = config(start=[1.0] * dim, end=[0.0] * dim)
    control = control_of(posed, bridge_of(posed))
    assert (control.network.form, control.drift_coefficient) == (form, share)
    assert control.network.location.tolist() == [0.5] * dim  # the middle
    chosen = {"form": "gradient" if form == "free" else "free", "drift_coefficient": 0.5}
    posed = config(start=[1.0] * dim, end=[0.0] * dim, network=chosen | {"location": [0.2]})
    control = control_of(posed, bridge_of(posed))
    assert (control.network.form, control.drift_coefficient) == tuple(chosen.values())
    assert control.network.location.tolist() == pytest.approx([0.2] * dim)


def test_the_control_of_a_checkpoint_is_what_was_saved(tmp_path):
    posed = config(process={"sigma": SIGMA}, start=(1.0, 2.0), end=(-0.4, 0.3))
    saved = randomised(posed)
    checkpoint = make_checkpoint(tmp_path / "run", posed, saved.state_dict())
    x, t = batch(2)

    control = load_control(tmp_path / "run")  # three lines: this one, a state, its drift
    drift, score = control.drift(x, t), control.score(x, t)

    assert torch.equal(drift, saved.drift(x, t))
    assert torch.equal(score, saved.score(x, t))
    assert torch.equal(control.drift(x, torch.tensor(0.3)), saved.drift(x, torch.tensor(0.3)))
    torch.testing.assert_close(drift, process_of(posed).drift(x) + SIGMA**2 * score)
    torch.testing.assert_close(control.control(x, t), SIGMA * score)
    assert not drift.requires_grad
    by_name = load_control(str(checkpoint.folder))
    assert torch.equal(by_name.drift(x, t), drift)


def test_the_newest_checkpoint_of_a_run_is_loaded(tmp_path):
    posed = config()
    for step in (3, 20):
        saved = randomised(posed, seed=step)
        make_checkpoint(tmp_path, posed, saved.state_dict(), step=step)
    x, t = batch(1)
    assert torch.equal(load_control(tmp_path).drift(x, t), saved.drift(x, t))


@pytest.mark.parametrize(
    "network", [{"width": 6}, {"width": 5, "depth": 3}, {"width": 5, "form": "gradient"}]
)
def test_weights_of_another_network_are_refused(network):
    weights = randomised(config()).state_dict()
    posed = config(network=network)
    message = refused(lambda: trained_control(posed, bridge_of(posed), weights, "runs/a"))
    assert message.startswith("runs/a: its weights are not those of a ")
    assert f"{network.get('depth', 2)} layers of {network['width']} units in 1 dim" in message


def test_weights_of_a_process_in_other_dimensions_are_refused():
    weights = randomised(config()).state_dict()
    posed = config(start=(1.0, 1.0), end=(0.0, 0.0))
    message = refused(lambda: trained_control(posed, bridge_of(posed), weights, "runs/a"))
    assert "units in 2 dimensions" in message


def test_weights_of_a_bridge_to_another_end_are_refused():
    weights = randomised(config(end=(2.0,))).state_dict()
    message = refused(lambda: trained_control(config(), bridge_of(config()), weights, "runs/a"))
    assert message.startswith("runs/a: its weights are of a bridge to [2.0], the process ends at [")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("process.kind=brownian", "process.kind was ou, is brownian"),
        ("process.sigma=0.5", "process.sigma was 0.7, is 0.5"),
        ("bridge.end=[2]", "bridge.end was [-0.4], is [2.0]"),
        ("network.width=9", "network.width was 5, is 9"),
    ],
)
def test_a_checkpoint_is_not_used_for_another_process(tmp_path, capsys, override, told):
    posed = config(process={"sigma": SIGMA})
    make_checkpoint(tmp_path, posed, randomised(posed).state_dict())

    def main(config, checkpoint, dry_run):
        raise AssertionError

    words = [str(tmp_path), override]
    mains = {ImageConfig: main, BridgeConfig: main}
    assert run_checkpoint_job(mains, description="", examples="", arguments=words) == 2
    error = capsys.readouterr().err
    assert f"what was learned cannot be changed afterwards ({told})" in error
    assert error.count("\n") == 1


def test_images_and_bridges_do_not_take_each_others_checkpoints(tmp_path, capsys):
    make_checkpoint(tmp_path / "images", load_config(ImageConfig, "digits"), {})
    message = refused(lambda: load_control(tmp_path / "images"))
    assert message.endswith("step-00000007: not a checkpoint of jobs/train_bridge.py")

    make_checkpoint(tmp_path / "bridge", config(), randomised(config()).state_dict())
    job = {"description": "", "examples": "", "arguments": [str(tmp_path / "bridge")]}
    assert run_checkpoint_job({ImageConfig: lambda *given: None}, **job) == 2
    assert "step-00000007: not a checkpoint that this job takes" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_refused(tmp_path):
    assert "neither a checkpoint nor the folder of a run" in refused(lambda: load_control(tmp_path))
