"""Rules of the configuration of bridges: what was given, what is allowed, what to do."""

import pytest

from cdm_ray.config import BridgeConfig, load_config, recipe_names
from cdm_ray.config.bridges import PARAMETERS, ProcessConfig
from cdm_ray.errors import ConfigError

PLANE = ["process.kind=cell", "bridge.start=[1, 1]", "bridge.end=[2, 0.1]"]
GRID = "eval.grid={lower: [-2], upper: [2], points: [101], steps: 100}"


def config(*overrides):
    return load_config(BridgeConfig, None, overrides)


def refused(*overrides):
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_kind_of_process_has_its_own_parameters_with_defaults():
    assert config("process.kind=ou", "process.rate=2").process.parameters == {
        "sigma": 1.0,
        "rate": 2.0,
        "mean": (0.0,),
    }
    assert config("process.height=5").process.parameters["height"] == 5
    known = {name for own in PARAMETERS.values() for name in own}
    assert known == set(ProcessConfig.model_fields) - {"kind"}


@pytest.mark.parametrize(
    ("kind", "parameter", "own"),
    [
        ("ou", "height=2", "sigma, rate, mean"),
        ("double-well", "rate=2", "sigma, height, well"),
        ("cir", "sigma=2", "rate, mean, volatility"),
        ("brownian", "drift=a:b", "sigma"),
    ],
)
def test_a_parameter_of_another_process_is_refused_with_those_it_has(kind, parameter, own):
    message = refused(f"process.kind={kind}", f"process.{parameter}")
    name = parameter.split("=")[0]
    assert f"process.{name} is no parameter of process.kind={kind}, which has {own};" in message


def test_a_drift_of_the_users_has_to_be_named():
    assert "process.kind=user needs process.drift=module:function" in refused("process.kind=user")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["bridge.end=[1, 2]"], "bridge.end=[1.0, 2.0] has 2 numbers, bridge.start 1; give 1"),
        ([*PLANE, "bridge.start=[1]"], "bridge.start=[1.0]: process.kind=cell has 2 dimensions"),
        (["bridge.start=[1, 2]", "bridge.end=[1, 2]"], "process.kind=double-well has 1 dimension"),
        ([*PLANE, "network.scale=[1, 1, 1]"], "has 3 numbers, bridge.start 2; give 1 or 2"),
        (["network.location=[1, 1]"], "network.location=[1.0, 1.0] has 2 numbers"),
        (["process.kind=ou", "process.mean=[1, 1]"], "process.mean=[1.0, 1.0] has 2 numbers"),
        ([*PLANE, GRID], "eval.grid.lower=[-2.0] has 1 numbers, bridge.start 2; give 2"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(overrides, told):
    assert told in refused(*overrides)


def test_one_number_will_do_for_all_dimensions_where_the_text_says_so():
    assert config(*PLANE, "network.scale=[2]", "network.location=[0]").dim == 2


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["control.consistency=auxiliary"], "go together; given: auxiliary and None"),
        (["control.auxiliary=a:b"], "go together; given: sc2 and a:b"),
        (["simulation.replay=2"], "the paths of other weights need control.variate=innovation"),
        (
            ["simulation.replay=2", "control.variate=innovation", "anneal.sigma=2"],
            "simulation.replay and anneal.sigma",
        ),
        (["simulation.paths=100"], "simulation.paths=100 is not divisible by simulation.lanes=8"),
        (["train.pairs=100"], "train.pairs=100 is not divisible by simulation.lanes=8"),
        (["simulation.lanes=6"], "6 is not a power of two"),
        (["ray.workers=9"], "ray.workers=9 is more than simulation.lanes=8"),
        (["eval.format=csv"], "eval.format='csv'"),
        (["eval.paths=1"], "eval.paths=1"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, told):
    assert told in refused(*overrides)


def test_replay_goes_with_the_innovation():
    assert config("simulation.replay=2", "control.variate=innovation").simulation.replay == 2


def test_how_a_run_is_judged_is_no_part_of_its_identity():
    named = config().run_name
    for free in ("eval.paths=10", "eval.seed=3", "eval.format=parquet", GRID, "ray.workers=1"):
        assert config(free).run_name == named
    for learned in ("process.height=4", "bridge.duration=2", "simulation.steps=50", "run.seed=1"):
        assert config(learned).run_name != named


@pytest.mark.parametrize("recipe", recipe_names(BridgeConfig))
def test_recipes_are_read_and_evaluated_often_enough_for_a_curve(recipe):
    read = load_config(BridgeConfig, recipe)
    assert read.recipe == recipe
    assert len(read.evaluation_steps) >= 3  # and one at the end
