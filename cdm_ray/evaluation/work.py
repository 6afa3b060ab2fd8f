"""What a task of an evaluation does: images, their features, and the drift of some of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_ray.config import ImageConfig
from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.drift import DriftPart, drift_on_data, generate_with_drift, merge_parts
from cdm_ray.evaluation.features import load_extractor
from cdm_ray.evaluation.generate import KINDS, Kind, generate
from cdm_ray.evaluation.parts import Tensors
from cdm_ray.evaluation.plan import Item, item_seeds
from cdm_ray.evaluation.reference import LabelledImages
from cdm_ray.evaluation.reference_features import FEATURES
from cdm_ray.evaluation.tasks import task_device
from cdm_ray.networks import EDMPrecond, build_network
from cdm_ray.networks.exported import differences

SHOWN = "shown"
"""Name of the images of the grid in a part."""
_RESIDUALS, _NORMS = "residuals.", "norms."


@dataclass(frozen=True)
class Subject:
    """What every task needs to know. `real` are the images behind the drift on data."""

    config: ImageConfig
    state_dict: dict[str, Tensor]
    label_dim: int
    real: LabelledImages


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
            augment_dim=config.augment_dim,
        )
    different = sorted(name for names in differences(network, state_dict) for name in names)
    if different:
        first = different[0]
        given, expected = (
            {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            for tensors in (state_dict, network.state_dict())
        )
        raise ConfigError(
            f"the weights do not fit the configured network: {len(different)} tensors differ, "
            f"e.g. {first} is {given.get(first, 'missing')} and should be "
            f"{expected.get(first, 'absent')}; use the network section they were trained with"
        )
    network.load_state_dict(state_dict)
    return network.to(device).requires_grad_(False)


def run_item(subject: Subject, item: Item) -> Tensors:
    """One task, on the GPU if it was given one, `eval.batch` images at a time.

    Of generated images the features float32 [n, d], those below `eval.grid` themselves, and the
    drift of those below `eval.drift_images`, both of the first range of seeds only; of real images
    the drift.
    """
    config, device = subject.config, task_device()
    network = load_network(config, subject.state_dict, subject.label_dim, device)
    size = config.eval.batch
    found: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, len(item.rows), size):
        rows = item.rows[start : start + size]
        if item.source == "data":
            made = _probe_data(subject, network, item, rows, device)
        else:
            made = _generate(subject, network, item, item.source, rows, device)
        for name, tensor in made.items():
            found[name].append(tensor.cpu())
    return {name: torch.cat(tensors) for name, tensors in found.items()}


def read_drift(parts: Iterable[Tensors]) -> DriftPart:
    """The drift in parts of one source, in order."""
    return merge_parts(
        [
            DriftPart(
                {
                    int(name.removeprefix(_RESIDUALS)): values.numpy()
                    for name, values in part.items()
                    if name.startswith(_RESIDUALS)
                },
                {kind: part[_NORMS + kind].numpy() for kind in KINDS if _NORMS + kind in part},
            )
            for part in parts
        ]
    )


def _probe_data(
    subject: Subject, network: EDMPrecond, item: Item, rows: range, device: torch.device
) -> Tensors:
    config, real = subject.config, subject.real[rows.start : rows.stop]
    seeds = item_seeds(config.eval, item, rows)
    return _drift_tensors(drift_on_data(network, config, real, seeds, subject.label_dim, device))


def _generate(
    subject: Subject,
    network: EDMPrecond,
    item: Item,
    kind: Kind,
    rows: range,
    device: torch.device,
) -> Tensors:
    config, label_dim = subject.config, subject.label_dim
    seeds = item_seeds(config.eval, item, rows)

    def below(limit: int) -> int:
        return min(max(limit - rows.start, 0), len(rows)) if item.seed_range == 0 else 0

    probed, shown = below(config.eval.drift_images), below(config.eval.grid)
    tensors: Tensors = {}
    if probed:
        images, drift = generate_with_drift(network, config, seeds, label_dim, kind, device, probed)
        tensors |= _drift_tensors(drift)
    else:
        images = generate(network, config, seeds, label_dim, kind, device)
    tensors[FEATURES] = load_extractor(config.eval, device)(images)
    if shown:
        tensors[SHOWN] = images[:shown]
    return tensors


def _drift_tensors(drift: DriftPart) -> Tensors:
    """Values float64 [n, levels] by name."""
    values = {f"{_RESIDUALS}{steps}": table for steps, table in drift.residuals.items()}
    values |= {f"{_NORMS}{kind}": table for kind, table in drift.norms.items()}
    return {name: torch.from_numpy(table) for name, table in values.items()}
