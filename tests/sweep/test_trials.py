"""What trials are told and keep, and what the schedulers make of it; the trials themselves run in
tests/cluster."""

import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from cdm_ray.config import load_sweep
from cdm_ray.config.sweeps import overlay
from cdm_ray.sweep.population import Fork, member_name, setting_of
from cdm_ray.sweep.space import mutated
from cdm_ray.sweep.trials import GIVEN, NEXT, RUNG, Course, TrialPlan, given_of, run_name
from cdm_ray.sweep.tuning import SuccessiveHalving, optuna_search

BRIDGES = """
job: bridges
recipe: ou
set: {train.iterations: 100, train.inner_steps: 2}
axes: {optimizer.lr: {choice: [0.001, 0.01, 0.1]}}
search: grid
scheduler: asha
rungs: 3
metric: kl_from_truth
"""
IMAGES = """
recipe: digits
set: {train.images: 6000, train.batch: 128}
axes: {cp.weight: {loguniform: [0.1, 10]}, optimizer.lr: {choice: [0.001, 0.002, 0.004]}}
baseline: {cp.weight: 0}
rungs: 3
metric: fd_digits_ode
"""


@pytest.fixture
def plan_of(tmp_path):
    def make(text, *overrides):
        (tmp_path / "s.yaml").write_text(text)
        sweep = load_sweep(str(tmp_path / "s.yaml"), tmp_path, overrides)
        return TrialPlan(sweep, str(tmp_path / "trials"), {}, None)

    return make


@pytest.mark.parametrize(
    ("text", "setting", "steps"),
    [(BRIDGES, {"optimizer.lr": 0.01}, [68, 136]), (IMAGES, {"cp.weight": 3}, [16, 32])],
)
def test_a_trial_evaluates_and_writes_a_checkpoint_at_every_rung(plan_of, text, setting, steps):
    config = plan_of(text).config(setting, 4)
    assert list(config.evaluation_steps) == steps
    assert config.checkpoint_steps == steps[0]
    assert steps[-1] < config.steps <= steps[0] * 3
    assert config.run.seed == 4
    assert config.run_name == run_name(setting, 4)


@pytest.mark.parametrize(("scheduler", "steps"), [("asha", 20), ("pbt", 68)])
def test_checkpoints_are_as_often_as_asked_for_but_at_the_rungs_of_a_population(
    plan_of, scheduler, steps
):
    more = ["checkpoint.every_iterations=10", f"sweep.scheduler={scheduler}"]
    config = plan_of(BRIDGES, *more).config({"optimizer.lr": 0.01}, 0)
    assert config.checkpoint_steps == steps


@pytest.mark.parametrize("rungs", [1, 2, 5, 7])
@pytest.mark.parametrize("images", [1000, 6000, 6100])
def test_there_are_never_more_evaluations_than_rungs(plan_of, rungs, images):
    plan = plan_of(IMAGES, f"sweep.rungs={rungs}", f"train.images={images}")
    assert len(plan.config({"cp.weight": 1}, 0).evaluation_steps) <= rungs - 1


def test_names_of_runs_tell_settings_apart_however_long_they_are():
    many = {f"section.field_number_{i}": 0.123456 for i in range(20)}
    other = many | {"section.field_number_19": 0.123457}
    names = [run_name(many, 0), run_name(other, 0), run_name(many, 1)]
    assert len(set(names)) == 3
    assert max(map(len, names)) < 130
    assert run_name({"cp.weight": 0.3, "a": "b,c"}, 2) == "a_b-c-cp.weight_0.3-seed2"


def test_a_course_is_read_back_and_forgets_what_came_after_the_rung_that_it_repeats(tmp_path):
    course = Course.load(tmp_path / "a" / "trial.json")
    course.start({"cp.weight": 1}, "run")
    for rung in (1, 2, 3, 2):
        course.add(rung, 10 * rung, {"fd": 0.1 * rung}, 0.1 * rung, 5.0 * rung)
    found = Course.load(tmp_path / "a" / "trial.json")
    assert (found.rung, found.step, found.seconds, found.run) == (2, 20, 10.0, "run")
    assert [rung for rung, _ in found.reports] == [1, 2]
    assert not found.has_ended(3)
    found.fail("lost", 12.0)
    assert Course.load(found.file).has_ended(3)
    assert not Course.load(found.file).is_finished(2)
    found.start({"cp.weight": 1}, "run")
    assert Course.load(found.file).is_finished(2), "it has got another chance"


# ASHA


def trial(number, lr):
    return SimpleNamespace(trial_id=f"x_{number}", config={GIVEN: ({"optimizer.lr": lr}, 0)})


def halving_of(plan):
    halving = SuccessiveHalving(plan)
    halving.set_search_properties("kl_from_truth", "min")  # as Tune does
    return halving


