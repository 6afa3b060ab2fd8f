"""An export is all that is needed: the network computes the same from it in a bare process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cdm_ray.config import ImageConfig, load_config
from cdm_ray.data.manifest import Manifest, ShardInfo
from cdm_ray.errors import ConfigError
from cdm_ray.export import export
from cdm_ray.initial_weights import initialise
from cdm_ray.networks import build_network
from cdm_ray.networks.exported import load_exported
from cdm_ray.storage import local_file, path_of, write_whole
from tests.checkpoints import make_checkpoint

JOB = Path(__file__).parents[1] / "jobs" / "export.py"
NOT_NEEDED = ("ray", "deepspeed", "mlflow", "webdataset", "pydantic", "yaml", "scipy", "PIL")
ARCHITECTURES = {
    "ddpmpp": ["network.architecture=ddpmpp"],
    "ncsnpp": ["network.architecture=ncsnpp", "network.class_conditional=false"],
    "adm": ["network.architecture=adm", "network.model_channels=32", "augment.p=0.1"],
}


def built(config):
    """The configured network of ten classes with random weights."""
    torch.manual_seed(0)
    network = build_network(
        config.network,
        resolution=config.data.resolution,
        channels=config.data.channels,
        label_dim=10 if config.network.class_conditional else 0,
        augment_dim=config.augment_dim,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.requires_grad_(False)


@pytest.fixture
def made(tmp_path):
    """Configuration, network and checkpoint for some overrides of the digits recipe."""

    def make(*overrides):
        data = f"data.path={tmp_path / 'digits'}"
        config = load_config(ImageConfig, "digits", [*overrides, data, "run.name=mine"])
        network = built(config)
        checkpoint = make_checkpoint(tmp_path / "mine", config, network.state_dict())
        return config, network, checkpoint

    return make


def code_of(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return code


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_code_of_the_card_gives_the_same_images_in_a_bare_process(architecture, made):
    config, network, checkpoint = made(*ARCHITECTURES[architecture])
    folder = export(config, checkpoint)
    code = code_of((folder / "README.md").read_text())
    bare = "".join(f"sys.modules[{name!r}] = None\n" for name in NOT_NEEDED)
    script = f"""
