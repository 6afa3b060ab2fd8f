"""Settings are drawn as the axes say, once each, with the baseline first."""

from __future__ import annotations

import itertools
import math
import pickle
import random

import pytest
from scipy import stats

from cdm_ray.config import BridgeConfig, ImageConfig, SweepConfig, build_config, load_config
from cdm_ray.errors import ConfigError
from cdm_ray.sweep.space import fields, settings, to_optuna, trial_config, trial_name

WEIGHTING = {"choice": ["geom", "window", "next"]}
DECAY = {"uniform": [0.8, 0.99], "when": {"control.weighting": "geom"}}
WINDOW = {"int": [2, 50], "when": {"control.weighting": ["window"]}}
LR = {"loguniform": [1e-4, 1e-1]}
AXES = {
    "control.decay": DECAY,  # before the axis that its condition names
    "control.weighting": WEIGHTING,
    "control.window": WINDOW,
    "optimizer.lr": LR,
}


def bridges(**fields) -> SweepConfig:
    values = {"job": "bridges", "recipe": "double-well-3", "axes": AXES, "metric": "kl_to_truth"}
    return build_config(SweepConfig, values | fields)


def images(**fields) -> SweepConfig:
    values = {"recipe": "digits", "baseline": {"cp.weight": 0}, "metric": "fd_digits_ode"}
    return build_config(SweepConfig, values | fields)


class FakeTrial:
    """Draws for a define-by-run function as `optuna.Trial` does, and remembers what was asked."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.asked: dict[str, tuple] = {}
        self._rng = random.Random(number)

    def suggest_categorical(self, name, choices):
        self.asked[name] = tuple(choices)
        return self._rng.choice(choices)

    def suggest_float(self, name, low, high, *, log):
        self.asked[name] = (low, high, log)
        if log:
            return math.exp(self._rng.uniform(math.log(low), math.log(high)))
        return self._rng.uniform(low, high)

    def suggest_int(self, name, low, high):
        self.asked[name] = (low, high)
        return self._rng.randint(low, high)


@pytest.fixture(scope="module")
def many() -> list[dict]:
    """Two thousand draws, the baseline left out."""
    return settings(bridges(trials=2001))[1:]


def column(drawn, key):
    return [setting[key] for setting in drawn if key in setting]


def test_draws_stay_within_the_bounds_and_reach_them(many):
    assert len(many) == 2000
    for key, low, high in (("control.decay", 0.8, 0.99), ("optimizer.lr", 1e-4, 1e-1)):
        values = column(many, key)
        assert low <= min(values) < low * 1.02
        assert high * 0.98 < max(values) <= high
    windows = column(many, "control.window")
    assert (min(windows), max(windows)) == (2, 50)  # both included
    assert {type(value) for value in windows} == {int}


# 2,000 draws, of decay and window a third: at a level of 1 % a false alarm for 1 of 100 seeds, and
# the seed is fixed. A wrong distribution has a p-value below 1e-6.
LEVEL = 0.01


def test_uniform_is_uniform(many):
    assert stats.kstest(column(many, "control.decay"), "uniform", (0.8, 0.19)).pvalue > LEVEL


def test_loguniform_is_uniform_in_the_logarithm_and_not_in_the_value(many):
    values = column(many, "optimizer.lr")
    logs = [math.log10(value) for value in values]
    assert stats.kstest(logs, "uniform", (-4, 3)).pvalue > LEVEL
    assert stats.kstest(values, "uniform", (1e-4, 0.0999)).pvalue < 1e-6


def test_choices_and_whole_numbers_are_equally_frequent(many):
    for key, number in (("control.weighting", 3), ("control.window", 49)):
        values = column(many, key)
        counts = [values.count(value) for value in set(values)]
        assert len(counts) == number
        assert stats.chisquare(counts).pvalue > LEVEL


def test_axes_are_independent_of_each_other(many):
    geom = [s for s in many if s["control.weighting"] == "geom"]
    pairs = zip(column(geom, "control.decay"), column(geom, "optimizer.lr"), strict=True)
    assert stats.spearmanr(list(pairs)).pvalue > LEVEL


def test_an_axis_is_in_a_setting_exactly_if_its_condition_holds(many):
    for setting in many:
        weighting = setting["control.weighting"]
        assert ("control.decay" in setting) == (weighting == "geom")
        assert ("control.window" in setting) == (weighting == "window")
        assert list(setting) == [key for key in AXES if key in setting]


def test_the_condition_of_an_axis_that_is_absent_does_not_hold():
    """The rollouts' steps hang on the window's kind, which itself hangs on the weight."""
    chain = images(
        axes={
            "cp.weight": {"choice": [0.1, 1]},
            "cp.window_kind": {"choice": ["relative", "absolute"], "when": {"cp.weight": 1}},
            "cp.rollout_steps": {"choice": [1, 2], "when": {"cp.window_kind": "relative"}},
        },
        search="grid",
    )
    # The recipe's window_kind is relative, but where it is no axis nothing depends on it.
    assert settings(chain)[1:] == [
        {"cp.weight": 0.1},
        {"cp.weight": 1, "cp.window_kind": "relative", "cp.rollout_steps": 1},
        {"cp.weight": 1, "cp.window_kind": "relative", "cp.rollout_steps": 2},
        {"cp.weight": 1, "cp.window_kind": "absolute"},
    ]


def test_a_condition_on_a_fixed_field_is_that_of_all_trials():
    axes = {"optimizer.lr": LR, "control.decay": {"uniform": [0.8, 0.9]}}
    axes["control.decay"]["when"] = {"control.weighting": "geom", "control.variate": ["noise"]}
    assert all("control.decay" in s for s in settings(bridges(axes=axes))[1:])


def test_a_grid_is_all_combinations_the_first_axis_slowest():
    values = {"cp.weight": [0.1, 1], "cp.window": [0.1, 0.2, 0.3], "cp.gradient": ["low", "both"]}
    grid = images(axes={k: {"choice": v} for k, v in values.items()}, search="grid", trials=2)
    product = [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]
    assert settings(grid) == [{"cp.weight": 0}, *product]


def test_the_baseline_is_first_and_counted():
    drawn = settings(bridges(baseline={"control.weighting": "average"}, trials=5))
    assert drawn[0] == {"control.weighting": "average"}
    assert len(drawn) == 5
    assert settings(bridges(trials=1)) == [{}]


def test_settings_of_the_same_configuration_are_one():
    """Weight 0 without a window is the baseline, and weight 1 the recipe's own."""
    axes = {
        "cp.weight": {"choice": [0.0, 1, 10]},
        "cp.window": {"choice": [0.1, 0.25], "when": {"cp.weight": 1}},
    }
    assert settings(images(axes=axes, search="grid", baseline={"cp.weight": 0})) == [
        {"cp.weight": 0},
        {"cp.weight": 1, "cp.window": 0.1},
        {"cp.weight": 1, "cp.window": 0.25},
        {"cp.weight": 10},
    ]
    own = settings(images(axes=axes, search="grid", baseline={}))
    assert {"cp.weight": 1, "cp.window": 0.25} not in own
    assert own[0] == {}


