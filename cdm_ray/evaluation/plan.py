"""What an evaluation consists of, and what its numbers depend on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cdm_ray.config import EvalConfig, ImageConfig
from cdm_ray.data.manifest import Manifest
from cdm_ray.evaluation.drift import Source
from cdm_ray.evaluation.features import FeatureExtractor, tensors_digest
from cdm_ray.evaluation.frechet import Moments
from cdm_ray.evaluation.generate import KINDS, num_evaluations
from cdm_ray.evaluation.npz import short_digest
from cdm_ray.evaluation.tasks import split_evenly

BATCHES_PER_TASK = 4
"""Enough to make up for loading the networks; what a kill costs each worker, at most."""
MIN_TASKS = 16
"""Tasks of every set of images that is large enough, so that many workers find work."""
_SCHEMA = 1
"""Part of the key; to be increased when the code changes what is computed."""


class Item(NamedTuple):
    """One task: generate the images `rows` of a range of seeds with a sampler, or probe the real
    images `rows`."""

    source: Source
    seed_range: int
    """Place in `eval.first_seeds`; 0 for real images."""
    rows: range


def plan(config: ImageConfig, real_images: int) -> list[Item]:
    """Tasks of an evaluation, the longest first, so that no worker is left with one at the end."""

    def split(source: Source, seed_range: int, total: int) -> list[Item]:
        batches = math.ceil(total / config.eval.batch)
        per_task = min(max(batches // MIN_TASKS, 1), BATCHES_PER_TASK)
        tasks = math.ceil(batches / per_task)
        return [Item(source, seed_range, rows) for rows in split_evenly(total, tasks)]

    items = split("data", 0, real_images)
    kinds = sorted(KINDS, key=lambda kind: num_evaluations(config.sampler, kind), reverse=True)
    for kind in kinds:
        for seed_range in range(len(config.eval.first_seeds)):
            items += split(kind, seed_range, config.eval.images)
    return items


def item_seeds(config: EvalConfig, item: Item, rows: range) -> range:
    """Seeds of some rows of an item."""
    first = config.first_seeds[item.seed_range]
    return range(first + rows.start, first + rows.stop)


def evaluation_key(
    config: ImageConfig,
    state_dict: Mapping[str, Tensor],
    manifest: Manifest,
    extractor: FeatureExtractor,
    reference: Moments | None,
) -> str:
    """Short digest of everything that determines the numbers of an evaluation to the last digit.

    The kind of device is not in it: an evaluation that is continued on another kind has images of
    other random numbers from there on, which are as good.
    """
    given = None
    if reference is not None:
        moments = {"mu": reference.mean, "sigma": reference.covariance}
        given = tensors_digest({name: torch.from_numpy(part) for name, part in moments.items()})
    content = {
        "schema": _SCHEMA,
        "torch": torch.__version__,
        "weights": tensors_digest(state_dict),
        "network": config.network.model_dump(exclude={"init", "activation_checkpointing"}),
        "augment_dim": config.augment_dim,
        "sampler": config.sampler.model_dump(exclude={"kind"}),
        "eval": config.eval.model_dump(exclude={"every_kimg", "extractor_file", "reference"}),
        "extractor": [extractor.name, extractor.fingerprint],
        "reference": given,
        "data": manifest.fingerprint,
    }
    return short_digest(json.dumps(content, sort_keys=True))
