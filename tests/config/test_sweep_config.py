"""A sweep is read as it is meant, or refused in one line that says what would be right."""

from __future__ import annotations

import pytest
import yaml

from cdm_ray.config import (
    BridgeConfig,
    ImageConfig,
    SweepConfig,
    build_config,
    describe,
    load_config,
    load_sweep,
    sweep_names,
    to_yaml,
)
from cdm_ray.config.sweeps import as_overrides, overlay
from cdm_ray.errors import ConfigError

CP = """
recipe: digits
set: {train.images: 6k}
axes:
  cp.weight: {choice: [1e-1, 1, 10]}
  cp.window: {loguniform: [5e-2, 0.5], when: {cp.weight: [1, 10]}}
  cp.rollout_steps: {int: [1, 5]}
baseline: {cp.weight: 0}
metric: fd_digits_ode
"""

BRIDGE = """
job: bridges
recipe: double-well-3
axes:
  control.weighting: {choice: [geom, window, next]}
  control.decay: {uniform: [0.8, 0.99], when: {control.weighting: geom}}
  control.window: {int: [2, 50], when: {control.weighting: window}}
metric: kl_from_truth
"""


@pytest.fixture
def load(tmp_path):
    """load(*overrides): the sweep for CP, or that of `text`, with these overrides."""

    def write_and_load(*overrides: str, text: str = CP) -> SweepConfig:
        (tmp_path / "mine.yaml").write_text(text)
        return load_sweep("mine", tmp_path, overrides)

    return write_and_load


@pytest.fixture
def refused(load):
    def message(*overrides: str, text: str = CP) -> str:
        with pytest.raises(ConfigError) as caught:
            load(*overrides, text=text)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message


def written(axis):
    return axis.model_dump()


def test_a_file_is_read_with_its_name_and_the_defaults(load):
    sweep = load()
    assert (sweep.name, sweep.job, sweep.search, sweep.trials) == ("mine", "images", "random", 8)
    assert sweep.root is ImageConfig
    assert sweep.base == load_config(ImageConfig, "digits", ["train.images=6000"])
    assert load(text=BRIDGE).root is BridgeConfig


def test_numbers_that_yaml_takes_for_text_are_numbers(load):
    axes = load("sweep.axes.train.batch={choice: [64, 1.6k]}", "sweep.baseline.cp.window=1e-1").axes
    assert axes["cp.weight"].values == (0.1, 1, 10)
    assert axes["cp.window"].values == (0.05, 0.5)
    assert axes["train.batch"].values == (64, 1600)
    assert load("sweep.baseline.cp.window=1e-1").baseline == {"cp.weight": 0, "cp.window": 0.1}


@pytest.mark.parametrize("text", [CP, BRIDGE])
def test_what_is_written_is_read_back_equal(load, text):
    sweep = load(text=text)
    assert build_config(SweepConfig, yaml.safe_load(to_yaml(sweep))) == sweep


def test_every_field_has_a_help_text():
    assert all(text for _, _, text in describe(SweepConfig))


def test_overrides_of_the_sweep_change_its_fields_and_entries(load):
    sweep = load(
        "sweep.trials=4",
        "sweep.axes.cp.weight={choice: [1, 2]}",
        "sweep.axes.cp.rollout_steps=null",
        "sweep.axes.cp.gradient={choice: [low, both]}",
        "sweep.baseline={}",
    )
    assert (sweep.trials, sweep.baseline) == (4, {})
    assert list(sweep.axes) == ["cp.window", "cp.weight", "cp.gradient"]
    assert written(sweep.axes["cp.weight"]) == {"choice": [1, 2]}


def test_other_overrides_are_for_all_trials_and_replace_an_axis(load):
    sweep = load("train.batch=64", "cp.rollout_steps=2", "train.images=7k")
    assert sweep.set == {"train.batch": 64, "train.images": "7k", "cp.rollout_steps": 2}
    assert list(sweep.axes) == ["cp.weight", "cp.window"]
    assert (sweep.base.train.images, sweep.base.cp.rollout_steps) == (7000, 2)


def test_a_condition_on_a_field_that_an_override_fixes_is_settled_by_it(load):
    assert list(load("cp.weight=1").axes) == ["cp.window", "cp.rollout_steps"]
    kept = load("control.weighting=geom", "sweep.axes.control.window=null", text=BRIDGE)
    assert list(kept.axes) == ["control.decay"]


