"""Evaluation of one set of weights: samples, Fréchet distances, drift, figures."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cdm_ray.config import ImageConfig
from cdm_ray.data.manifest import Manifest
from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.drift import (
    SOURCES,
    Drift,
    DriftPart,
    Source,
    drift_on_data,
    generate_with_drift,
    level_sigmas,
    merge_parts,
)
from cdm_ray.evaluation.features import load_extractor
from cdm_ray.evaluation.figures import drift_figures, save_grid
from cdm_ray.evaluation.frechet import (
    FeatureStatistics,
    frechet_distance,
    merge_all,
    metric_name,
)
from cdm_ray.evaluation.generate import KINDS, Kind, generate, num_evaluations
from cdm_ray.evaluation.reference import (
    MAX_TASKS,
    Dataset,
    LabelledImages,
    reference_images,
    reference_statistics,
)
from cdm_ray.evaluation.tasks import MapTasks, split_evenly, task_device
from cdm_ray.networks import EDMPrecond, build_network

log = logging.getLogger(__name__)

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers by name; figures and sample grids as PNG files by name."""

    metrics: dict[str, float]
    figures: dict[str, Path]
    grids: dict[str, Path]


@dataclass(frozen=True)
class Subject:
    """What every task needs to know. `real` are the images behind the drift on data."""

    config: ImageConfig
    state_dict: dict[str, Tensor]
    label_dim: int
    real: LabelledImages


class Item(NamedTuple):
    """One task: generate the images `rows` with a sampler, or probe the real images `rows`."""

    source: Source
    rows: range


@dataclass(frozen=True)
class Outcome:
    """What a task returns: of generated images the statistics and those that the grid shows, of
    probed ones the drift."""

    statistics: FeatureStatistics | None
    shown: list[Tensor]
    drift: DriftPart | None


def evaluate(
    config: ImageConfig,
    state_dict: dict[str, Tensor],
    manifest: Manifest,
    *,
    cache_folder: Path,
    out_folder: Path,
    map_tasks: MapTasks,
) -> EvaluationResult:
    """Compare what the weights generate with the data set in `config.data.path`.

    Metrics: `<name>_ode` and `<name>_sde`, where the name is `fid` or carries the extractor's,
    `fd_images` generated images behind each and `fd_reference_images` real ones; `cp_residual` with
    its standard error and `drift_images` images, see `Drift.cp_residual`; `nfe_ode`, `nfe_sde`
    network evaluations per image. Numbers, curves and what they were computed from are also written
    to `results.json` in `out_folder`. Raises ConfigError when the extractor cannot be used or the
    weights do not fit.
    """
    label_dim = manifest.num_classes if config.network.class_conditional else 0
    load_network(config, state_dict, label_dim, "cpu")  # a misfit is refused before any task starts
    dataset = Dataset(config.data.path, manifest, config.data.max_bad_fraction)
    reference = reference_statistics(dataset, config.eval, cache_folder, map_tasks)
    real = reference_images(dataset, config.eval.drift_images, cache_folder, map_tasks)
    items = plan(config, len(real))
    task = partial(run_item, Subject(config, state_dict, label_dim, real))
    results = map_tasks(task, items, "evaluation")
    outcomes: dict[Source, list[Outcome]] = {source: [] for source in SOURCES}
    for item, outcome in zip(items, results, strict=True):
        outcomes[item.source].append(outcome)
    statistics = {
        kind: merge_all(o.statistics for o in outcomes[kind] if o.statistics is not None)
        for kind in KINDS
    }
    drift = Drift(
        {kind: level_sigmas(config, kind) for kind in KINDS},
        {
            source: merge_parts([o.drift for o in found if o.drift is not None])
            for source, found in outcomes.items()
        },
    )
    metrics = _metrics(config, statistics, reference, drift)
    out_folder.mkdir(parents=True, exist_ok=True)
    grids: dict[str, Path] = {}
    for kind in KINDS:
        grids[kind] = out_folder / f"samples_{kind}.png"
        save_grid(torch.cat([shown for o in outcomes[kind] for shown in o.shown]), grids[kind])
    figures = drift_figures(drift, out_folder)
    _write_results(config, manifest, metrics, drift, out_folder / RESULTS_NAME)
    return EvaluationResult(metrics, figures, grids)


def load_network(
    config: ImageConfig,
    state_dict: dict[str, Tensor],
    label_dim: int,
    device: torch.device | str,
) -> EDMPrecond:
    """The configured network with these weights; raises ConfigError when they do not fit."""
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten at once
        network = build_network(
            config.network,
            resolution=config.data.resolution,
            channels=config.data.channels,
            label_dim=label_dim,
        )
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if given != expected:
        different = sorted(k for k in expected | given if expected.get(k) != given.get(k))
        first = different[0]
        raise ConfigError(
            f"the weights do not fit the configured network: {len(different)} tensors differ, "
            f"e.g. {first} is {given.get(first, 'missing')} and should be "
            f"{expected.get(first, 'absent')}; use the network section they were trained with"
        )
    network.load_state_dict(state_dict)
    return network.to(device).requires_grad_(False)