def test_a_small_space_is_exhausted_and_not_repeated():
    few = images(axes={"cp.rollout_steps": {"int": [1, 4]}}, trials=50)
    drawn = settings(few)
    assert drawn[0] == {"cp.weight": 0}
    assert sorted(s["cp.rollout_steps"] for s in drawn[1:]) == [1, 2, 3, 4]


def test_the_seed_decides_the_draws_and_more_trials_continue_them():
    assert settings(bridges(seed=3)) == settings(bridges(seed=3))
    assert settings(bridges(seed=3))[1:] != settings(bridges(seed=4))[1:]
    assert settings(bridges(seed=3, trials=20))[:8] == settings(bridges(seed=3))


def test_settings_that_do_not_fit_together_are_refused_before_anything_starts():
    axes = {
        "simulation.replay": {"choice": [0, 10]},
        "control.variate": {"choice": ["innovation", "noise"]},
    }
    clash = {"axes": axes, "set": {"control.variate": "innovation"}}
    clash["axes"] = {k: v for k, v in axes.items() if k != "control.variate"}
    assert len(settings(bridges(search="grid", **clash))) == 2
    clash = {
        "axes": {
            "simulation.replay": {"choice": [0, 10]},
            "anneal.sigma": {"choice": [1, 2]},
        },
        "set": {"control.variate": "innovation"},
    }
    rate = {"optimizer.lr": {"loguniform": [0.001, 0.01]}}
    searched = clash | {"axes": rate | clash["axes"]}
    for make in (lambda: settings(bridges(search="grid", **clash)), lambda: optuna(searched)):
        with pytest.raises(ConfigError) as caught:
            make()
        message = str(caught.value)
        assert message.startswith("anneal.sigma=2,")
        assert "simulation.replay=10: simulation.replay and ann" in message
        assert message.endswith("give an axis a `when`, so that these do not meet")
        assert "\n" not in message
    clash["axes"]["anneal.sigma"]["when"] = {"simulation.replay": 0}
    assert len(settings(bridges(search="grid", **clash))) == 3


def optuna(values: dict):
    return to_optuna(bridges(search="optuna", **values))


