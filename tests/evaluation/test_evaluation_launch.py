"""`jobs/evaluate.py` but for Ray: from a checkpoint's folder to files and a table."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from cdm_ray.checkpoint import SCHEMA_VERSION, Checkpoint, digest_of
from cdm_ray.config import ImageConfig, build_config, to_yaml
from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.launch import evaluate_checkpoint, evaluation_folder, print_plan
from cdm_ray.evaluation.results import EvaluationResult, print_evaluation
from cdm_ray.networks import build_network


def config(path, **evaluation):
    values = {
        "run": {"name": "tiny", "storage": "/elsewhere/runs"},
        "data": {"path": path, "resolution": 8, "channels": 1, "lanes": 4},
        "network": {
            "model_channels": 8,
            "channel_mult": [1],
            "num_blocks": 1,
            "attn_resolutions": [],
        },
        "sampler": {"ode_steps": 3, "sde_steps": 3},
        "eval": {
            "images": 20,
            "extractor": "digits",
            "kid_subset": 10,
            "grid": 4,
            "drift_images": 2,
            "drift_sigmas": 2,
            **evaluation,
        },
    }
    return build_config(ImageConfig, values)


def write_checkpoint(folder, path):
    """A checkpoint folder as training writes it; the live weights differ from the averaged ones."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network(config(path).network, resolution=8, channels=1, label_dim=0)
    averaged = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    save_file(averaged, folder / "ema.safetensors")
    save_file(
        {k: torch.full_like(v, torch.nan) for k, v in averaged.items()},
        folder / "weights.safetensors",
    )
    (folder / "config.yaml").write_text(to_yaml(config(path)))
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    state = {"step": 3, "samples_seen": 96, "optimizer_steps": 3}
    content = {"schema": SCHEMA_VERSION, "state": state, "sha256": digests}
    content["digest"] = digest_of(content)
    (folder / "state.json").write_text(json.dumps(content))
    return Checkpoint.open(folder)


@pytest.fixture
def checkpoint(tmp_path, dataset):
    return write_checkpoint(tmp_path / "runs/tiny/checkpoints/step-00000003", dataset.path)


def test_results_lie_in_the_run_wherever_it_was_moved_to(checkpoint, dataset, tmp_path, map_tasks):
    result = evaluate_checkpoint(config(dataset.path), checkpoint, map_tasks)
    assert result.folder.parent == tmp_path / "runs/tiny/evaluation/step-00000003"
    assert result.metrics["fd_digits_ode"] > 0  # of the averaged weights: the others are no numbers
    assert {path.suffix for path in (tmp_path / "runs/reference").iterdir()} == {"", ".npz"}
    assert EvaluationResult.find(result.folder) == result


def test_data_that_do_not_fit_the_network_are_refused(
    checkpoint, digits, pack, tmp_path, map_tasks
):
    plain = pack(tmp_path / "plain", digits[0], None, per_shard=100)
    cfg = config(plain.path)
    network = cfg.network.model_copy(update={"class_conditional": True})
    with pytest.raises(ConfigError, match="network.class_conditional=true needs labels"):
        evaluate_checkpoint(cfg.model_copy(update={"network": network}), checkpoint, map_tasks)
    assert map_tasks.descriptions == []


def test_the_plan_names_tasks_images_evaluations_and_bytes(checkpoint, dataset, capsys):
    cfg = config(dataset.path, images=50_000, batch=256, first_seeds=[0, 50_000], drift_images=300)
    print_plan(cfg, checkpoint)
    printed = capsys.readouterr().out
    assert re.search(r"images +100,000 by each of ode and sde, .* 0-49,999, 50,000-99,999", printed)
    # 5 by Heun's 3 steps and 3 by the SDE.
    assert "800,000 network evaluations, per image 5 (ode), 3 (sde)" in printed
    assert re.search(r"tasks +198,", printed)  # 49 for each range and sampler, 2 on real images
    assert f"{100_000 * 2 * 64 * 4:,} bytes" in printed
    assert str(evaluation_folder(checkpoint.run_folder, checkpoint.name)) in printed
    assert not evaluation_folder(checkpoint.run_folder, checkpoint.name).exists()


def test_the_table_has_every_range_and_every_count(checkpoint, dataset, map_tasks, capsys):
    cfg = config(dataset.path, first_seeds=[0, 100])
    result = evaluate_checkpoint(cfg, checkpoint, map_tasks)
    print_evaluation(result)
    printed = capsys.readouterr().out
    assert "seeds 0-19" in printed
    assert "seeds 100-119" in printed
    row = next(line for line in printed.splitlines() if "fd_digits_sde" in line)
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", row)]
    metrics, name = result.metrics, "fd_digits_sde"
    expected = [metrics[name], metrics[f"{name}_min"], *result.ranges[name]]
    assert numbers == pytest.approx(expected, abs=1e-4)
    for text in (
        "20 generated images of each range of seeds against 200 real ones",
        "subsets of 10 images",
        "20 generated and as many real images",
        "5 (ode), 3 (sde)",
        str(result.folder / "results.json"),
        str(result.grids["ode"]),
    ):
        assert text in printed


def test_the_table_of_one_range_has_one_column_of_values(checkpoint, dataset, map_tasks, capsys):
    result = evaluate_checkpoint(config(dataset.path), checkpoint, map_tasks)
    del result.metrics["fd_reference_images"]  # as with a reference that does not say
    print_evaluation(result)
    printed = capsys.readouterr().out
    assert "seeds" not in printed
    assert "min" not in printed.splitlines()[2]
    assert "against an unstated number of real ones" in printed