def plan(config: ImageConfig, real_images: int) -> list[Item]:
    """Tasks of an evaluation, the longest first, so that no worker is left with one at the end.

    A task has about `eval.batch` images, or more where that would make too many tasks.
    """

    def split(source: Source, total: int) -> list[Item]:
        tasks = min(math.ceil(total / config.eval.batch), MAX_TASKS)
        return [Item(source, rows) for rows in split_evenly(total, tasks)]

    generated = config.eval.images
    return [*split("sde", generated), *split("data", real_images), *split("ode", generated)]


def run_item(subject: Subject, item: Item) -> Outcome:
    """One task, on the GPU if it was given one, `eval.batch` images at a time."""
    config, device = subject.config, task_device()
    network = load_network(config, subject.state_dict, subject.label_dim, device)
    size = config.eval.batch
    batches = [item.rows[start : start + size] for start in range(0, len(item.rows), size)]
    if item.source == "data":
        parts = [_probe_data(subject, network, rows, device) for rows in batches]
        return Outcome(None, [], merge_parts(parts))
    made = [_generate(subject, network, item.source, rows, device) for rows in batches]
    probed = [outcome.drift for outcome in made if outcome.drift is not None]
    return Outcome(
        merge_all(outcome.statistics for outcome in made if outcome.statistics is not None),
        [shown for outcome in made for shown in outcome.shown],
        merge_parts(probed) if probed else None,
    )


def _probe_data(
    subject: Subject, network: EDMPrecond, rows: range, device: torch.device
) -> DriftPart:
    config, real = subject.config, subject.real[rows.start : rows.stop]
    return drift_on_data(network, config, real, _seeds(config, rows), subject.label_dim, device)


def _generate(
    subject: Subject, network: EDMPrecond, kind: Kind, rows: range, device: torch.device
) -> Outcome:
    """The images `rows`; those below `eval.drift_images` are also probed."""
    config, label_dim = subject.config, subject.label_dim
    seeds = _seeds(config, rows)
    probed = min(max(config.eval.drift_images - rows.start, 0), len(rows))
    drift = None
    if probed:
        images, drift = generate_with_drift(network, config, seeds, label_dim, kind, device, probed)
    else:
        images = generate(network, config, seeds, label_dim, kind, device)
    features = load_extractor(config.eval, device)(images)
    shown = images[: max(config.eval.grid - rows.start, 0)].cpu()
    return Outcome(FeatureStatistics.of(features), [shown], drift)


def _seeds(config: ImageConfig, rows: range) -> range:
    first = config.eval.first_seed
    return range(first + rows.start, first + rows.stop)


def _metrics(
    config: ImageConfig,
    statistics: dict[Kind, FeatureStatistics],
    reference: FeatureStatistics,
    drift: Drift,
) -> dict[str, float]:
    name = metric_name(config.eval.extractor, reference.dim)
    metrics: dict[str, float] = {}
    for kind, generated in statistics.items():
        metrics[f"{name}_{kind}"] = frechet_distance(generated, reference)
        metrics[f"nfe_{kind}"] = num_evaluations(config.sampler, kind)
        log.info(
            "%s of %s samples: %.4f (%d generated, %d real images, %d network evaluations each)",
            name,
            kind.upper(),
            metrics[f"{name}_{kind}"],
            generated.count,
            reference.count,
            metrics[f"nfe_{kind}"],
        )
    metrics["fd_images"] = config.eval.images
    metrics["fd_reference_images"] = reference.count
    for suffix, residual in (("", drift.cp_residual), ("_on_data", drift.cp_residual_on_data)):
        metrics[f"cp_residual{suffix}"] = float(residual.mean)
        metrics[f"cp_residual{suffix}_se"] = float(residual.error)
        log.info(
            "CP residual%s per dimension: %.3g +- %.1g (%d images)",
            suffix.replace("_", " "),
            residual.mean,
            residual.error,
            residual.count,
        )
    metrics["drift_images"] = drift.cp_residual.count
    return metrics


def _write_results(
    config: ImageConfig,
    manifest: Manifest,
    metrics: dict[str, float],
    drift: Drift,
    path: Path,
) -> None:
    extractor = load_extractor(config.eval, "cpu")
    content = {
        "metrics": metrics,
        "drift": drift.curves(),
        "dataset": {"path": config.data.path, "fingerprint": manifest.fingerprint},
        "extractor": {"name": extractor.name, "fingerprint": extractor.fingerprint},
        "sampler": config.sampler.model_dump(mode="json"),
        "first_seed": config.eval.first_seed,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
