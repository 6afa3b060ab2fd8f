import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cdm_ray.config import EvalConfig
from cdm_ray.data.shards import DataError
from cdm_ray.evaluation.features import load_extractor
from cdm_ray.evaluation.frechet import FeatureStatistics
from cdm_ray.evaluation.reference import reference_images, reference_statistics

CONFIG = EvalConfig(extractor="digits", batch=32)


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


def test_statistics_are_over_every_image_without_flips(dataset, digits, tmp_path, map_tasks):
    statistics = reference_statistics(dataset, CONFIG, tmp_path / "cache", map_tasks)
    expected = FeatureStatistics.of(load_extractor(CONFIG, "cpu")(tensor(digits[0])))
    assert statistics.count == 200
    # Features are float32: batches of other sizes round differently.
    np.testing.assert_allclose(statistics.mean, expected.mean, atol=1e-5)
    np.testing.assert_allclose(statistics.covariance, expected.covariance, atol=1e-5)


def test_statistics_are_read_from_the_cache_the_second_time(dataset, tmp_path, map_tasks):
    first = reference_statistics(dataset, CONFIG, tmp_path / "cache", map_tasks)
    second = reference_statistics(dataset, CONFIG, tmp_path / "cache", map_tasks)
    assert map_tasks.descriptions == ["reference statistics"]
    np.testing.assert_allclose(second.mean, first.mean, rtol=0)
    np.testing.assert_allclose(second.covariance, first.covariance, rtol=1e-14)


def test_cache_has_the_fields_keys_and_no_pickle(dataset, tmp_path, map_tasks):
    reference_statistics(dataset, CONFIG, tmp_path / "cache", map_tasks)
    (path,) = (tmp_path / "cache").iterdir()
    with np.load(path, allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "mu": (64,),
            "sigma": (64, 64),
            "n": (),
        }
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
        assert arrays["n"] == 200


def test_another_data_set_has_another_cache(dataset, digits, pack, tmp_path, map_tasks):
    images, labels = digits
    other = pack(tmp_path / "other", 255 - images, labels, per_shard=100)
    a = reference_statistics(dataset, CONFIG, tmp_path / "cache", map_tasks)
    b = reference_statistics(other, CONFIG, tmp_path / "cache", map_tasks)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert np.abs(a.mean - b.mean).max() > 0.1


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "nan", "narrow"])
def test_damaged_cache_is_logged_and_replaced(dataset, tmp_path, map_tasks, caplog, damage):
    cache = tmp_path / "cache"
    expected = reference_statistics(dataset, CONFIG, cache, map_tasks)
    (path,) = cache.iterdir()
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
        again = reference_statistics(dataset, CONFIG, cache, map_tasks)
    assert "is damaged" in caplog.text
    assert path.name in caplog.text
    np.testing.assert_array_equal(again.mean, expected.mean)
    assert path.read_bytes() == content


def test_reference_images_span_the_whole_data_set(dataset, tmp_path, map_tasks):
    found = reference_images(dataset, 40, tmp_path / "cache", map_tasks)
    assert found.images.shape == (40, 1, 8, 8)
    # The data set is sorted by class; its first 40 images would be zeros and ones only.
    assert set(found.labels.tolist()) == set(range(10))


def test_reference_images_carry_their_own_labels(dataset, digits, tmp_path, map_tasks):
    images, labels = digits
    found = reference_images(dataset, 40, tmp_path / "cache", map_tasks)
    for image, label in zip(found.images, found.labels, strict=True):
        (matches,) = np.nonzero((images == image[0].numpy()).all(axis=(1, 2)))
        assert int(label) in labels[matches]


def test_reference_images_of_a_small_data_set_are_all_of_it(dataset, digits, tmp_path, map_tasks):
    for _ in range(2):  # computed, then from the cache
        found = reference_images(dataset, 10_000, tmp_path / "cache", map_tasks)
        assert torch.equal(found.images, tensor(digits[0]))
    assert map_tasks.descriptions == ["images"]


def test_images_without_labels_have_none(digits, pack, tmp_path, map_tasks):
    dataset = pack(tmp_path / "plain", digits[0], None, per_shard=64)
    for _ in range(2):
        assert reference_images(dataset, 8, tmp_path / "cache", map_tasks).labels is None


def test_a_damaged_image_is_left_out_and_named(digits, pack, tmp_path, map_tasks, caplog):
    dataset = pack(tmp_path / "digits", *digits, per_shard=100, max_bad_fraction=0.01)
    dataset = damage_first_image(dataset)
    with caplog.at_level(logging.WARNING):
        statistics = reference_statistics(dataset, CONFIG, tmp_path / "cache", map_tasks)
    assert statistics.count == 199
    assert "shard-0.tar: 00000 left out" in caplog.text


def test_more_damaged_images_than_allowed_stop_the_evaluation(digits, pack, tmp_path, map_tasks):
    dataset = pack(tmp_path / "digits", *digits, per_shard=100, max_bad_fraction=0.001)
    dataset = damage_first_image(dataset)
    with pytest.raises(DataError, match="1 of 200 images .* are damaged"):
        reference_statistics(dataset, CONFIG, tmp_path / "cache", map_tasks)
    assert not (tmp_path / "cache").exists()
