"""What a worker puts through the network: its lanes' images, transformed if asked for, and told."""

import torch

from cdm_ray.config import ImageConfig, load_config
from cdm_ray.data.manifest import Manifest, ShardInfo
from cdm_ray.data.stream import RawBatch
from cdm_ray.objectives.augmentation import augment
from cdm_ray.randomness import BlockRng
from cdm_ray.training.image_worker import step_passes
from cdm_ray.training.lanes import deal_lanes, micro_steps

SHARD = ShardInfo(name="a.tar", samples=32, sha256="0" * 64)
MANIFEST = Manifest(resolution=8, channels=1, num_classes=10, shards=(SHARD,), fingerprint="0" * 64)


def passes(*overrides, steps=2):
    """The raw batch of a worker that has all lanes, and the passes of its steps, from step 5 on."""
    config = load_config(ImageConfig, "digits", ["train.batch=32", "ray.workers=1", *overrides])
    dealt = deal_lanes(config.data.lanes, 1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 1, 8, 8), generator=generator).to(torch.uint8)
    raw = RawBatch(images, torch.arange(32) % 10, [str(index) for index in range(32)])
    schedule = micro_steps(dealt, 0, config.train.micro_batch and config.train.micro_batch // 4)
    lanes = [lane for micro in schedule for lane in micro.lanes]
    device = torch.device("cpu")
    found = step_passes(config, iter([raw] * steps), schedule, lanes, MANIFEST, device, 5)
    return raw, list(found)


def test_without_augmentation_images_are_scaled_labelled_and_left_alone():
    raw, ((first,), _) = passes()
    # uint8 / 127.5 - 1 in float32
    torch.testing.assert_close(first.batch.images, raw.images / 127.5 - 1)
    assert torch.equal(first.batch.class_labels.argmax(1), raw.labels)
    assert first.batch.augment_labels is None
    fresh = BlockRng.for_lanes(0, 5, range(8), "cpu")
    assert torch.equal(first.rng.normal(8, 3), fresh.normal(8, 3))


def test_augmented_images_go_to_the_network_with_what_was_done_to_them():
    raw, ((first,), (second,)) = passes("augment.p=0.5")
    rng = BlockRng.for_lanes(0, 5, range(8), "cpu")
    images, labels = augment(raw.images / 127.5 - 1, 0.5, rng)
    torch.testing.assert_close(first.batch.images, images)
    assert torch.equal(first.batch.augment_labels, labels)
    assert (labels != 0).any(dim=0).all()
    # the objective draws on from there, and the next step draws anew
    assert torch.equal(first.rng.normal(8, 3), rng.normal(8, 3))
    assert not torch.equal(second.batch.augment_labels, labels)


def test_augmentation_does_not_depend_on_the_micro_steps():
    _, ((whole,), _) = passes("augment.p=0.5")
    _, (parts, _) = passes("augment.p=0.5", "train.micro_batch=8")
    assert len(parts) == 4
    images = torch.cat([part.batch.images for part in parts])
    # sines and cosines of few numbers and of many differ in the last bit, which moves the positions
    torch.testing.assert_close(images, whole.batch.images, rtol=0, atol=1e-5)
    labels = torch.cat([part.batch.augment_labels for part in parts])
    assert torch.equal(labels, whole.batch.augment_labels)