def test_optuna_is_asked_for_the_active_axes_as_they_are():
    define = optuna({"trials": 10})
    for number in range(1, 50):
        trial = FakeTrial(number)
        setting = define(trial)
        assert list(setting) == [key for key in AXES if key in trial.asked]
        weighting = setting["control.weighting"]
        assert ("control.decay" in setting) == (weighting == "geom")
        assert trial.asked["control.weighting"] == ("geom", "window", "next")
        assert trial.asked["optimizer.lr"] == (1e-4, 1e-1, True)
        assert trial.asked.get("control.decay", (0.8, 0.99, False)) == (0.8, 0.99, False)
        assert trial.asked.get("control.window", (2, 50)) == (2, 50)
        trial_config(BridgeConfig, bridges(), setting, seed=0)


def test_optunas_trial_0_is_the_baseline():
    trial = FakeTrial(0)
    assert optuna({"baseline": {"control.decay": 0.5}})(trial) == {"control.decay": 0.5}
    assert trial.asked == {}


def test_what_optuna_defines_is_rounded_within_the_bounds():
    define = optuna({"axes": {"optimizer.lr": {"loguniform": [1.00004e-3, 1e-1]}}})
    trial = FakeTrial(1)
    trial.suggest_float = lambda name, low, high, log: 1.00004e-3
    assert define(trial) == {"optimizer.lr": 1.00004e-3}
    trial.suggest_float = lambda name, low, high, log: 0.01234567
    assert define(trial) == {"optimizer.lr": 0.01235}


def test_a_narrow_range_keeps_its_digits():
    drawn = settings(bridges(axes={"ema.decay": {"uniform": [0.99991, 0.99999]}}, trials=30))
    assert len(drawn) == 30
    assert all(0.99991 <= s["ema.decay"] <= 0.99999 for s in drawn[1:])


def test_choices_that_are_lists_come_back_as_lists():
    axes = {
        "network.channel_mult": {"choice": [[1, 2], [2, 2]]},
        "cp.window": {"uniform": [0.1, 1]},
    }
    lists = images(axes=axes, search="optuna")
    trial = FakeTrial(1)
    assert to_optuna(lists)(trial)["network.channel_mult"] in ([1, 2], [2, 2])
    assert trial.asked["network.channel_mult"] == ("[1,2]", "[2,2]")


def test_the_function_for_optuna_survives_pickling():
    """OptunaSearch pickles it with plain pickle whenever Tune saves its state."""
    define = optuna({})
    again = pickle.loads(pickle.dumps(define))
    assert again(FakeTrial(7)) == define(FakeTrial(7))


def test_settings_of_optuna_cannot_be_listed():
    with pytest.raises(ValueError, match="depend on results"):
        settings(bridges(search="optuna"))


def test_a_trials_configuration_is_the_recipe_with_its_fields():
    sweep = images(
        axes={"cp.weight": {"choice": [0.3, 3]}}, set={"train.images": "6k", "train.batch": 64}
    )
    overrides = ["train.images=6k", "train.batch=64", "cp.weight=0.3", "run.seed=5"]
    expected = load_config(ImageConfig, "digits", overrides)
    assert trial_config(ImageConfig, sweep, {"cp.weight": 0.3}, seed=5) == expected


def test_every_trial_and_seed_has_a_folder_of_its_own():
    sweep = bridges(trials=20)
    names = {
        trial_config(BridgeConfig, sweep, setting, seed).run_name
        for setting in settings(sweep)
        for seed in (0, 1)
    }
    assert len(names) == 40


def test_a_name_says_the_setting_whatever_the_order():
    assert trial_name({"cp.weight": 0.3, "cp.window": 0.1}) == "cp.weight=0.3,cp.window=0.1"
    assert trial_name({"cp.window": 0.1, "cp.weight": 0.3}) == "cp.weight=0.3,cp.window=0.1"
    assert trial_name({"cp.weight": 10.0}) == trial_name({"cp.weight": 10}) == "cp.weight=10"
    assert trial_name({"a": True, "b": None, "c": [1, 2], "d": "low"}) == (
        "a=true,b=null,c=[1,2],d=low"
    )
    assert trial_name({}) == "recipe"


def test_names_of_drawn_settings_differ(many):
    assert len({trial_name(setting) for setting in many}) == len(many)


def test_fields_are_the_axes_and_what_the_baseline_has_beside_them():
    sweep = images(
        axes={"cp.window": {"choice": [0.1]}, "cp.weight": {"choice": [1, 2]}},
        baseline={"dsm.input_perturbation": 0.1, "cp.weight": 0},
    )
    assert fields(sweep) == ["cp.window", "cp.weight", "dsm.input_perturbation"]
