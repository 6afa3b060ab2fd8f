"""A configuration means what it says, or is refused in one line that says what would be right."""

import pytest
import yaml

from cdm_ray.config import (
    ImageConfig,
    build_config,
    describe,
    flatten,
    load_config,
    recipe_names,
    to_yaml,
)
from cdm_ray.config.base import parse_count
from cdm_ray.errors import ConfigError


def digits(*overrides):
    return load_config(ImageConfig, "digits", overrides)


@pytest.mark.parametrize(
    ("text", "count"), [("50k", 50_000), ("200M", 200_000_000), ("1.5k", 1500), ("7", 7), (7, 7)]
)
def test_counts_take_units(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["k", "5m", "1.2345k", "-5", "5 000", True])
def test_other_counts_are_refused(text):
    with pytest.raises(ValueError, match="count|whole"):
        parse_count(text)


def test_overrides_change_what_they_name():
    config = digits(
        "train.images=200k", "cp.weight=3", "network.channel_mult=[1,2,2]", "run.seed=7"
    )
    assert (config.train.images, config.cp.weight, config.run.seed) == (200_000, 3.0, 7)
    assert config.network.channel_mult == (1, 2, 2)
    assert digits("optimizer.lr=1e-3").optimizer.lr == 1e-3  # YAML 1.1 reads 1e-3 as text


@pytest.mark.parametrize("recipe", recipe_names(ImageConfig))
def test_round_trip_through_yaml_is_exact(recipe, tmp_path):
    config = load_config(ImageConfig, recipe)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(ImageConfig, str(path)) == config
    assert build_config(ImageConfig, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.imges=3", "train.imges: unknown key; did you mean train.images?"),
        ("cp.wieght=3", "cp.wieght: unknown key; did you mean cp.weight?"),
        ("trian.images=3", "trian: unknown key; did you mean train?"),
        ("weight=3", "weight: unknown key; did you mean cp.weight?"),
        ("data.weight=3", "data.weight: unknown key; did you mean cp.weight?"),
        ("cp=3", "cp=3: is a section; set its fields, e.g. cp.weight=..."),
        ("train.images.x=3", "train.images.x: train.images has no fields"),
        ("cp.weight", "'cp.weight' is not an override; write section.field=value"),
        ("cp.weight=abc", "cp.weight='abc': input should be a valid number"),
        ("cp.weight=-1", "cp.weight=-1: input should be greater than or equal to 0"),
        ("train.images=5m", "train.images: '5m' is not a count"),
        ("cp.step_kind=heun", "'ancestral' or 'euler_maruyama'"),
        ("data.lanes=6", "6 is not a power of two"),
        ("train.batch=60", "train.batch=60 is not divisible by data.lanes=8"),
        ("ray.workers=9", "ray.workers=9 is more than data.lanes=8"),
        ("train.micro_batch=8", "train.micro_batch=8 is less than one lane's share"),
        ("cp.fraction=.3", "cp.fraction=0.3 of the 16 images"),
        ("cp.window=2", "cp.window=2.0 as a share of sigma must be at most 1"),
        ("cp.estimator=regress", "set cp.gradient=high"),
        ("cp.rollout_weights=ema", "needs cp.reuse_d0=false"),
        ("data.resolution=9", "data.resolution=9 cannot be halved 1 times"),
        ("network.attn_resolutions=[16]", "the network have the resolutions [8, 4]"),
        ("eval.extractor=inception", "needs eval.extractor_file"),
        ("eval.images=1", "eval.images=1: input should be greater than or equal to 2"),
        ("run.name=a/b", "'a/b' is no folder name"),
        ("sampler.sigma_min=90", "sampler.sigma_min=90.0 must be below"),
    ],
)
def test_mistakes_are_explained_in_one_line(override, message):
    with pytest.raises(ConfigError) as caught:
        digits(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bf16_needs_sharded_optimizer_state():
    with pytest.raises(ConfigError, match="train.zero_stage=1, 2 or 3"):
        digits("train.precision=bf16", "train.zero_stage=0")


def test_unknown_recipe_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean digits"):
        load_config(ImageConfig, "digts")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(ImageConfig, str(tmp_path / "mine.yaml"))


def test_recipe_file_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config(ImageConfig, str(path))
    path.write_text("train: {images: 5")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(ImageConfig, str(path))


def test_yaml_constructs_no_objects(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"run: !!python/object/apply:os.mkdir ['{tmp_path}/exploded']")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(ImageConfig, str(path))
    assert not (tmp_path / "exploded").exists()


def test_name_follows_from_what_is_learned_and_from_nothing_else():
    name = digits().run_name
    assert name.startswith("digits-")
    for same in ("ray.workers=1", "train.zero_stage=3", "eval.images=50", "run.storage=x"):
        assert digits(same).run_name == name
    for other in ("cp.weight=3", "run.seed=1", "train.images=1k", "data.lanes=4"):
        assert digits(other).run_name != name
    assert digits("run.name=mine").run_name == "mine"


def test_resolved_configuration_is_the_same_run_anywhere(tmp_path, monkeypatch):
    config = digits()
    monkeypatch.chdir(tmp_path)
    resolved = config.resolved()
    assert resolved.run_name == config.run_name
    assert resolved.data.path == str(tmp_path / "data/digits")
    monkeypatch.chdir("/")
    assert resolved.resolved() == resolved
    assert digits("data.path=memory://d").resolved().data.path == "memory://d"


def test_every_field_has_a_help_text():
    described = list(describe(ImageConfig))
    assert [key for key, _, text in described if not text] == []
    assert {key for key, _, _ in described} == set(flatten(digits()))


def test_steps_cover_all_images():
    assert digits("train.images=100", "train.batch=64").steps == 2
