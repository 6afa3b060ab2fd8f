"""A schedule says which configuration is in effect at which step, or what is wrong with it."""

import copy
import pickle

import pytest
import yaml

from cdm_ray.config import (
    BridgeConfig,
    Change,
    ImageConfig,
    build_config,
    describe,
    flatten,
    load_config,
    to_yaml,
)
from cdm_ray.errors import ConfigError

TWO = (
    "schedule=[{after: 1k, set: {cp.weight: 3, optimizer.lr: 5e-4}}, "
    "{after: 20k, set: {cp.weight: 10}}]"
)


def digits(*overrides):
    """28,000 images in 219 steps of 128."""
    return load_config(ImageConfig, "digits", overrides)


def bridge(*overrides):
    """1,200 iterations of 4 steps."""
    return load_config(BridgeConfig, None, overrides)


def in_effect(config, step):
    now = config.at(step)
    return now.cp.weight, now.optimizer.lr


def test_a_change_holds_from_the_first_step_that_begins_after_it_until_the_next():
    config = digits(TWO)
    # 1,000 images are 7.8 steps, 20,000 are 156.25
    assert list(config.segments) == [0, 8, 157]
    assert [in_effect(config, step) for step in (0, 7)] == [(1, 2e-3)] * 2
    assert [in_effect(config, step) for step in (8, 156)] == [(3, 5e-4)] * 2
    assert [in_effect(config, step) for step in (157, 218)] == [(10, 5e-4)] * 2
    exact = digits("schedule=[{after: 1280, set: {cp.weight: 3}}]")
    assert [exact.at(step).cp.weight for step in (9, 10)] == [1, 3]


def test_what_is_in_effect_is_the_rest_of_the_configuration_without_a_schedule():
    config = digits(TWO)
    assert config.at(8) == digits("cp.weight=3", "optimizer.lr=5e-4")
    assert config.at(8) is config.at(9)  # asked for at every step
    assert digits().at(0) == digits()


def test_changes_of_bridges_are_between_iterations():
    config = bridge("schedule=[{after: 0.3k, set: {control.decay: 0.5, ema.decay: 0.9}}]")
    assert list(config.segments) == [0, 1200]
    assert [config.at(step).control.decay for step in (1199, 1200)] == [0.9, 0.5]
    assert config.at(1200).ema.decay == 0.9


def test_fields_that_need_each_other_change_together():
    both = "{cp.rollout_weights: ema, cp.reuse_d0: false}"
    config = digits(f"schedule=[{{after: 1k, set: {both}}}]")
    assert config.at(8).cp.rollout_weights == "ema"
    auxiliary = "{control.consistency: auxiliary, control.auxiliary: 'm:f'}"
    back = "{control.consistency: sc1, control.auxiliary: null}"
    config = bridge(f"schedule=[{{after: 1, set: {auxiliary}}}, {{after: 2, set: {back}}}]")
    assert [part.control.auxiliary for part in config.segments.values()] == [None, "m:f", None]


