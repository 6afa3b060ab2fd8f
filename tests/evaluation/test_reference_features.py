import hashlib
import io
import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from cdm_ray.config import EvalConfig
from cdm_ray.data.shards import DataError
from cdm_ray.errors import ConfigError
from cdm_ray.evaluation import reference_features as module
from cdm_ray.evaluation.features import load_extractor
from cdm_ray.evaluation.frechet import FeatureStatistics
from cdm_ray.evaluation.reference_features import read_features, read_moments, reference_features

CONFIG = EvalConfig(extractor="digits")
EXTRACTOR = load_extractor(CONFIG, "cpu")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Three parts of the 200 images in shards of 30."""
    monkeypatch.setattr(module, "_PART_IMAGES", 70)


def tensor(images):
    return torch.from_numpy(images)[:, None]


def damage_first_image(dataset):
    """The data set with its first PNG broken in a way that the shard's digest does not show."""
    path = Path(dataset.path) / "shard-0.tar"
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT") + 8
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    first, *others = dataset.manifest.shards
    first = first.model_copy(update={"sha256": hashlib.sha256(content).hexdigest()})
    return replace(
        dataset, manifest=dataset.manifest.model_copy(update={"shards": (first, *others)})
    )


def npz_in(cache):
    (path,) = cache.glob("*.npz")
    return path


def test_features_are_of_every_image_in_order_and_without_flips(
    dataset, digits, tmp_path, map_tasks
):
    found = reference_features(dataset, CONFIG, tmp_path / "cache", map_tasks)
    expected = EXTRACTOR(tensor(digits[0]))
    assert len(found.parts) == 3
    # Features are float32: batches of other sizes round differently.
    torch.testing.assert_close(read_features(found.parts), expected, atol=1e-5, rtol=0)
    statistics = FeatureStatistics.of(expected)
    assert found.statistics.count == 200
    np.testing.assert_allclose(found.statistics.mean, statistics.mean, atol=1e-5)
    np.testing.assert_allclose(found.statistics.covariance, statistics.covariance, atol=1e-5)


def test_features_do_not_depend_on_the_batch_of_the_evaluation(dataset, tmp_path, map_tasks):
    a, b = (
        reference_features(
            dataset, CONFIG.model_copy(update={"batch": batch}), tmp_path / str(batch), map_tasks
        )
        for batch in (256, 9)
    )
    assert torch.equal(read_features(a.parts), read_features(b.parts))


def test_everything_is_read_from_the_cache_the_second_time(dataset, tmp_path, map_tasks):
    first = reference_features(dataset, CONFIG, tmp_path / "cache", map_tasks)
    second = reference_features(dataset, CONFIG, tmp_path / "cache", map_tasks)
    assert map_tasks.descriptions == ["reference features", "reference statistics"]
    assert first.parts == second.parts
    np.testing.assert_array_equal(second.statistics.mean, first.statistics.mean)
    np.testing.assert_array_equal(second.statistics.scatter, first.statistics.scatter)


def test_a_kill_costs_only_the_parts_that_were_not_finished(dataset, tmp_path, map_tasks):
    def killed(function, items, description):
        for item in items[:2]:
            function(item)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference_features(dataset, CONFIG, tmp_path / "cache", killed)
    found = reference_features(dataset, CONFIG, tmp_path / "cache", map_tasks)
    assert map_tasks.items == [1, 1]  # the third part; the statistics
    whole = reference_features(dataset, CONFIG, tmp_path / "whole", map_tasks)
    np.testing.assert_array_equal(found.statistics.scatter, whole.statistics.scatter)


def test_statistics_file_is_an_edm_reference_and_no_pickle(dataset, tmp_path, map_tasks):
    found = reference_features(dataset, CONFIG, tmp_path / "cache", map_tasks)
    path = npz_in(tmp_path / "cache")
    with np.load(path, allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "mu": (64,),
            "sigma": (64, 64),
            "n": (),
        }
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
    moments = read_moments(str(path), EXTRACTOR)
    assert moments.count == 200
    np.testing.assert_array_equal(moments.mean, found.statistics.mean)
    np.testing.assert_allclose(moments.covariance, found.statistics.covariance, rtol=1e-14)


def test_another_data_set_has_another_cache(dataset, digits, pack, tmp_path, map_tasks):
    images, labels = digits
    other = pack(tmp_path / "other", 255 - images, labels, per_shard=100)
    a = reference_features(dataset, CONFIG, tmp_path / "cache", map_tasks)
    b = reference_features(other, CONFIG, tmp_path / "cache", map_tasks)
    assert len(list((tmp_path / "cache").iterdir())) == 4
    assert np.abs(a.statistics.mean - b.statistics.mean).max() > 0.1