def test_a_recipe_is_found_beside_the_sweep_that_names_it(load, tmp_path, monkeypatch):
    (tmp_path / "here.yaml").write_text("extends: digits\ntrain: {batch: 64}")
    text = CP.replace("recipe: digits", "recipe: here.yaml")
    monkeypatch.chdir("/")
    assert load(text=text).base.train.batch == 64


def test_a_sweep_is_named_or_given_as_a_file(load, tmp_path):
    sweep = load()
    assert sweep_names(tmp_path) == ["mine"]
    assert load_sweep(str(tmp_path / "mine.yaml"), tmp_path / "elsewhere") == sweep


def test_an_unknown_sweep_is_refused_with_the_nearest_one(load, tmp_path):
    load()
    with pytest.raises(ConfigError, match="unknown sweep 'mien'; did you mean mine[?] use one of"):
        load_sweep("mien", tmp_path)
    with pytest.raises(ConfigError, match="sweep nowhere/a.yaml: no such file"):
        load_sweep("nowhere/a.yaml", tmp_path)
    with pytest.raises(ConfigError, match="unknown sweep 'cp'; use a .yaml file"):
        load_sweep("cp", tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("axes: [", "sweep mine: not valid YAML"),
        ("- 1", "sweep mine: must be a mapping of fields, not [1]"),
        (CP + "serch: grid", "serch: unknown key; did you mean search?"),
        ("recipe: digts\naxes: {cp.weight: {choice: [1]}}\nmetric: a", "did you mean digits?"),
        ("recipe: digits\nmetric: fd", "axes: none given; write e.g."),
        ("axes: {cp.weight: {choice: [1]}}\nrecipe: digits", "metric='': give the plain name"),
    ],
)
def test_a_file_that_is_wrong_is_refused(refused, text, told):
    assert told in refused(text=text)


@pytest.mark.parametrize(
    ("axis", "told"),
    [
        ("3", "axes.cp.fraction: 3 is no axis; write e.g. {choice:"),
        ("{}", "axes.cp.fraction: has none of choice, uniform, loguniform, int; give one"),
        ("{choice: [1], int: [1, 2]}", "axes.cp.fraction: has choice and int of choice, uniform"),
        ("{unifrom: [0, 1]}", "unknown key unifrom; did you mean uniform?"),
        (
            "{choice: [1], zz: 1}",
            "unknown key zz; known here: choice, uniform, loguniform, int",
        ),
        ("{choice: 1}", "choice=1 must be a list of values"),
        ("{choice: []}", "choice=[] must be a list of values"),
        ("{choice: [1, 0.5, 1.0]}", "choice=[1, 0.5, 1.0] has 1 twice"),
        ("{uniform: 0.5}", "uniform=0.5 must be two numbers, [low, high]"),
        ("{uniform: [0.5]}", "uniform=[0.5] must be two numbers"),
        ("{uniform: [a, 1]}", "must be two numbers"),
        ("{uniform: [0.1, .inf]}", "must be two numbers"),
        ("{uniform: [true, 2]}", "must be two numbers"),
        ("{uniform: [0.5, 0.1]}", "uniform=[0.5, 0.1]: the first number must be less than the sec"),
        ("{int: [1, 1]}", "int=[1, 1]: the first number must be less"),
        ("{int: [1, 2.5]}", "int=[1, 2.5] must be whole numbers; or use uniform"),
        ("{loguniform: [0, 1]}", "loguniform=[0, 1] must be above 0; or use uniform"),
        ("{choice: [1], when: cp.weight}", "when='cp.weight' must be a mapping, {field: value"),
    ],
)
def test_an_axis_that_is_wrong_in_itself_is_refused(refused, axis, told):
    message = refused(f"sweep.axes.cp.fraction={axis}")
    assert message.startswith("axes.cp.fraction: ")
    assert told in message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sweep.axes.cp.wieght={choice: [1]}", "axes.cp.wieght: unknown key; did you mean cp.wei"),
        ("sweep.axes.wieght={choice: [1]}", "axes.wieght: unknown key; did you mean"),
        ("sweep.axes.cp={choice: [1]}", "axes.cp: is a section; name its fields one by one, e.g."),
        ("sweep.axes.run.seed={int: [0, 9]}", "axes.run.seed: every trial has its own; leave it"),
        ("sweep.axes.eval.images={int: [9, 99]}", "axes.eval.images: changes how a run is carried"),
        ("sweep.baseline.cp.wait=1", "baseline.cp.wait: unknown key; did you mean cp.weight?"),
        ("sweep.baseline.ray.workers=1", "baseline.ray.workers: changes how a run is carried out"),
        ("sweep.baseline.cp.weight=-1", "baseline: cp.weight=-1: input should be greater than or"),
        ("cp.wieght=1", "cp.wieght: unknown key; did you mean cp.weight?"),
        ("cp={weight: 1}", "set.cp: is a section; name its fields one by one, e.g. cp.weight"),
        ("run.name=mine", "set.run.name: every trial has its own; leave it out"),
        ("sweep.set.cp.weight=1", "set.cp.weight: is an axis too; leave out one of them"),
        ("sweep.trails=3", "trails: unknown key; did you mean trials?"),
        ("sweep.trials.a=3", "trials.a: unknown key"),
        ("sweep.metric=fd digits", "metric='fd digits': give the plain name of a metric"),
        ("sweep.search=tpe", "search='tpe'"),
        ("sweep.trials", "'sweep.trials' is not an override; write section.field=value for all"),
        ("sweep.trials=[", "sweep.trials: '[' is not a YAML value"),
    ],
)
def test_a_field_that_is_unknown_or_not_the_sweeps_to_vary_is_refused(refused, override, told):
    assert told in refused(override)