CHANGEABLE = "optimizer.lr, cp.*, dsm.*, ema.*"
NOT_TWICE = (
    "is not at least a step later than the entry before; put the entries in increasing order"
)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("3", "schedule=3: input should be a valid tuple"),
        ("[3]", "schedule.0: 3 is no change; write e.g. {after: 50k, set: {optimizer.lr: 1e-4}}"),
        ("[{after: 1k, cp.weight: 3}]", "{'after': '1k', 'cp.weight': 3} is no change; write e.g."),
        ("[{after: 1k, set: {}}]", "schedule.0.set={}: dictionary should have at least 1 item"),
        ("[{after: 0, set: {cp.weight: 3}}]", "schedule.0.after=0: input should be greater than 0"),
        ("[{after: 5m, set: {cp.weight: 3}}]", "schedule.0.after: '5m' is not a count"),
        (
            "[{after: 2k, set: {cp.weight: 3}}, {after: 1k, set: {cp.weight: 2}}]",
            f"schedule.1: after=1000 {NOT_TWICE}",
        ),
        (
            "[{after: 1000, set: {cp.weight: 3}}, {after: 1024, set: {cp.weight: 2}}]",
            f"schedule.1: after=1024 {NOT_TWICE}",
        ),
        (
            "[{after: 28k, set: {cp.weight: 3}}]",
            "schedule.0: after=28000 is not before the last step of train.images=28000; leave the "
            "entry out, or train longer",
        ),
        ("[{after: 27999, set: {cp.weight: 3}}]", "after=27999 is not before the last step"),
        (
            "[{after: 1k, set: {train.batch: 64}}]",
            f"schedule.0: train.batch cannot change on the way; use {CHANGEABLE}",
        ),
        ("[{after: 1k, set: {cp: {weight: 3}}}]", f"cp cannot change on the way; use {CHANGEABLE}"),
        ("[{after: 1k, set: {schedule: []}}]", "schedule.0: schedule cannot change on the way"),
        (
            "[{after: 1k, set: {cp.wieght: 3}}]",
            "schedule.0: cp.wieght: unknown key; did you mean cp.weight?",
        ),
        (
            "[{after: 1k, set: {cp.window.x: 3}}]",
            "schedule.0: cp.window.x: cp.window has no fields",
        ),
        (
            "[{after: 1k, set: {cp.weight: 3}}, {after: 2k, set: {cp.weight: abc}}]",
            "schedule.1: cp.weight='abc': input should be a valid number",
        ),
        (
            "[{after: 1k, set: {cp.fraction: .3}}]",
            "schedule.0: cp.fraction=0.3 of the 16 images that a lane has",
        ),
        (
            "[{after: 1k, set: {cp.reuse_d0: false}}, {after: 2k, set: {cp.estimator: regress}}]",
            "schedule.1: cp.estimator=regress trains the high-noise start only",
        ),
        (
            "[{after: 1k, set: {cp.weight: 0}}]",
            "schedule.0: cp.weight=0 and at first 1: CP cannot be turned on or off on the way; use "
            "a small weight instead of 0",
        ),
    ],
)
def test_mistakes_are_explained_in_one_line_that_names_the_entry(schedule, message):
    with pytest.raises(ConfigError) as caught:
        digits(f"schedule={schedule}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_consistency_is_not_turned_on_on_the_way():
    with pytest.raises(ConfigError, match="cp.weight=3 and at first 0: CP cannot be turned on"):
        digits("cp.weight=0", "schedule=[{after: 1k, set: {cp.weight: 3}}]")
    alone = digits(TWO).without_cp()
    assert alone == digits("cp.weight=0", "schedule=[{after: 1k, set: {optimizer.lr: 5e-4}}]")
    assert digits().without_cp() == digits("cp.weight=0")


def test_bridges_have_fields_of_their_own_that_change():
    for key in ("anneal.sigma", "optimizer.schedule", "simulation.replay", "network.width"):
        with pytest.raises(ConfigError) as caught:
            bridge(f"schedule=[{{after: 1, set: {{{key}: 2}}}}]")
        told = f"schedule.0: {key} cannot change on the way; use optimizer.lr, control.*, ema.*"
        assert told in str(caught.value)
    with pytest.raises(ConfigError, match="after=1200 is not before .* train.iterations=1200"):
        bridge("schedule=[{after: 1200, set: {ema.decay: 0}}]")


def test_what_is_wrong_without_the_schedule_is_told_without_it():
    with pytest.raises(ConfigError) as caught:
        digits(TWO, "train.batch=60")
    assert str(caught.value).startswith("train.batch=60 is not divisible by data.lanes=8")


def test_a_schedule_is_learned_and_is_one_parameter_however_it_is_written():
    config = digits(TWO)
    assert config.learned()["schedule"] == [
        {"after": 1000, "set": {"cp.weight": 3.0, "optimizer.lr": 5e-4}},
        {"after": 20000, "set": {"cp.weight": 10.0}},
    ]
    assert config.run_name != digits().run_name
    same = [{"after": 1000, "set": {"cp.weight": 3.0, "optimizer.lr": 0.0005}}]
    same.append({"after": "20k", "set": {"cp.weight": "10"}})
    assert digits(f"schedule={same}").run_name == config.run_name
    assert digits(TWO, "schedule=[]") == digits()
    changed = config.changed_from(digits())
    assert list(changed) == ["schedule"]
    described = {key: default for key, default, _ in describe(ImageConfig)}
    assert described["schedule"] == "[]"
    assert described.keys() == flatten(config).keys()


def test_a_run_with_a_schedule_may_be_continued_to_another_length():
    assert digits(TWO).length_field == "train.images"
    plain = "schedule=[{after: 1, set: {optimizer.lr: 1e-4}}]"
    assert bridge(plain).length_field is None  # the cosine
    assert bridge(plain, "optimizer.schedule=constant").length_field == "train.iterations"


def test_a_configuration_with_a_schedule_survives_files_copies_and_other_processes(tmp_path):
    config = digits(TWO)
    assert config.segments
    (tmp_path / "mine.yaml").write_text(to_yaml(config))
    assert load_config(ImageConfig, str(tmp_path / "mine.yaml")) == config
    assert build_config(ImageConfig, yaml.safe_load(to_yaml(config))) == config
    for same in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config
        assert in_effect(same, 8) == (3, 5e-4)
    resolved = config.resolved()
    assert resolved.resolved() == resolved
    assert resolved.at(8).run_name == config.run_name
    # a copy with other fields has other configurations on the way
    later = Change(after=2560, set={"cp.weight": 5})
    assert list(config.model_copy(update={"schedule": (later,)}).segments) == [0, 20]
