import json
import logging
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_ray.config import ImageConfig, build_config
from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.evaluate import evaluate
from cdm_ray.evaluation.features import load_extractor
from cdm_ray.evaluation.figures import sample_grid
from cdm_ray.evaluation.frechet import FeatureStatistics, frechet_distance
from cdm_ray.evaluation.generate import KINDS, generate
from cdm_ray.evaluation.kid import kernel_distance
from cdm_ray.evaluation.precision_recall import precision_recall
from cdm_ray.evaluation.work import load_network
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
            "first_seeds": [7],
            "kid_subset": 20,
            "kid_subsets": 10,
            "pr_images": 60,
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


@pytest.fixture(scope="module")
def real(dataset, digits):
    """Features of all real images."""
    return load_extractor(config("x").eval, "cpu")(torch.from_numpy(digits[0])[:, None])


def generated(weights, kind, first_seed=7):
    network = load_network(config("x"), weights, 10, "cpu")
    return generate(network, config("x"), range(first_seed, first_seed + IMAGES), 10, kind, "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_generated_images_and_all_real_ones(result, real, weights, kind):
    images = generated(weights, kind)
    fake = load_extractor(config("x").eval, "cpu")(images)
    expected = frechet_distance(FeatureStatistics.of(fake), FeatureStatistics.of(real))
    # Rounding of other batch sizes may move single pixels by one grey level.
    assert result.metrics[f"fd_digits_{kind}"] == pytest.approx(expected, rel=1e-3)
    kernel = kernel_distance(real, fake, subset=20, subsets=10, device="cpu")
    assert result.metrics[f"kd_digits_{kind}"] == pytest.approx(kernel.mean, rel=1e-3)
    assert result.metrics[f"kd_digits_{kind}_std"] == pytest.approx(kernel.std, rel=1e-3)
    spread = real[[(2 * i + 1) * 200 // 120 for i in range(60)]]  # the data set is sorted by class
    shares = precision_recall(spread, fake[:60])
    assert result.metrics[f"precision_digits_{kind}"] == pytest.approx(shares.precision, abs=0.02)
    assert result.metrics[f"recall_digits_{kind}"] == pytest.approx(shares.recall, abs=0.02)
    with Image.open(result.grids[kind]) as grid:
        difference = np.asarray(grid).astype(int) - np.asarray(sample_grid(images[:40]))
    assert np.abs(difference).max() <= 1


def test_every_number_comes_with_its_counts(result):
    metrics = result.metrics
    quantities = ("fd", "kd", "precision", "recall")
    assert set(metrics) == {
        *(f"{quantity}_digits_{kind}" for quantity in quantities for kind in KINDS),
        *(f"kd_digits_{kind}_std" for kind in KINDS),
        "fd_images",
        "fd_reference_images",
        "kid_subset",
        "pr_images",
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
    assert metrics["kid_subset"] == 20
    assert metrics["pr_images"] == 60
    assert metrics["drift_images"] == 50
    assert (metrics["nfe_ode"], metrics["nfe_sde"]) == (5, 6)
    assert all(np.isfinite(value) for value in metrics.values())


def test_files_are_written_where_asked_and_results_are_json(result, folder, dataset):
    assert list((folder / "out").iterdir()) == [result.folder]  # the parts are gone
    assert {path.name for path in result.folder.iterdir()} == {
        "samples_ode.png",
        "samples_sde.png",
        "cp_residual.png",
        "noise_norm.png",
        "results.json",
    }
    assert set(result.figures) == {"cp_residual", "noise_norm"}
    assert all(path.is_file() for path in (*result.figures.values(), *result.grids.values()))
    content = json.loads((result.folder / "results.json").read_text())
    assert content["metrics"] == result.metrics
    assert content["dataset"]["fingerprint"] == dataset.manifest.fingerprint
    curve = content["drift"]["cp_residual_per_dimension"]["sde states, 4 steps"]
    assert len(curve["mean"]) == len(content["drift"]["sigmas"]["sde"]) == 3
    assert curve["images"] == 50


def test_results_do_not_depend_on_how_the_work_is_split(result, run):
    metrics = run(batch=9).metrics  # with everything pickled on the way
    for name, value in result.metrics.items():
        # float32 rounding of other batch sizes, and single pixels moved by it, which may carry one
        # of 60 images over the edge of a ball.
        tolerance = {"abs": 0.02} if name.startswith(("precision", "recall")) else {}
        assert metrics[name] == pytest.approx(value, rel=2e-3, **tolerance), name


def test_each_range_of_seeds_has_its_own_images_and_the_mean_is_reported_beside_the_minimum(
    run, result, real, weights
):
    found = run(first_seeds=[7, 500])
    extractor = load_extractor(config("x").eval, "cpu")
    for kind in KINDS:
        name = f"fd_digits_{kind}"
        first, second = found.ranges[name]
        assert first == result.metrics[name] == result.ranges[name][0]
        features = extractor(generated(weights, kind, first_seed=500))
        expected = frechet_distance(FeatureStatistics.of(features), FeatureStatistics.of(real))
        assert second == pytest.approx(expected, rel=1e-3)
        assert found.metrics[name] == pytest.approx((first + second) / 2)
        assert found.metrics[f"{name}_min"] == min(first, second)
        assert found.metrics[f"kd_digits_{kind}_min"] == min(found.ranges[f"kd_digits_{kind}"])
    # Of the first range only; its images, and with them the grid, are the same.
    assert found.metrics["cp_residual"] == result.metrics["cp_residual"]
    assert found.grids["ode"].read_bytes() == result.grids["ode"].read_bytes()


def test_another_reference_moves_the_frechet_distance_alone(run, result, real, tmp_path):
    path, statistics = tmp_path / "edm.npz", FeatureStatistics.of(real[:100])
    np.savez(path, mu=statistics.mean, sigma=statistics.covariance)
    found = run(reference=str(path)).metrics
    changed = {name for name in result.metrics if found.get(name) != result.metrics[name]}
    # EDM's files do not say how many images they are from, and neither does the evaluation.
    assert changed == {"fd_digits_ode", "fd_digits_sde", "fd_reference_images"}
    assert "fd_reference_images" not in found


def test_the_data_sets_own_statistics_as_reference_change_nothing(run, result, folder):
    (path,) = (folder / "cache").glob("reference-digits-*.npz")
    assert run(reference=str(path)).metrics == pytest.approx(result.metrics, rel=1e-9)


def test_a_reference_that_does_not_fit_is_refused_before_any_task(run, map_tasks, tmp_path):
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ConfigError, match="2048 features, eval.extractor=digits gives 64"):
        run(reference=str(tmp_path / "edm.npz"))
    assert map_tasks.descriptions == []


def test_too_few_samples_are_one_line_in_the_log_that_names_both_numbers(run, caplog):
    with caplog.at_level(logging.WARNING):
        run(images=20, drift_images=4, first_seeds=[7, 500])
    (line,) = [record.message for record in caplog.records if "Fréchet" in record.message]
    assert line.startswith("Fréchet distance from 20 samples of 64 features: fewer than 65")


def test_fewer_images_than_a_subset_are_used_whole_and_logged(run, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = run(images=66, drift_images=4, kid_subset=1000).metrics
    assert metrics["kid_subset"] == 66
    assert "subsets of 66 images instead of eval.kid_subset=1000" in caplog.text


def test_very_few_images_still_have_precision_and_recall_and_the_log_says_how(run, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = run(images=3, drift_images=2, kid_subset=2, grid=2).metrics
    assert metrics["pr_images"] == 3
    assert 0 <= metrics["recall_digits_ode"] <= 1
    assert "precision and recall with 2 instead of 3 neighbours" in caplog.text


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


class Inception(torch.nn.Module):
    """Stand-in with the interface of the field's Inception file: random projections of pixels."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(3 * 64, 2048, generator=generator) / 1000)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        small = torch.nn.functional.interpolate(img, [8, 8])
        return (small.flatten(1) @ self.weight).relu()


def test_inception_gives_numbers_with_the_fields_names(run, tmp_path):
    path = tmp_path / "inception.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
        torch.jit.script(Inception()).save(str(path))
    metrics = run(
        images=20, drift_images=4, extractor="inception", extractor_file=str(path)
    ).metrics
    names = {name.removesuffix("_ode") for name in metrics if name.endswith("_ode")}
    assert names == {"fid", "kid", "precision", "recall", "nfe"}
    assert "kid_ode_std" in metrics
    assert metrics["fid_ode"] > 0
    assert not any("digits" in name or name.startswith(("fd_o", "kd_")) for name in metrics)