def test_a_part_of_a_field_is_no_axis(refused):
    message = refused("sweep.axes.process.sigma.times={choice: [1]}", text=BRIDGE)
    assert message == "axes.process.sigma.times: is a part of process.sigma; use that as a whole"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["cp.window={uniform: [0.1, 1.5]}"], "axes.cp.window=1.5: cp.window=1.5 as a share of"),
        (["cp.weight={choice: [1, -1]}"], "axes.cp.weight=-1: cp.weight=-1: input should be"),
        (["cp.gradient={choice: [low, lo]}"], "axes.cp.gradient=lo: cp.gradient='lo': input sho"),
        # Valid at both ends, not between.
        (["cp.rollout_steps={uniform: [1, 5]}"], "cp.rollout_steps=3.47213595"),
        (["train.batch={int: [64, 128]}"], "axes.train.batch=65: train.batch=65 is not divisible"),
        # Neither is valid without the other, and nothing ties them.
        (
            ["cp.estimator={choice: [product, regress]}", "cp.gradient={choice: [low, high]}"],
            "axes.cp.estimator=regress: cp.estimator=regress trains the high-noise start only",
        ),
        # The condition is fulfilled where the value is tried.
        (
            [
                "cp.window_kind={choice: [relative, absolute]}",
                "cp.window={uniform: [0.1, 2], when: {cp.window_kind: relative}}",
            ],
            "axes.cp.window=2 (with cp.window_kind=relative): cp.window=2.0 as a share of sigma",
        ),
    ],
)
def test_a_value_that_no_trial_can_have_is_refused_with_the_reason(refused, overrides, told):
    assert told in refused(*(f"sweep.axes.{override}" for override in overrides))


def test_values_are_tried_only_where_the_condition_holds(load):
    wide = load(
        "sweep.axes.cp.window_kind={choice: [relative, absolute]}",
        "sweep.axes.cp.window={uniform: [0.1, 2], when: {cp.window_kind: absolute}}",
    )
    assert wide.axes["cp.window"].values == (0.1, 2)


def test_a_choice_that_needs_another_field_is_tied_to_it_by_a_condition(load):
    tied = load(
        "sweep.axes.cp.estimator={choice: [product, regress]}",
        "sweep.axes.cp.gradient={choice: [high], when: {cp.estimator: regress}}",
    )
    assert "cp.gradient" in tied.axes


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "when: {cp.wieght: 1}",
            "axes.cp.fraction: when cp.wieght: unknown key; did you mean cp.we",
        ),
        (
            "when: {cp.gradient: lo}",
            "when cp.gradient='lo': input should be 'low', 'high' or 'both'",
        ),
        ("when: {cp.gradient: [low, lo]}", "when cp.gradient='lo': input should be"),
        ("when: {cp.weight: -1}", "when cp.weight=-1: input should be greater than or equal to 0"),
        ("when: {cp.window: 0.1}", "when cp.window: that is loguniform and never exactly a value"),
        ("when: {cp.weight: 7}", "only when cp.weight is 7, which is so in no trial"),
        ("when: {cp.gradient: both}", "only when cp.gradient is both, which is so in no trial"),
        ("when: {cp.rollout_steps: 9}", "only when cp.rollout_steps is 9, which is so in no trial"),
        ("when: {cp.fraction: 1}", "axes: conditions go in a circle: cp.fraction -> cp.fraction"),
    ],
)
def test_a_condition_that_can_never_hold_is_refused(refused, override, told):
    assert told in refused(f"sweep.axes.cp.fraction={{choice: [0.25, 1], {override}}}")


