"""Populations through Ray Tune, with members that only pretend to train."""

import json
from pathlib import Path

import pytest
from ray import tune

from cdm_ray.config import load_sweep
from cdm_ray.storage import write_whole
from cdm_ray.sweep import tuning
from cdm_ray.sweep.population import Fork, member_name, setting_of
from cdm_ray.sweep.trials import NEXT, RUNG, Course, TrialPlan

LR = "optimizer.lr"
SWEEP = """
job: bridges
recipe: ou
set: {train.iterations: 200}
axes: {optimizer.lr: {loguniform: [0.001, 1]}}
baseline: {optimizer.lr: 0.01}
scheduler: pbt
rungs: 2
metric: kl_from_truth
"""


def pretend_member(parameters, *, plan):
    """Its KL falls at every rung by the rate that it has then; what it has fallen so far is the
    state that it goes on with."""
    member = member_name(tune.get_context().get_trial_id())
    fork = Fork.load(tune.get_checkpoint())
    setting = setting_of(parameters, fork, member)
    course = Course.load(plan.course_file(member))
    course.start(setting, member)
    done, fallen = 0, 0.0
    if fork is not None:
        done, fallen = json.loads(Path(fork.checkpoint).read_text())
        assert fork.count == 100 * done
    rate = setting["schedule"][-1]["set"][LR] if "schedule" in setting else setting[LR]
    for rung in range(done + 1, 3):
        fallen += rate
        state = plan.course_file(member).with_name(f"state-{rung}-of-{rate}.json")
        write_whole(state, json.dumps([rung, fallen]).encode())
        course.add(rung, 100 * rung, {"kl_from_truth": 10 - fallen}, 10 - fallen, 1.0)
        here = Fork(member, setting, parameters.get(NEXT), 100 * rung, str(state))
        here.report({RUNG: rung, "kl_from_truth": 10 - fallen})


def test_a_population_ends_with_schedules_that_tell_how_its_members_were_trained(
    ray_cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr(tuning, "run_member", pretend_member)
    (tmp_path / "s.yaml").write_text(SWEEP)
    sweep = load_sweep(str(tmp_path / "s.yaml"), tmp_path)
    plan = TrialPlan(sweep, str(tmp_path / "trials"), {}, None)
    starts = [({LR: rate}, 0) for rate in (0.001, 0.1, 0.5)]
    ended = tuning.tune_population(plan, tmp_path / "tune", starts)
    assert [one.course.file.parent.name for one in ended] == [f"member-0000{i}" for i in range(3)]
    for one in ended:
        assert one.error is None
        assert one.course.is_finished(2)
        rates = [one.course.setting[LR]] * 2
        for change in one.course.setting.get("schedule", []):
            assert change["after"] == 100
            rates[1] = change["set"][LR]
        # The number that it ended with is that of its schedule, whoever trained the beginning.
        assert one.course.metrics["kl_from_truth"] == pytest.approx(10 - sum(rates), abs=1e-9)
    worst, middle, best = (one.course.setting for one in ended)
    assert (middle, best) == ({LR: 0.1}, {LR: 0.5})
    assert worst[LR] == 0.5, "goes on from the best"
    assert worst["schedule"][0]["set"][LR] != 0.5
    plan.config(worst, 0)  # is an ordinary configuration
