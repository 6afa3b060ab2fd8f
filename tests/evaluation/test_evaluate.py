import json
import logging
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_ray.config import ImageConfig, build_config
from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.evaluate import evaluate, load_network, plan
from cdm_ray.evaluation.features import load_extractor
from cdm_ray.evaluation.figures import sample_grid
from cdm_ray.evaluation.frechet import FeatureStatistics, frechet_distance
from cdm_ray.evaluation.generate import KINDS, generate
from cdm_ray.networks import build_network

IMAGES = 70


def config(path, **evaluation):
    values = {
        "data": {"path": path, "resolution": 8, "channels": 1, "lanes": 4},
        "network": {
            "model_channels": 8,
            "channel_mult": [1],
            "num_blocks": 1,
            "attn_resolutions": [],
            "class_conditional": True,
        },
        "sampler": {"ode_steps": 3, "sde_steps": 6},
        "eval": {
            "images": IMAGES,
            "batch": 32,
            "extractor": "digits",
            "grid": 40,
            "drift_images": 50,
            "drift_sigmas": 3,
            "first_seed": 7,
            **evaluation,
        },
    }
    return build_config(ImageConfig, values)


@pytest.fixture(scope="module")
def weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network(config("x").network, resolution=8, channels=1, label_dim=10)
        return {k: v + 0.05 * torch.randn_like(v) for k, v in network.state_dict().items()}


