"""Evaluation of one set of weights: samples, distances, drift, figures."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cdm_ray.config import ImageConfig
from cdm_ray.data.manifest import Manifest
from cdm_ray.evaluation.drift import SOURCES, Drift, Source, level_sigmas
from cdm_ray.evaluation.features import FeatureExtractor, load_extractor
from cdm_ray.evaluation.figures import drift_figures, save_grid
from cdm_ray.evaluation.generate import KINDS, Kind, num_evaluations
from cdm_ray.evaluation.parts import Tensors, compute_parts, read_part
from cdm_ray.evaluation.plan import Item, evaluation_key, plan
from cdm_ray.evaluation.reference import Dataset, reference_images
from cdm_ray.evaluation.reference_features import read_moments, reference_features
from cdm_ray.evaluation.results import EvaluationResult
from cdm_ray.evaluation.scores import Judge, Quantity, read_score, score, summary
from cdm_ray.evaluation.tasks import MapTasks
from cdm_ray.evaluation.work import SHOWN, Subject, load_network, read_drift, run_item
from cdm_ray.storage import AnyPath, remove_folder

log = logging.getLogger(__name__)


def evaluate(
    config: ImageConfig,
    state_dict: dict[str, Tensor],
    manifest: Manifest,
    *,
    cache_folder: AnyPath,
    out_folder: AnyPath,
    map_tasks: MapTasks,
) -> EvaluationResult:
    """Compare what the weights generate with the data set in `config.data.path`.

    Metrics, for `sde` as for `ode` and means over `eval.first_seeds`: `fid_ode`, `kid_ode` and the
    standard deviation of its subsets, `kid_ode_std`, `precision_ode`, `recall_ode`; `fid_ode_min`
    and `kid_ode_min` over several ranges of seeds; `fd_<extractor>_ode`, `kd_<extractor>_ode` and
    so on, if the extractor is not Inception. Beside them `fd_images` generated images in each
    range, `fd_reference_images` real ones if their number is known, `kid_subset` and `pr_images`;
    `nfe_ode`, `nfe_sde` network evaluations per image; `cp_residual` with its standard error and
    `drift_images` images, see `Drift.cp_residual`, of the first range.

    Everything is written to `<out_folder>/<key>/`, where the key stands for whatever determines
    the numbers: another evaluation of the same weights has another folder, and the same one again
    is answered from there. What is finished of it before is kept in `<out_folder>/parts-<key>/`,
    so that after a kill no finished task is run again and the numbers are the same to the last
    digit. Raises ConfigError when the extractor or the reference cannot be used or the weights do
    not fit.
    """
    label_dim = manifest.num_classes if config.network.class_conditional else 0
    # What the user got wrong is refused before any task starts.
    load_network(config, state_dict, label_dim, "cpu")
    extractor = load_extractor(config.eval, "cpu")
    given = config.eval.reference
    moments = None if given is None else read_moments(given, extractor)
    key = evaluation_key(config, state_dict, manifest, extractor, moments)
    folder, parts_folder = out_folder / key, out_folder / f"parts-{key}"
    if (before := EvaluationResult.find(folder)) is not None:
        log.info("evaluated before: %s", folder)
        remove_folder(parts_folder)  # killed after the results were written
        return before
    dataset = Dataset(config.data.path, manifest, config.data.max_bad_fraction)
    features = reference_features(dataset, config.eval, cache_folder, map_tasks)
    judge = Judge(config.eval, moments or features.statistics, features)
    for line in judge.caveats():
        log.warning(line)
    real = reference_images(dataset, config.eval.drift_images, cache_folder, map_tasks)
    parts = _run_items(Subject(config, state_dict, label_dim, real), parts_folder, map_tasks)
    drift = _drift(config, parts)
    scores = _scores(judge, parts, parts_folder / "scores", map_tasks)
    metrics, ranges = summary(scores, extractor.name, extractor.dim)
    result = EvaluationResult(
        folder,
        metrics | _counts(config, judge) | _drift_metrics(drift),
        config.eval.first_seeds,
        ranges,
        figures=drift_figures(drift, folder),
        grids=_save_grids(parts, config.eval.grid, folder),
    )
    result.save(_facts(config, manifest, extractor, drift))
    remove_folder(parts_folder)
    return result


@dataclass(frozen=True)
class _Parts:
    """The finished tasks of an evaluation and their files."""

    items: Sequence[Item]
    paths: Sequence[AnyPath]

    def of(self, source: Source, seed_range: int) -> list[AnyPath]:
        """Those of a range of seeds, in order."""
        return [
            path
            for item, path in zip(self.items, self.paths, strict=True)
            if (item.source, item.seed_range) == (source, seed_range)
        ]

    def first(self, source: Source, count: int) -> Iterator[Tensors]:
        """Content of those of the first range that hold some of the first `count` images."""
        for item, path in zip(self.items, self.paths, strict=True):
            if (item.source, item.seed_range) == (source, 0) and item.rows.start < count:
                yield read_part(path)


def _run_items(subject: Subject, folder: AnyPath, map_tasks: MapTasks) -> _Parts:
    items = plan(subject.config, len(subject.real))
    paths = compute_parts(partial(run_item, subject), items, folder, map_tasks, "evaluation")
    return _Parts(items, paths)


def _drift(config: ImageConfig, parts: _Parts) -> Drift:
    count = config.eval.drift_images
    return Drift(
        {kind: level_sigmas(config, kind) for kind in KINDS},
        {source: read_drift(parts.first(source, count)) for source in SOURCES},
    )


def _scores(
    judge: Judge, parts: _Parts, folder: AnyPath, map_tasks: MapTasks
) -> dict[Kind, list[dict[Quantity, float]]]:
    """Quantities of every range of seeds, by sampler."""
    ranges = len(judge.config.first_seeds)
    paths = [parts.of(kind, seed_range) for kind in KINDS for seed_range in range(ranges)]
    found = [
        read_score(path)
        for path in compute_parts(partial(score, judge), paths, folder, map_tasks, "scores")
    ]
    return {kind: found[place * ranges : (place + 1) * ranges] for place, kind in enumerate(KINDS)}


def _save_grids(parts: _Parts, count: int, folder: AnyPath) -> dict[str, AnyPath]:
    """Write a grid of the first images of each sampler."""
    grids: dict[str, AnyPath] = {}
    for kind in KINDS:
        grids[kind] = folder / f"samples_{kind}.png"
        save_grid(torch.cat([part[SHOWN] for part in parts.first(kind, count)]), grids[kind])
    return grids


def _counts(config: ImageConfig, judge: Judge) -> dict[str, float]:
    counts = judge.counts
    numbers: dict[str, float] = {f"nfe_{k}": num_evaluations(config.sampler, k) for k in KINDS}
    numbers["fd_images"] = counts.generated
    if counts.reference is not None:
        numbers["fd_reference_images"] = counts.reference
    numbers["kid_subset"] = counts.kid_subset
    numbers["pr_images"] = counts.precision_recall
    return numbers


def _drift_metrics(drift: Drift) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for suffix, residual in (("", drift.cp_residual), ("_on_data", drift.cp_residual_on_data)):
        metrics[f"cp_residual{suffix}"] = float(residual.mean)
        metrics[f"cp_residual{suffix}_se"] = float(residual.error)
    metrics["drift_images"] = drift.cp_residual.count
    return metrics


def _facts(
    config: ImageConfig, manifest: Manifest, extractor: FeatureExtractor, drift: Drift
) -> dict[str, Any]:
    """What was evaluated and compared with, and the curves."""
    return {
        "drift": drift.curves(),
        "dataset": {"path": config.data.path, "fingerprint": manifest.fingerprint},
        "reference": config.eval.reference,
        "extractor": {"name": extractor.name, "fingerprint": extractor.fingerprint},
        "sampler": config.sampler.model_dump(mode="json"),
    }
