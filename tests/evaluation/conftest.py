import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cdm_ray.data.images import encode_png
from cdm_ray.data.manifest import Manifest, ShardInfo
from cdm_ray.data.shards import PackedSample, file_sha256, write_shard
from cdm_ray.evaluation.reference import Dataset


class SerialMap:
    """`map_tasks` in this process, everything pickled on the way as between processes; keeps the
    description and the number of items of every map."""

    def __init__(self):
        self.descriptions, self.items = [], []

    def __call__(self, function, items, description):
        self.descriptions.append(description)
        self.items.append(len(items))
        function, items = pickle.loads(pickle.dumps((function, items)))
        return pickle.loads(pickle.dumps([function(item) for item in items]))


@pytest.fixture
def map_tasks():
    return SerialMap()


def _pack(folder: Path, images, labels, *, per_shard: int, max_bad_fraction=0.0) -> Dataset:
    """Shards of greyscale images uint8 [N, H, W] with labels below 10, or None."""
    folder.mkdir()
    shards = []
    for number, start in enumerate(range(0, len(images), per_shard)):
        samples = [
            PackedSample(
                f"{index:05d}",
                encode_png(Image.fromarray(images[index])),
                None if labels is None else int(labels[index]),
            )
            for index in range(start, min(start + per_shard, len(images)))
        ]
        path = folder / f"shard-{number}.tar"
        write_shard(path, samples)
        shards.append(ShardInfo(name=path.name, samples=len(samples), sha256=file_sha256(path)))
    manifest = Manifest(
        resolution=images.shape[1],
        channels=1,
        num_classes=0 if labels is None else 10,
        shards=tuple(shards),
        fingerprint=hashlib.sha256(images.tobytes()).hexdigest(),
    )
    manifest.save(folder)
    return Dataset(str(folder), manifest, max_bad_fraction)


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """200 digits uint8 [200, 8, 8], sorted by class as folders of classes are, and their labels."""
    source = load_digits()
    order = np.argsort(source.target[:200], kind="stable")
    pixels = np.round(source.images[:200] * (255 / 16)).astype(np.uint8)
    return pixels[order], source.target[:200][order]


@pytest.fixture
def pack():
    return _pack


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, digits) -> Dataset:
    return _pack(tmp_path_factory.mktemp("packed") / "digits", *digits, per_shard=30)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
