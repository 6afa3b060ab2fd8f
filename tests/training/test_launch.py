"""A run's folder is continued by the run that it holds, to another length only where that changes
nothing of what was learned; no cluster is started."""

import pytest

from cdm_ray.cluster import ray_storage
from cdm_ray.config import BridgeConfig, ImageConfig, load_config, read_config
from cdm_ray.errors import ConfigError
from cdm_ray.storage import path_of
from cdm_ray.training.launch import CONFIG_FILE, claim_folder

CONSTANT = "optimizer.schedule=constant"
RECIPES = {BridgeConfig: "double-well-3", ImageConfig: "digits"}


@pytest.fixture(params=["local", "memory"])
def claim(request, tmp_path, memory):
    """Claims the folder of the run `same`; returns its configuration as it was written there."""
    storage = str(tmp_path / "runs") if request.param == "local" else f"{memory}/runs"

    def claim(kind, *overrides):
        given = [f"run.storage={storage}", "run.name=same", *overrides]
        config = load_config(kind, RECIPES[kind], given).resolved()
        claim_folder(config)
        assert [path.name for path in config.storage.iterdir()] == ["same"]
        assert [path.name for path in config.run_folder.iterdir()] == [CONFIG_FILE]
        return read_config(kind, config.run_folder / CONFIG_FILE)

    return claim


@pytest.mark.parametrize("iterations", [20, 5], ids=["longer", "shorter"])
def test_a_bridge_at_a_constant_rate_may_be_continued_to_another_length(claim, iterations):
    claim(BridgeConfig, CONSTANT, "train.iterations=10")
    again = claim(BridgeConfig, CONSTANT, f"train.iterations={iterations}")
    assert again.train.iterations == iterations


@pytest.mark.parametrize(
    "course",
    [
        ["optimizer.schedule=cosine"],
        [CONSTANT, "anneal.drift=linear"],
        [CONSTANT, "anneal.sigma=2"],
        [CONSTANT, "anneal.tolerance=0.1"],
    ],
    ids=lambda course: course[-1],
)
def test_a_bridge_whose_course_depends_on_its_length_keeps_it(claim, course):
    claim(BridgeConfig, *course, "train.iterations=10")
    told = r"holds a run with other settings \(train.iterations was 10, is 20\); choose another"
    with pytest.raises(ConfigError, match=told):
        claim(BridgeConfig, *course, "train.iterations=20")
    assert claim(BridgeConfig, *course, "train.iterations=10").train.iterations == 10


def test_a_longer_run_is_refused_for_whatever_else_is_learned_otherwise(claim):
    claim(BridgeConfig, CONSTANT, "train.iterations=10")
    longer = [CONSTANT, "train.iterations=20"]
    with pytest.raises(ConfigError, match=r"settings \(process.height was 3.0, is 4.0\); choose"):
        claim(BridgeConfig, *longer, "process.height=4")
    assert claim(BridgeConfig, *longer, "eval.paths=32").eval.paths == 32


def test_images_are_trained_to_another_length_too(claim):
    claim(ImageConfig, "train.images=1000")
    assert claim(ImageConfig, "train.images=2000").train.images == 2000


def test_ray_gets_a_url_as_a_file_system_and_a_path_in_it(memory, tmp_path):
    assert ray_storage(tmp_path) == (str(tmp_path), None)
    path, system = ray_storage(path_of(f"{memory}/runs/ray"))
    assert f"memory:/{path}" == f"{memory}/runs/ray"
    system.create_dir(path)
    with system.open_output_stream(f"{path}/state.json") as file:
        file.write(b"{}")
    assert path_of(f"{memory}/runs/ray/state.json").read_bytes() == b"{}"
