"""Numbers of generated images against real ones, all from one pass of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple, get_args

import torch

from cdm_ray.config import EvalConfig
from cdm_ray.evaluation.features import INCEPTION_DIM
from cdm_ray.evaluation.frechet import (
    FeatureStatistics,
    Moments,
    frechet_distance,
    merge_all,
    too_few_samples,
)
from cdm_ray.evaluation.generate import Kind
from cdm_ray.evaluation.kid import kernel_distance
from cdm_ray.evaluation.parts import Tensors, read_part
from cdm_ray.evaluation.precision_recall import NEIGHBOURS, precision_recall
from cdm_ray.evaluation.reference_features import ReferenceFeatures, read_features
from cdm_ray.evaluation.tasks import task_device
from cdm_ray.storage import AnyPath

Quantity = Literal["fd", "kd", "kd_std", "precision", "recall"]
"""Fréchet distance, kernel distance, the standard deviation over its subsets, and shares."""
_NAMES = {
    "fd": "fid",
    "kd": "kid",
    "precision": "precision",
    "recall": "recall",
}
_DISTANCES = ("fd", "kd")
_BLOCK = 1000


class Counts(NamedTuple):
    """Images behind each number; those of precision and recall are of each kind."""

    generated: int
    reference: int | None
    """None if the file of the moments does not say."""
    kid_subset: int
    precision_recall: int


@dataclass(frozen=True)
class Judge:
    """What generated images are compared with: Fréchet distances are measured from the moments,
    everything else from the features of the data set."""

    config: EvalConfig
    moments: Moments
    features: ReferenceFeatures

    @property
    def counts(self) -> Counts:
        fewest = min(self.config.images, self.features.statistics.count)
        return Counts(
            generated=self.config.images,
            reference=self.moments.count,
            kid_subset=min(self.config.kid_subset, fewest),
            precision_recall=min(self.config.pr_images, fewest),
        )

    def caveats(self) -> list[str]:
        """What a reader of the numbers has to know, one line each."""
        counts, dim = self.counts, len(self.moments.mean)
        known = {
            counts.generated,
            counts.generated if counts.reference is None else counts.reference,
        }
        found = [too_few_samples(count, dim) for count in sorted(known)]
        there = (
            f"there are {counts.generated} generated and {self.features.statistics.count} real "
            "images"
        )
        if counts.kid_subset < self.config.kid_subset:
            found.append(
                f"kernel distance from subsets of {counts.kid_subset} images instead of "
                f"eval.kid_subset={self.config.kid_subset}: {there}"
            )
        if counts.precision_recall <= NEIGHBOURS:
            found.append(
                f"precision and recall with {counts.precision_recall - 1} instead of {NEIGHBOURS} "
                f"neighbours: {there}"
            )
        return [line for line in found if line is not None]


def metric_name(quantity: Quantity, kind: Kind, extractor: str, dim: int) -> str:
    """Such as `fid_ode`, `kid_sde_std`: the field's name of a quantity from the 2048 features of
    Inception; from any other features it carries the extractor's name, `fd_digits_ode`."""
    base, _, suffix = quantity.partition("_")
    inception = (extractor, dim) == ("inception", INCEPTION_DIM)
    name = f"{_NAMES[base] if inception else f'{base}_{extractor}'}_{kind}"
    return f"{name}_{suffix}" if suffix else name


def score(judge: Judge, parts: Sequence[AnyPath]) -> Tensors:
    """Quantities, float64 numbers by name, of the generated images whose features are in the parts.

    Moments are accumulated in float64 over blocks of fixed size and order, so that they do not
    depend on who computed which part.
    """
    generated, real = read_features(parts), read_features(judge.features.parts)
    statistics = merge_all(FeatureStatistics.of(block) for block in generated.split(_BLOCK))
    counts, device = judge.counts, task_device()
    kernel = kernel_distance(
        real, generated, subset=counts.kid_subset, subsets=judge.config.kid_subsets, device=device
    )
    compared = counts.precision_recall
    # The first seeds are as good as any; the data set may be in some order.
    spaced = (2 * torch.arange(compared) + 1) * len(real) // (2 * compared)
    shares = precision_recall(
        real[spaced],
        generated[:compared],
        neighbours=min(NEIGHBOURS, compared - 1),
        device=device,
    )
    quantities: dict[Quantity, float] = {
        "fd": frechet_distance(statistics, judge.moments),
        "kd": kernel.mean,
        "kd_std": kernel.std,
        "precision": shares.precision,
        "recall": shares.recall,
    }
    return {name: torch.tensor(v, dtype=torch.float64) for name, v in quantities.items()}


def read_score(path: AnyPath) -> dict[Quantity, float]:
    """Result of `score` in a part."""
    part = read_part(path)
    return {quantity: part[quantity].item() for quantity in get_args(Quantity)}


def summary(
    scores: Mapping[Kind, Sequence[Mapping[Quantity, float]]], extractor: str, dim: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics, and the value of each range of seeds, by name.

    A metric is the mean over the ranges; a distance has its minimum, `<name>_min`, beside it when
    there are several.
    """
    metrics: dict[str, float] = {}
    ranges: dict[str, list[float]] = {}
    for kind, found in scores.items():
        for quantity in found[0]:
            name = metric_name(quantity, kind, extractor, dim)
            values = [one[quantity] for one in found]
            ranges[name] = values
            metrics[name] = fmean(values)
            if quantity in _DISTANCES and len(values) > 1:
                metrics[f"{name}_min"] = min(values)
    return metrics, ranges
