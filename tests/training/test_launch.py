"""A run's folder is claimed by one run: the same settings continue it, others are refused."""

import pytest

from cdm_ray.cluster import ray_storage
from cdm_ray.config import BridgeConfig, load_config, read_config
from cdm_ray.errors import ConfigError
from cdm_ray.storage import path_of
from cdm_ray.training.launch import claim_folder


@pytest.fixture(params=["local", "memory"])
def claim(request, tmp_path, memory):
    """Claims the folder of a run for the given overrides."""
    storage = str(tmp_path / "runs") if request.param == "local" else f"{memory}/runs"

    def claim_with(*overrides):
        names = [f"run.storage={storage}", "run.name=mine", "optimizer.schedule=constant"]
        config = load_config(BridgeConfig, "ou", [*names, *overrides]).resolved()
        claim_folder(config)
        return config

    return claim_with


def test_the_configuration_is_written_and_the_same_or_a_longer_run_continues(claim):
    claim()
    config = claim("train.iterations=5k")
    assert read_config(BridgeConfig, config.run_folder / "config.yaml") == config
    assert [path.name for path in config.storage.iterdir()] == ["mine"]
    assert [path.name for path in config.run_folder.iterdir()] == ["config.yaml"]


def test_another_run_in_the_folder_is_refused(claim):
    claim()
    with pytest.raises(ConfigError, match=r"mine holds a run with other .*\(run.seed was 0, is 1"):
        claim("run.seed=1")


def test_ray_gets_a_url_as_a_file_system_and_a_path_in_it(memory, tmp_path):
    assert ray_storage(tmp_path) == (str(tmp_path), None)
    path, system = ray_storage(path_of(f"{memory}/runs/ray"))
    assert f"memory:/{path}" == f"{memory}/runs/ray"
    system.create_dir(path)
    with system.open_output_stream(f"{path}/state.json") as file:
        file.write(b"{}")
    assert path_of(f"{memory}/runs/ray/state.json").read_bytes() == b"{}"
