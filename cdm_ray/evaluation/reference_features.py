"""What generated images are compared with: the features of the data set, or moments from a file."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdm_ray.config import EvalConfig
from cdm_ray.data.manifest import Manifest
from cdm_ray.data.shards import DataError
from cdm_ray.errors import ConfigError, one_line
from cdm_ray.evaluation.features import FeatureExtractor, load_extractor
from cdm_ray.evaluation.frechet import FeatureStatistics, GivenMoments, merge_all
from cdm_ray.evaluation.npz import Arrays, read_cache, read_npz, short_digest, write_cache
from cdm_ray.evaluation.parts import compute_parts, read_part, rows_of
from cdm_ray.evaluation.reference import Dataset
from cdm_ray.evaluation.tasks import MapTasks, task_device
from cdm_ray.storage import AnyPath, fetch, remove_folder

log = logging.getLogger(__name__)

FEATURES = "features"
"""Name of the feature vectors in a part."""
_PART_IMAGES = 1000
"""Fewest images of a part of the reference features: what a kill may cost, in the order of."""
_FEATURE_BATCH = 64
"""Fixed, unlike `eval.batch`: rounding depends on it, and the cache serves every evaluation."""


@dataclass(frozen=True)
class ReferenceFeatures:
    """Features of every image of a data set: the parts that hold them, and their statistics."""

    parts: tuple[AnyPath, ...]
    statistics: FeatureStatistics


def reference_features(
    dataset: Dataset, config: EvalConfig, cache_folder: AnyPath, map_tasks: MapTasks
) -> ReferenceFeatures:
    """Features of every image of the data set, without flips, computed once and then cached.

    The cache is keyed by the fingerprints of the data set and of the feature network: a folder of
    parts, `features-<extractor>-<key>/`, and the statistics, `reference-<extractor>-<key>.npz`,
    with `mu`, `sigma` (unbiased, float64) and `n`: the form of EDM's references, to be used with
    its tools and as `eval.reference`. What is damaged is reported in the log and replaced. Raises
    DataError when more images are damaged than `data.max_bad_fraction` allows.
    """
    extractor = load_extractor(config, "cpu")
    manifest, groups = dataset.manifest, _shard_groups(dataset.manifest)
    key = f"{manifest.fingerprint} {extractor.name} {extractor.fingerprint}"
    layout = [[manifest.shards[shard].samples for shard in group] for group in groups]
    folder = cache_folder / f"features-{extractor.name}-{short_digest(f'{key} {layout}')}"
    path = cache_folder / f"reference-{extractor.name}-{short_digest(key)}.npz"
    work = partial(_shard_features, dataset, config)
    parts = compute_parts(work, groups, folder, map_tasks, "reference features")
    try:
        dataset.check_count(sum(rows_of(part, FEATURES) for part in parts), manifest.num_samples)
    except DataError:
        remove_folder(folder)  # the data set packed again has the same key
        raise
    statistics = read_cache(path, partial(_parse_statistics, dim=extractor.dim))
    if statistics is None:
        # In a task: with one thread, and so with the same rounding on every machine.
        map_tasks(partial(_write_statistics, path), [parts], "reference statistics")
        statistics = _parse_statistics(read_npz(path.read_bytes()), extractor.dim)
    return ReferenceFeatures(tuple(parts), statistics)


def read_features(parts: Iterable[AnyPath]) -> Tensor:
    """Features float32 [N, d] of all parts, in order."""
    return torch.cat([read_part(path)[FEATURES] for path in parts])


def read_moments(path: str, extractor: FeatureExtractor) -> GivenMoments:
    """Moments in an EDM-format npz, a local path or URL: `mu` [d], `sigma` [d, d], perhaps `n`.

    Raises ConfigError, naming `eval.reference`, for a file that is not of this form or of other
    features.
    """
    where = f"eval.reference={path}"
    try:
        arrays = read_npz(fetch(path))
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file; name an npz with mu and sigma") from None
    except Exception as error:  # each protocol has its own classes of network errors
        raise ConfigError(
            f"{where}: cannot be read as an npz of plain numbers ({one_line(error)})"
        ) from None
    if not {"mu", "sigma"} <= arrays.keys():
        raise ConfigError(
            f"{where}: holds {', '.join(sorted(arrays)) or 'nothing'}; "
            "an EDM-format reference holds mu and sigma"
        )
    mean, covariance = arrays["mu"], arrays["sigma"]
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ConfigError(
            f"{where}: mu is {list(mean.shape)} and sigma {list(covariance.shape)}; "
            "they should be [d] and [d, d]"
        )
    if len(mean) != extractor.dim:
        raise ConfigError(
            f"{where}: of {len(mean)} features, eval.extractor={extractor.name} gives "
            f"{extractor.dim}; use a reference made with the same extractor"
        )
    if not (_is_finite(mean) and _is_finite(covariance) and np.allclose(covariance, covariance.T)):
        raise ConfigError(f"{where}: not finite numbers with a symmetric sigma")
    count = arrays.get("n", np.array([]))
    return GivenMoments(
        mean.astype(np.float64),
        covariance.astype(np.float64),
        int(count) if count.ndim == 0 else None,
    )


def _shard_groups(manifest: Manifest) -> list[range]:
    """Consecutive shards that together have at least _PART_IMAGES images, but for the last."""
    groups, start, images = [], 0, 0
    for index, info in enumerate(manifest.shards):
        images += info.samples
        if images >= _PART_IMAGES or index == len(manifest.shards) - 1:
            groups.append(range(start, index + 1))
            start, images = index + 1, 0
    return groups


def _shard_features(dataset: Dataset, config: EvalConfig, shards: range) -> dict[str, Tensor]:
    extractor = load_extractor(config, task_device())
    features = [
        extractor(images)
        for shard in shards
        for images in dataset.read(shard).images.split(_FEATURE_BATCH)
        if len(images)
    ]
    return {FEATURES: torch.cat(features) if features else torch.empty(0, extractor.dim)}


def _write_statistics(path: AnyPath, parts: Sequence[AnyPath]) -> None:
    features = (read_part(part)[FEATURES] for part in parts)
    statistics = merge_all(FeatureStatistics.of(some) for some in features if len(some))
    arrays = {"mu": statistics.mean, "sigma": statistics.covariance}
    write_cache(path, arrays | {"n": np.array(statistics.count)})
    log.info("reference statistics of %d images written to %s", statistics.count, path)


def _parse_statistics(arrays: Arrays, dim: int) -> FeatureStatistics:
    mean, covariance, count = arrays["mu"], arrays["sigma"], int(arrays["n"])
    if mean.shape != (dim,) or covariance.shape != (dim, dim) or count < 2:
        raise ValueError(f"not the statistics of {dim} features")
    if not (_is_finite(mean) and _is_finite(covariance)):
        raise ValueError("not finite")
    return FeatureStatistics(count, mean, covariance * (count - 1))


def _is_finite(values: NDArray) -> bool:
    return np.issubdtype(values.dtype, np.floating) and bool(np.isfinite(values).all())