def test_other_shards_of_the_same_images_do_not_mix_with_the_parts(
    dataset, digits, pack, tmp_path, map_tasks
):
    other = pack(tmp_path / "other", *digits, per_shard=45)
    assert other.manifest.fingerprint == dataset.manifest.fingerprint
    a = reference_features(dataset, CONFIG, tmp_path / "cache", map_tasks)
    b = reference_features(other, CONFIG, tmp_path / "cache", map_tasks)
    torch.testing.assert_close(read_features(a.parts), read_features(b.parts), atol=1e-5, rtol=0)
    assert map_tasks.descriptions.count("reference statistics") == 1  # they are the same


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "nan", "narrow"])
def test_damaged_statistics_are_logged_and_replaced(dataset, tmp_path, map_tasks, caplog, damage):
    cache = tmp_path / "cache"
    expected = reference_features(dataset, CONFIG, cache, map_tasks).statistics
    path = npz_in(cache)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:5000])
    elif damage == "garbage":
        path.write_bytes(b"garbage")
    elif damage == "flipped":
        path.write_bytes(content[:3000] + bytes([content[3000] ^ 1]) + content[3001:])
    elif damage == "nan":
        np.savez(path, mu=np.full(64, np.nan), sigma=np.eye(64), n=np.array(200))
    else:
        np.savez(path, mu=np.zeros(3), sigma=np.eye(3), n=np.array(200))
    with caplog.at_level(logging.WARNING):
        again = reference_features(dataset, CONFIG, cache, map_tasks).statistics
    assert "is damaged" in caplog.text
    assert path.name in caplog.text
    np.testing.assert_array_equal(again.mean, expected.mean)
    assert path.read_bytes() == content


def test_a_damaged_image_is_left_out_and_named(digits, pack, tmp_path, map_tasks, caplog):
    dataset = pack(tmp_path / "digits", *digits, per_shard=100, max_bad_fraction=0.01)
    dataset = damage_first_image(dataset)
    with caplog.at_level(logging.WARNING):
        found = reference_features(dataset, CONFIG, tmp_path / "cache", map_tasks)
    assert found.statistics.count == len(read_features(found.parts)) == 199
    assert "shard-0.tar: 00000 left out" in caplog.text


def test_more_damaged_images_than_allowed_stop_the_evaluation_and_are_not_remembered(
    digits, pack, tmp_path, map_tasks
):
    dataset = pack(tmp_path / "digits", *digits, per_shard=100, max_bad_fraction=0.001)
    damaged = damage_first_image(dataset)
    with pytest.raises(DataError, match="1 of 200 images .* are damaged"):
        reference_features(damaged, CONFIG, tmp_path / "cache", map_tasks)
    shutil.rmtree(dataset.path)
    again = pack(Path(dataset.path), *digits, per_shard=100, max_bad_fraction=0.001)
    found = reference_features(again, CONFIG, tmp_path / "cache", map_tasks)
    assert found.statistics.count == 200


def edm_reference(**arrays):
    """Content of an npz; by default one that the digits extractor can be compared with."""
    content = io.BytesIO()
    np.savez(content, **({"mu": np.zeros(64), "sigma": np.eye(64)} | arrays))
    return content.getvalue()


def test_a_reference_of_edms_own_has_no_count(tmp_path):
    path = tmp_path / "edm.npz"
    path.write_bytes(edm_reference())
    moments = read_moments(str(path), EXTRACTOR)
    assert moments.count is None
    np.testing.assert_array_equal(moments.covariance, np.eye(64))


def test_a_reference_can_be_at_a_url():
    with fsspec.open("memory://references/edm.npz", "wb") as file:
        file.write(edm_reference(mu=np.ones(64)))
    assert read_moments("memory://references/edm.npz", EXTRACTOR).mean.sum() == 64


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("/nowhere/touched"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage", "cannot be read as an npz"),
        (pickle.dumps({"mu": 1}), "cannot be read as an npz"),
        (pickle.dumps(Hostile()), "cannot be read as an npz"),
        (edm_reference(mu=np.array([Hostile()] * 64)), "cannot be read as an npz"),
        (edm_reference()[:200], "cannot be read as an npz"),
        (edm_reference(sigma=np.eye(3)), r"mu is \[64\] and sigma \[3, 3\]; .* \[d\] and \[d, d\]"),
        (edm_reference(mu=np.zeros((1, 64))), r"mu is \[1, 64\]"),
        (
            edm_reference(mu=np.zeros(2048), sigma=np.eye(2048)),
            "of 2048 features, eval.extractor=digits gives 64; use a reference made with",
        ),
        (edm_reference(mu=np.full(64, np.nan)), "not finite"),
        (edm_reference(mu=np.full(64, "x")), "not finite"),
        (edm_reference(sigma=np.triu(np.ones((64, 64)))), "symmetric"),
    ],
)
def test_other_files_are_refused_in_one_line_that_names_the_option(tmp_path, content, message):
    path = tmp_path / "reference.npz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_moments(str(path), EXTRACTOR)
    assert str(refused.value).startswith(f"eval.reference={path}: ")
    assert "\n" not in str(refused.value)


def test_wrong_keys_are_named_beside_the_right_ones(tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, mean=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ConfigError, match="holds mean, sigma; an EDM-format .* mu and sigma"):
        read_moments(str(path), EXTRACTOR)


def test_a_reference_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="missing.npz: no such file"):
        read_moments(str(tmp_path / "missing.npz"), EXTRACTOR)