def report(scheduler, one, rung, value):
    return scheduler.on_trial_result(None, one, {RUNG: rung, "kl_from_truth": value})


def test_trials_that_are_behind_end_but_not_the_baseline_nor_a_whole_run(plan_of):
    plan = plan_of(BRIDGES, "sweep.baseline.optimizer.lr=0.1")
    halving = halving_of(plan)
    good, bad, base = trial(0, 0.01), trial(1, 0.001), trial(2, 0.1)
    for one in (good, bad, base):
        halving.on_trial_add(None, one)
    # Better than the others, it does not end them either: they are compared with each other.
    assert report(halving, base, 1, 0.1) == TrialScheduler.CONTINUE
    assert report(halving, good, 1, 1.0) == TrialScheduler.CONTINUE
    assert report(halving, bad, 1, 2.0) == TrialScheduler.STOP
    assert report(halving, base, 2, 3.0) == TrialScheduler.CONTINUE
    assert report(halving, good, 3, 9.0) == TrialScheduler.CONTINUE  # ends by itself
    for one in (good, bad, base):
        halving.on_trial_complete(None, one, {RUNG: 3, "kl_from_truth": 1.0})


def test_a_sweep_that_is_continued_knows_what_was_reported_before(plan_of):
    plan = plan_of(BRIDGES)
    before = Course.load(plan.course_file(run_name({"optimizer.lr": 0.01}, 0)))
    before.add(1, 68, {}, 1.0, 1.0)
    halving = halving_of(plan)
    halving.on_trial_add(None, trial(0, 0.01))
    worse = trial(1, 0.001)
    halving.on_trial_add(None, worse)
    assert report(halving, worse, 1, 2.0) == TrialScheduler.STOP


# Optuna


def test_optuna_begins_with_the_baseline_and_learns_from_what_it_sees(plan_of):
    more = ["sweep.axes.optimizer.lr={loguniform: [0.001, 1]}", "sweep.search=optuna"]
    sweep = plan_of(BRIDGES, *more, "sweep.baseline.optimizer.lr=0.01", "sweep.trials=24").sweep
    search, rates = optuna_search(sweep), []
    for number in range(24):
        search = pickle.loads(pickle.dumps(search))  # as when a sweep is continued
        rate = search.suggest(f"t{number}")["optimizer.lr"]
        distance = abs(math.log10(rate / 0.1))
        search.on_trial_complete(f"t{number}", {"kl_from_truth": distance, RUNG: 3})
        rates.append(rate)
    assert rates[0] == 0.01
    assert len(set(rates)) == 24
    # Uniformly drawn, a third would lie in this part of the range.
    assert sum(0.033 < rate < 0.33 for rate in rates[12:]) >= 8


# Populations


def test_a_member_goes_on_as_it_was_or_from_another_ones_checkpoint():
    start = {GIVEN: ({"cp.weight": 1.0}, 0)}
    assert setting_of(start, None, "member-0") == {"cp.weight": 1.0}
    own = Fork("member-0", {"cp.weight": 1.0}, None, 500, "c")
    assert setting_of(start, own, "member-0") == {"cp.weight": 1.0}

    cloned = start | {NEXT: {"cp.weight": 1.2}}
    first = setting_of(cloned, own, "member-1")
    assert first == {"cp.weight": 1.0, "schedule": [{"after": 500, "set": {"cp.weight": 1.2}}]}
    later = Fork("member-1", first, {"cp.weight": 1.2}, 1000, "d")
    assert setting_of(cloned, later, "member-1") == first

    again = setting_of(start | {NEXT: {"cp.weight": 0.96}}, later, "member-0")
    assert [change["after"] for change in again["schedule"]] == [500, 1000]
    assert again["schedule"][1]["set"] == {"cp.weight": 0.96}


def test_members_keep_their_names_when_a_sweep_is_continued():
    assert member_name("a81b2_00003") == member_name("ffff_00003") == "member-00003"


def test_mutations_stay_in_the_space_and_always_change_something(plan_of):
    sweep = plan_of(IMAGES).sweep
    rng = np.random.default_rng(0)
    now = {"cp.weight": 9.5, "optimizer.lr": 0.001}
    seen = [mutated(sweep, now, rng) for _ in range(200)]
    assert now not in seen
    assert {one["optimizer.lr"] for one in seen} == {0.001, 0.002, 0.004}
    weights = [one["cp.weight"] for one in seen]
    assert min(weights) >= 0.1
    assert max(weights) == 10.0
    # most go a fifth down, or up to the bound
    assert sum(weight in (7.6, 10.0) for weight in weights) > 120
    for one in seen[:5]:
        overlay(sweep.base, one)


def test_given_of_reads_pairs_and_settings_alone():
    assert given_of({GIVEN: ({"a": 1}, 2)}) == ({"a": 1}, 2)
    assert given_of({"a": 1}) == ({"a": 1}, 0)