def test_an_axis_that_an_override_leaves_without_a_trial_is_refused_with_the_way_out(refused, load):
    message = refused("cp.weight=0.1")
    assert message == (
        "axes.cp.window: only when cp.weight is 1 or 10, which is so in no trial; change it, or "
        "leave the axis out (sweep.axes.cp.window=null)"
    )
    assert list(load("cp.weight=0.1", "sweep.axes.cp.window=null").axes) == ["cp.rollout_steps"]


def test_conditions_in_a_circle_are_refused(refused):
    message = refused(
        "sweep.axes.cp.weight={choice: [1, 2], when: {cp.rollout_steps: 1}}",
        "sweep.axes.cp.rollout_steps={int: [1, 5], when: {cp.weight: 1}}",
    )
    assert message.startswith("axes: conditions go in a circle: cp.")


def test_conditions_are_decided_in_their_order_wherever_they_stand(load):
    lines = BRIDGE.replace("  control.weighting: {choice: [geom, window, next]}\n", "")
    late = lines.replace("metric", "  control.weighting: {choice: [geom, window, next]}\nmetric")
    order = load(text=late).order
    assert list(load(text=late).axes)[-1] == "control.weighting" == order[0]


def test_a_grid_needs_choices(refused, load):
    assert refused("sweep.search=grid") == (
        "axes.cp.window: search=grid needs the values of loguniform=[0.05, 0.5]; give them as "
        "choice, or set search=random"
    )
    choices = ["cp.window={choice: [0.1]}", "cp.rollout_steps={choice: [1, 5]}"]
    assert load("sweep.search=grid", *(f"sweep.axes.{c}" for c in choices)).search == "grid"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["search=optuna", "axes={cp.weight: {choice: [1, 2]}}"],
            "no axis is uniform or loguniform",
        ),
        (
            ["search=optuna", "seeds=2"],
            "search=optuna chooses by single runs, given seeds=2; repeat",
        ),
        (
            ["scheduler=pbt", "seeds=2"],
            "scheduler=pbt with search=random and seeds=2: a population",
        ),
        (["scheduler=pbt", "axes={train.batch: {choice: [64, 128]}}"], "axes.train.batch: cannot"),
        (
            ["scheduler=pbt", "axes={cp.weight: {choice: [1]}}"],
            "axes.cp.weight: scheduler=pbt needs",
        ),
        (
            ["scheduler=pbt", "axes={cp.weight: {choice: [1, 2], when: {cp.rollout_steps: 1}}}"],
            "axes.cp.weight: scheduler=pbt has no conditions; leave out `when`",
        ),
        (["scheduler=pbt", "rungs=1"], "scheduler=pbt compares trials between evaluations"),
    ],
)
def test_searches_and_schedulers_that_do_not_go_together_are_refused(overrides, reason, refused):
    assert reason in refused(*(f"sweep.{one}" for one in overrides))


def test_pruning_needs_two_rungs(refused):
    message = refused("sweep.scheduler=asha", "sweep.rungs=1")
    assert message == (
        "scheduler=asha compares trials between evaluations, of which rungs=1 leaves none; use "
        "rungs=2 or more"
    )


@pytest.mark.parametrize(
    "value", [1e-05, 0.1 + 0.2, 7, True, None, "yes", "a: b", [1, 2], {"times": [0], "values": [1]}]
)
def test_overrides_say_exactly_the_value(value):
    (override,) = as_overrides({"section.field": value})
    key, _, text = override.partition("=")
    assert (key, yaml.safe_load(text)) == ("section.field", value)


def test_an_overlay_is_the_configuration_with_these_fields():
    base = load_config(ImageConfig, "digits")
    changed = overlay(base, {"cp.weight": 3, "network.channel_mult": [1, 1]})
    assert changed == load_config(
        ImageConfig, "digits", ["cp.weight=3", "network.channel_mult=[1, 1]"]
    )
    with pytest.raises(ConfigError, match="cp.weight=-1: input should be greater"):
        overlay(base, {"cp.weight": -1})