import sys
{bare}
import torch
torch.set_num_threads(1)
{code}
from safetensors.torch import save_file
save_file({{"denoised": denoised, "images": images, "pixels": pixels}}, "outputs.safetensors")
"""
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, timeout=120)
    outputs = load_file(folder / "outputs.safetensors")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of another number of threads have another order
    names = {"load_exported": lambda path: network}
    exec(code.replace("from cdm_ray.networks.exported import load_exported", ""), names)
    torch.set_num_threads(threads)
    assert outputs["pixels"].shape == (4, 1, 8, 8)
    assert outputs["images"].abs().max() < 100
    for name, tensor in outputs.items():
        assert torch.equal(tensor, names[name]), name


def test_the_file_alone_rebuilds_the_network_bit_by_bit(made):
    config, network, checkpoint = made("augment.p=0.1")
    generator = torch.get_rng_state()
    loaded = load_exported(export(config, checkpoint) / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), generator)
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_an_export_is_where_a_run_can_start(made):
    config, network, checkpoint = made()
    path = export(config, checkpoint) / "model.safetensors"
    report = initialise(built(config), str(path))
    assert set(report.copied) == set(network.state_dict())
    other = load_config(ImageConfig, "digits", ["network.channel_mult=[1,1]"])
    with pytest.raises(ConfigError, match=r"set data.resolution=8 .*channel_mult=\[1,2\]"):
        initialise(built(other), str(path))


def test_an_export_lies_beside_the_checkpoints_and_replaces_an_older_one(made, tmp_path):
    config, _, checkpoint = made()
    folder = export(config, checkpoint)
    assert folder == tmp_path / "mine/export/step-00000007"
    (folder / "leftover").touch()
    assert export(config, checkpoint) == folder
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "README.md", "config.yaml"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert load_config(ImageConfig, str(folder / "config.yaml")) == config


def test_a_run_at_a_url_is_exported_there_and_without_credentials(made, memory):
    config, network, near = made("tracking.uri=postgresql://me:hunter2@db/x")
    far = make_checkpoint(path_of(f"{memory}/mine"), config, network.state_dict())
    folder = path_of(f"{memory}/mine/export/step-00000007")
    write_whole(folder / "leftover", b"")
    assert export(config, far) == folder
    expected = export(config, near)
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}
    for name in ("README.md", "config.yaml"):
        assert (folder / name).read_text() == (expected / name).read_text()
    assert "postgresql://***@db/x" in (folder / "config.yaml").read_text()
    with local_file(folder / "model.safetensors") as file:
        found = load_exported(file).state_dict()
    assert all(torch.equal(found[name], t) for name, t in network.state_dict().items())


def test_paths_of_this_machine_are_not_in_the_weights(made):
    config, _, checkpoint = made("network.init=/home/me/edm-cifar10.pkl")
    folder = export(config, checkpoint)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "/home/me" not in json.dumps(file.metadata())
    card = (folder / "README.md").read_text()
    assert "| started from | `edm-cifar10.pkl` |" in card
    assert "/home/me" not in card
    assert "and of the weights that training started from" in card


def test_the_card_says_what_was_trained_on_what(made, tmp_path):
    config, _, checkpoint = made("cp.weight=3", "cp.window=0.125")
    (tmp_path / "digits").mkdir()
    Manifest(
        resolution=8,
        channels=1,
        num_classes=10,
        shards=(ShardInfo(name="a.tar", samples=9, sha256="0" * 64),),
        fingerprint="12" * 32,
    ).save(tmp_path / "digits")
    card = (export(config, checkpoint) / "README.md").read_text()
    for line in (
        "# mine",
        "Diffusion model of 8x8 images with 1 channel, 10 classes: a DDPM++",
        "| training images | 896 (step 7) |",
        "| objective | denoising score matching + 3 x Consistency Property |",
        "| `cp.window` | 0.125 |",
        "| name | digits |",
        f"| fingerprint | `{'12' * 32}` |",
        "These weights were not evaluated.",
        "None is stated yet.",
    ):
        assert line in card


def test_the_card_of_a_run_without_cp_has_no_settings_of_it(made):
    config, _, checkpoint = made("cp.weight=0")
    card = (export(config, checkpoint) / "README.md").read_text()
    assert "| objective | denoising score matching |" in card
    assert "cp." not in card
    assert "| fingerprint | not at hand at the export |" in card


def test_the_card_says_what_changed_on_the_way_until_then(made):
    changes = "{after: 300, set: {cp.weight: 3}}, {after: 10k, set: {cp.weight: 9}}"
    config, _, checkpoint = made(f"schedule=[{changes}]")
    card = (export(config, checkpoint) / "README.md").read_text()
    assert '| after 300 images | `{"cp.weight": 3.0}` |' in card
    assert "9.0" not in card


def test_the_card_has_the_numbers_of_this_checkpoint_alone(made, tmp_path):
    config, _, checkpoint = made()
    for step, value in ((7, 1.25), (8, 99.5)):
        folder = tmp_path / f"mine/evaluation/step-{step:08d}/0123abcd"
        folder.mkdir(parents=True)
        content = {
            "metrics": {"fid_ode": value, "fd_images": 50_000.0, "nfe_ode": 35.0},
            "first_seeds": [0, 50_000],
            "dataset": {"path": "elsewhere", "fingerprint": "34" * 32},
            "extractor": {"name": "inception", "fingerprint": "x"},
            "sampler": config.sampler.model_dump(mode="json"),
        }
        (folder / "results.json").write_text(json.dumps(content))
    card = (export(config, checkpoint) / "README.md").read_text()
    assert "50,000 generated images from each of the first seeds 0, 50,000; features of" in card
    assert "| `fid_ode` | 1.25 |" in card
    assert "99.5" not in card
    assert f"| fingerprint | `{'34' * 32}` |" in card


def test_weights_that_do_not_fit_their_configuration_are_not_exported(made, tmp_path):
    config, network, _ = made()
    tensors = dict(network.state_dict())
    tensors.pop("model.map_layer0.weight")
    checkpoint = make_checkpoint(tmp_path / "other", config, tensors)
    with pytest.raises(ConfigError, match="1 tensors do not fit .* model.map_layer0.weight"):
        export(config, checkpoint)
    assert not (tmp_path / "other/export").exists()


def test_a_safetensors_file_without_the_network_is_not_loaded(tmp_path):
    save_file({"model.weight": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match="use a file that jobs/export.py wrote"):
        load_exported(tmp_path / "plain.safetensors")


def test_the_job_exports_the_newest_checkpoint_of_a_run(made, tmp_path):
    config, _, _ = made()
    make_checkpoint(tmp_path / "mine", config, built(config).state_dict(), step=9)
    job = [sys.executable, str(JOB), str(tmp_path / "mine")]

    def run(*words):
        return subprocess.run([*job, *words], capture_output=True, text=True, timeout=120)

    folder = tmp_path / "mine/export/step-00000009"
    assert f"export      {folder}\n" in run("--dry-run").stdout
    assert not folder.exists()
    refused = run("cp.weight=2")
    assert refused.returncode == 2
    assert "what was learned cannot be changed afterwards (cp.weight was" in refused.stderr
    assert f"export      {folder}\n" in run().stdout
    assert (folder / "model.safetensors").is_file()
