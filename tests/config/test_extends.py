"""A recipe that extends others has their fields under its own; a wrong `extends` is refused."""

from __future__ import annotations

import pytest

from cdm_ray.config import ImageConfig, flatten, load_config, recipe_names
from cdm_ray.config.loading import part_names
from cdm_ray.errors import ConfigError

EVAL = "eval: {extractor_file: inception.pt}\n"


@pytest.fixture
def load(tmp_path):
    """load({file: text}, first, *overrides): the first file's configuration, beside the others."""

    def write_and_load(files: dict[str, str], first: str = "mine.yaml", *overrides: str):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return load_config(ImageConfig, str(tmp_path / first), overrides)

    return write_and_load


def differences(a, b):
    return {key for key, value in flatten(a).items() if flatten(b)[key] != value}


def test_own_fields_are_laid_over_those_of_a_recipe_of_the_package(load):
    mine = load({"mine.yaml": "extends: digits\ntrain: {batch: 64}\ncp: {window: 0.3}\n"})
    digits = load_config(ImageConfig, "digits")
    assert differences(mine, digits) == {"recipe", "train.batch", "cp.window"}
    assert (mine.recipe, mine.train.batch, mine.cp.window) == ("mine", 64, 0.3)


def test_overrides_are_laid_over_everything(load):
    files = {"mine.yaml": "extends: digits\ntrain: {batch: 64}\n"}
    assert load(files, "mine.yaml", "train.batch=32").train.batch == 32


def test_several_are_merged_from_left_to_right(load):
    mine = load(
        {
            "mine.yaml": f"extends: [a.yaml, b.yaml]\ncp: {{window: 0.3}}\n{EVAL}",
            "a.yaml": "cp: {window: 0.1, weight: 2, fraction: 0.5}\nrun: {seed: 7}",
            "b.yaml": "cp: {window: 0.2, weight: 3}",
        }
    )
    assert (mine.cp.window, mine.cp.weight, mine.cp.fraction) == (0.3, 3.0, 0.5)
    assert mine.run.seed == 7


def test_a_list_of_numbers_is_replaced_and_not_lengthened(load):
    mine = load(
        {
            "mine.yaml": "extends: digits\nnetwork: {channel_mult: [2], attn_resolutions: []}",
        }
    )
    assert (mine.network.channel_mult, mine.network.attn_resolutions) == ((2,), ())


def test_files_are_found_from_the_recipe_that_names_them(load, tmp_path, monkeypatch):
    files = {
        "a/mine.yaml": f"extends: ../b/base.yaml\n{EVAL}",
        "b/base.yaml": "extends: deeper/base.yaml\ntrain: {log_every: 3}",
        "b/deeper/base.yaml": "extends: parts/cp-faithful\nrun: {seed: 5}",
    }
    mine = load(files, "a/mine.yaml")
    assert (mine.train.log_every, mine.run.seed, mine.cp.weight) == (3, 5, 10.0)
    monkeypatch.chdir(tmp_path / "b")
    assert load_config(ImageConfig, "../a/mine.yaml") == mine


def test_a_recipe_may_be_reached_on_two_ways(load):
    mine = load(
        {
            "mine.yaml": f"extends: [a.yaml, b.yaml]\n{EVAL}",
            "a.yaml": "extends: base.yaml\nrun: {seed: 1}",
            "b.yaml": "extends: base.yaml\ntrain: {log_every: 4}",
            "base.yaml": "run: {seed: 9, storage: there}",
        }
    )
    # b.yaml comes later, and with it what it extends
    assert (mine.run.seed, mine.run.storage, mine.train.log_every) == (9, "there", 4)


def test_a_run_is_called_after_the_recipe_that_was_asked_for(load):
    files = {"mine.yaml": "extends: base.yaml", "base.yaml": f"recipe: digits\n{EVAL}"}
    assert load(files).recipe == "mine"
    assert load(files, "base.yaml").recipe == "digits"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"mine.yaml": "extends: mine.yaml"}, "extends itself: .*mine.yaml -> .*mine.yaml$"),
        (
            {"mine.yaml": "extends: a.yaml", "a.yaml": "extends: [digits, x/../mine.yaml]"},
            r"mine\.yaml: extends itself: .*mine\.yaml -> .*a\.yaml -> .*mine\.yaml$",
        ),
        (
            {"mine.yaml": "extends: a.yaml"}
            | {"a.yaml": "extends: b.yaml", "b.yaml": "extends: a.yaml"},
            r"extends itself: .*a\.yaml -> .*b\.yaml -> .*a\.yaml$",
        ),
        ({"mine.yaml": "extends: digts"}, r"'digts', which .*mine\.yaml extends; did you mean"),
        ({"mine.yaml": "extends: cp-faithful"}, "did you mean parts/cp-faithful"),
        ({"mine.yaml": "extends: [digits, no.yaml]"}, r"no\.yaml, which .* extends: no such"),
        ({"mine.yaml": "extends: ../digits"}, r"unknown recipe '\.\./digits'"),
        ({"mine.yaml": "extends: 3"}, "extends=3 must be the name of a recipe or a list"),
        ({"mine.yaml": "extends: [digits, 3]"}, r"extends=\['digits', 3\] must be"),
        ({"mine.yaml": "extends: {a: b}"}, "must be the name of a recipe or a list"),
        ({"mine.yaml": "extends:"}, "extends=None must be"),
        ({"mine.yaml": "extends: a.yaml", "a.yaml": "- 1"}, r"a\.yaml: must be a mapping"),
        ({"mine.yaml": "extends: digits\nextend: a"}, "extend: unknown key"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_one_line(load, files, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(files | {"x/keep.yaml": ""})
    assert "\n" not in str(caught.value)


def test_parts_are_no_recipes():
    assert not [name for name in recipe_names(ImageConfig) if "/" in name]
    assert part_names()
    for name in part_names():
        with pytest.raises(ConfigError, match=f"unknown recipe '{name}'"):
            load_config(ImageConfig, name)
