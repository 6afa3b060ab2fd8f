import numpy as np
import torch

from cdm_ray.evaluation.reference import reference_images


def tensor(images):
    return torch.from_numpy(images)[:, None]


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
