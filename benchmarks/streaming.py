"""Streaming by lanes against plain WebDataset iteration over the same shards, in one process.

`python benchmarks/streaming.py` packs 8,000 random 32x32 RGB images into 8 shards in a temporary
folder and reads them both ways, side by side in alternating order. Ratios above 1 mean that the
stream of this project is faster.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from cdm_ray.config import DataConfig
from cdm_ray.data.manifest import Manifest
from cdm_ray.data.prepare import prepare
from cdm_ray.data.stream import LaneStream


def measure(
    *,
    images: int = 8000,
    shards: int = 8,
    resolution: int = 32,
    batch: int = 320,
    repeats: int = 7,
    decode: str = "torchrgb",
) -> dict[str, Any]:
    """Images per second of both, and their ratios as {median, low, high} over the repeats.

    `wall_ratio` compares elapsed time, `cpu_ratio` process CPU time with all threads. Each repeat
    reads as many images as there are, from opening the first shard on, once each way; which way
    goes first alternates. `decode` is WebDataset's decoder: `torchrgb` (float32) or `torchrgb8`.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = _pack(Path(folder), images, shards, resolution)
        manifest = Manifest.load(data.path)
        urls = [str(Path(data.path, shard.name)) for shard in manifest.shards]

        def ours() -> None:
            lanes = range(data.lanes)
            with LaneStream(
                data, manifest, seed=0, lanes=lanes, lane_batch=batch // data.lanes
            ) as stream:
                for _ in range(images // batch):
                    next(stream)

        def plain() -> None:
            dataset = webdataset.WebDataset(urls, shardshuffle=False)
            loader = dataset.decode(decode).to_tuple("png", "cls").batched(batch)
            seen = sum(len(pixels) for pixels, _ in loader)
            assert seen == images, seen

        ours()
        plain()  # both once unmeasured: imports and the file cache
        times: dict[str, list[tuple[float, float]]] = {"ours": [], "plain": []}
        for repeat in range(repeats):
            order = [("ours", ours), ("plain", plain)]
            for name, read in order if repeat % 2 else reversed(order):
                times[name].append(_timed(read))
    return {
        "images": images,
        "resolution": resolution,
        "decode": decode,
        "ours_images_per_s": _spread(images / wall for wall, _ in times["ours"]),
        "plain_images_per_s": _spread(images / wall for wall, _ in times["plain"]),
        "wall_ratio": _ratios(times, 0),
        "cpu_ratio": _ratios(times, 1),
    }


def _pack(folder: Path, images: int, shards: int, resolution: int) -> DataConfig:
    """Smooth random images with a little noise, in two classes, packed."""
    rng = np.random.default_rng(0)
    for index in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((resolution, resolution), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
        path = folder / "source" / "ab"[index % 2] / f"{index:05d}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path)
    data = DataConfig(
        path=str(folder / "packed"),
        source=str(folder / "source"),
        resolution=resolution,
        channels=3,
        samples_per_shard=-(-images // shards),
        lanes=16,
    )
    prepare(data, lambda function, items, _: [function(item) for item in items])
    return data


def _timed(read: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    read()
    return time.perf_counter() - wall, time.process_time() - cpu


def _ratios(times: dict[str, list[tuple[float, float]]], which: int) -> dict[str, float]:
    pairs = zip(times["ours"], times["plain"], strict=True)
    return _spread(plain[which] / ours[which] for ours, plain in pairs)


def _spread(values: Iterator[float]) -> dict[str, float]:
    found = sorted(values)
    return {"median": statistics.median(found), "low": found[0], "high": found[-1]}


def main() -> None:
    for decode in ("torchrgb", "torchrgb8"):
        result = measure(decode=decode)
        side = result["resolution"]
        print(f"WebDataset decode({decode!r}), {result['images']} images, {side}x{side}")
        for name in ("ours_images_per_s", "plain_images_per_s", "wall_ratio", "cpu_ratio"):
            spread = result[name]
            digits = 2 if "ratio" in name else 0
            print(
                f"  {name:<20} {spread['median']:>8.{digits}f}  "
                f"({spread['low']:.{digits}f} .. {spread['high']:.{digits}f})"
            )


if __name__ == "__main__":
    main()