@pytest.fixture
def run(dataset, weights, tmp_path, map_tasks):
    def run(**evaluation):
        return evaluate(
            config(dataset.path, **evaluation),
            weights,
            dataset.manifest,
            cache_folder=tmp_path / "cache",
            out_folder=tmp_path / "out",
            map_tasks=map_tasks,
        )

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture(scope="module")
def result(dataset, weights, folder):
    """Of the configuration as it stands, for tests that only look at it."""
    return evaluate(
        config(dataset.path),
        weights,
        dataset.manifest,
        cache_folder=folder / "cache",
        out_folder=folder / "out",
        map_tasks=lambda function, items, description: [function(item) for item in items],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_distance_is_that_of_the_generated_images_to_all_real_ones(
    result, dataset, digits, weights, kind
):
    cfg = config(dataset.path)
    extractor = load_extractor(cfg.eval, "cpu")
    real = FeatureStatistics.of(extractor(torch.from_numpy(digits[0])[:, None]))
    network = load_network(cfg, weights, 10, "cpu")
    images = generate(network, cfg, range(7, 7 + IMAGES), 10, kind, "cpu")
    expected = frechet_distance(FeatureStatistics.of(extractor(images)), real)
    # Rounding of other batch sizes may move single pixels by one grey level.
    assert result.metrics[f"fd_digits_{kind}"] == pytest.approx(expected, rel=1e-3)
    with Image.open(result.grids[kind]) as grid:
        difference = np.asarray(grid).astype(int) - np.asarray(sample_grid(images[:40]))
    assert np.abs(difference).max() <= 1


def test_every_number_comes_with_its_counts(result):
    metrics = result.metrics
    assert set(metrics) == {
        "fd_digits_ode",
        "fd_digits_sde",
        "fd_images",
        "fd_reference_images",
        "cp_residual",
        "cp_residual_se",
        "cp_residual_on_data",
        "cp_residual_on_data_se",
        "drift_images",
        "nfe_ode",
        "nfe_sde",
    }
    assert metrics["fd_images"] == 70
    assert metrics["fd_reference_images"] == 200
    assert metrics["drift_images"] == 50
    assert (metrics["nfe_ode"], metrics["nfe_sde"]) == (5, 6)
    assert all(np.isfinite(value) for value in metrics.values())


def test_files_are_written_where_asked_and_results_are_json(result, folder, dataset):
    assert {path.name for path in (folder / "out").iterdir()} == {
        "samples_ode.png",
        "samples_sde.png",
        "cp_residual.png",
        "noise_norm.png",
        "results.json",
    }
    assert set(result.figures) == {"cp_residual", "noise_norm"}
    assert all(path.is_file() for path in (*result.figures.values(), *result.grids.values()))
    content = json.loads((folder / "out" / "results.json").read_text())
    assert content["metrics"] == result.metrics
    assert content["dataset"]["fingerprint"] == dataset.manifest.fingerprint
    curve = content["drift"]["cp_residual_per_dimension"]["sde states, 4 steps"]
    assert len(curve["mean"]) == len(content["drift"]["sigmas"]["sde"]) == 3
    assert curve["images"] == 50


def test_results_do_not_depend_on_how_the_work_is_split_and_are_logged(result, run, caplog):
    with caplog.at_level(logging.INFO):
        metrics = run(batch=9).metrics  # with everything pickled on the way
    for name, value in result.metrics.items():
        # float32 rounding of other batch sizes, and single pixels moved by it.
        assert metrics[name] == pytest.approx(value, rel=2e-3), name
    assert "fd_digits of ODE samples" in caplog.text
    assert "70 generated, 200 real images" in caplog.text
    assert "CP residual" in caplog.text
    assert "(50 images)" in caplog.text


def test_more_drift_images_than_generated_ones_are_as_many_as_there_are(run):
    assert run(images=66, drift_images=500).metrics["drift_images"] == 66


def test_unconditional_network_on_labelled_data(dataset, tmp_path, map_tasks):
    cfg = config(dataset.path)
    network = cfg.network.model_copy(update={"class_conditional": False})
    cfg = cfg.model_copy(update={"network": network})
    weights = build_network(network, resolution=8, channels=1, label_dim=0).state_dict()
    folders = {"cache_folder": tmp_path / "cache", "out_folder": tmp_path / "out"}
    result = evaluate(cfg, weights, dataset.manifest, **folders, map_tasks=map_tasks)
    assert np.isfinite(result.metrics["fd_digits_ode"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.a": torch.zeros(3)}, r"1 tensors differ, e.g. model.a is \(3,\) .* be absent"),
        ({"model.map_label.bias": torch.zeros(3)}, r"map_label.bias is \(3,\) .* be \(8,\)"),
        ({"model.map_label.bias": None}, r"map_label.bias is missing and should be \(8,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_task(
    dataset, weights, tmp_path, map_tasks, change, message
):
    folders = {"cache_folder": tmp_path / "cache", "out_folder": tmp_path / "out"}
    changed = {k: v for k, v in (weights | change).items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        evaluate(config(dataset.path), changed, dataset.manifest, **folders, map_tasks=map_tasks)
    assert map_tasks.descriptions == []


def test_loading_weights_leaves_the_callers_random_numbers(weights):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_network(config("x"), weights, 10, "cpu")
    assert torch.equal(torch.rand(3), expected)


def test_plan_covers_every_image_once_in_few_tasks_of_about_a_batch():
    items = plan(config("x", images=5000, batch=100, drift_images=256), real_images=130)
    for source, total, tasks in (("sde", 5000, 32), ("ode", 5000, 32), ("data", 130, 2)):
        rows = [item.rows for item in items if item.source == source]
        assert [index for part in rows for index in part] == list(range(total))
        assert len(rows) == tasks


class Inception(torch.nn.Module):
    """Stand-in with the interface of the field's Inception file: random projections of pixels."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(3 * 64, 2048, generator=generator) / 1000)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        small = torch.nn.functional.interpolate(img, [8, 8])
        return (small.flatten(1) @ self.weight).relu()


def test_inception_gives_a_number_called_fid(run, tmp_path):
    path = tmp_path / "inception.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
        torch.jit.script(Inception()).save(str(path))
    with pytest.warns(UserWarning, match="samples of 2048 features: fewer than 2049"):
        metrics = run(images=20, extractor="inception", extractor_file=str(path)).metrics
    assert metrics["fid_ode"] > 0
    assert metrics["fid_sde"] > 0
    assert not any(name.startswith("fd_digits") for name in metrics)
