import numpy as np
import pytest
import torch

from cdm_ray.config import EvalConfig
from cdm_ray.evaluation.frechet import FeatureStatistics, GivenMoments, frechet_distance
from cdm_ray.evaluation.parts import write_part
from cdm_ray.evaluation.reference_features import ReferenceFeatures
from cdm_ray.evaluation.scores import Judge, metric_name, read_score, score, summary

DIM = 5


def features(seed, count):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, DIM))).float()


def write(folder, values, sizes):
    folder.mkdir()
    paths = []
    for index, part in enumerate(values.split(sizes)):
        paths.append(folder / f"{index}.safetensors")
        write_part(paths[-1], {"features": part})
    return paths


@pytest.fixture
def judge(tmp_path):
    def judge(real, moments=None, **evaluation):
        statistics = FeatureStatistics.of(real)
        parts = tuple(write(tmp_path / f"real-{len(real)}", real, [len(real) - 9, 9]))
        evaluation = {"extractor": "digits", "images": 100, "kid_subset": 50, **evaluation}
        reference = ReferenceFeatures(parts, statistics)
        return Judge(EvalConfig(**evaluation), moments or statistics, reference)

    return judge


def test_scores_are_of_all_parts_however_they_were_cut(judge, tmp_path):
    real, fake = features(0, 120), features(1, 100)
    asked = judge(real)
    one, many = (
        score(asked, write(tmp_path / str(len(sizes)), fake, sizes))
        for sizes in ([100], [1, 30, 50, 19])
    )
    assert one == many
    expected = frechet_distance(FeatureStatistics.of(fake), FeatureStatistics.of(real))
    assert one["fd"].item() == pytest.approx(expected, rel=1e-12)


def test_scores_survive_their_file_to_the_last_digit(judge, tmp_path):
    found = score(judge(features(0, 120)), write(tmp_path / "fake", features(1, 100), [100]))
    write_part(tmp_path / "score.safetensors", found)
    assert read_score(tmp_path / "score.safetensors") == {k: v.item() for k, v in found.items()}


def test_precision_and_recall_are_of_equally_many(judge, tmp_path):
    # Real images in two clusters one after the other: the first 40 would be of one of them only.
    fake = torch.cat([features(1, 40), features(2, 60) + 100])
    real = torch.cat([features(3, 60), features(4, 60) + 100])
    paths = write(tmp_path / "fake", fake, [100])
    found = score(judge(real, pr_images=40), paths)
    assert found["precision"] > 0.5
    assert 0.25 < found["recall"] < 0.5  # generated ones are of the first cluster: half of the real
    counts = judge(features(5, 30), pr_images=40, kid_subset=1000).counts
    assert counts.precision_recall == counts.kid_subset == 30


def test_caveats_name_all_that_is_too_few(judge):
    assert judge(features(0, 120)).caveats() == []
    few = judge(features(0, 12), images=3, kid_subset=50)
    lines = few.caveats()
    assert lines[0].startswith("Fréchet distance from 3 samples of 5 features: fewer than 6")
    assert "subsets of 3 images instead of eval.kid_subset=50: there are 3 generated" in lines[1]
    assert "with 2 instead of 3 neighbours" in lines[2]
    assert len(lines) == 3


def test_too_few_images_behind_the_reference_are_named_if_their_number_is_known(judge):
    zero, one = np.zeros(DIM), np.eye(DIM)
    (line,) = judge(features(0, 120), GivenMoments(zero, one, 4)).caveats()
    assert "from 4 samples of 5 features" in line
    assert judge(features(1, 121), GivenMoments(zero, one)).caveats() == []


def test_means_over_ranges_and_minima_of_distances():
    ranges = [
        {"fd": 3.0, "kd": 0.2, "kd_std": 0.01, "precision": 0.5, "recall": 0.25},
        {"fd": 2.0, "kd": 0.4, "kd_std": 0.03, "precision": 0.75, "recall": 0.5},
    ]
    metrics, values = summary({"ode": ranges}, "inception", 2048)
    assert metrics == pytest.approx(
        {
            "fid_ode": 2.5,
            "fid_ode_min": 2.0,
            "kid_ode": 0.3,
            "kid_ode_min": 0.2,
            "kid_ode_std": 0.02,
            "precision_ode": 0.625,
            "recall_ode": 0.375,
        }
    )
    assert values["fid_ode"] == [3.0, 2.0]
    assert set(values) == {name for name in metrics if not name.endswith("_min")}
    assert not any(name.endswith("_min") for name in summary({"ode": ranges[:1]}, "x", 3)[0])


def test_only_inception_with_2048_features_has_the_fields_names():
    assert metric_name("fd", "ode", "inception", 2048) == "fid_ode"
    assert metric_name("kd_std", "sde", "inception", 2048) == "kid_sde_std"
    assert metric_name("fd", "ode", "inception", 64) == "fd_inception_ode"
    assert metric_name("kd", "ode", "digits", 64) == "kd_digits_ode"
    assert metric_name("kd_std", "ode", "digits", 64) == "kd_digits_ode_std"
    assert metric_name("precision", "ode", "digits", 2048) == "precision_digits_ode"
