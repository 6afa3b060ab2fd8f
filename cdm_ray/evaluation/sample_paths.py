"""Paths of a bridge's checkpoint in a file, with the importance weights that correct them.

paths.npz       times [K + 1], states [paths, K + 1, d] float32, log_weights [paths]
paths.parquet   a row for each path and step: path, step, time, x0, x1, ..., log_weight

States, and the density of the end, are in the coordinates of the configuration. The weights are
against the Euler chain of the reference process, see `log_weights` in bridge_metrics.py: with w =
exp(log_weight), the mean of w is an unbiased estimate of its p(end | start), that of w f(path) one
of p(end | start) E[f(path) | end] for every f of the states before the last one, and their ratio is
the bridge's mean of f. The last state is where the model went, next to the end.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cdm_ray.bridges import bridge_of, trained_control
from cdm_ray.checkpoint import EMA, Checkpoint
from cdm_ray.config import BridgeConfig
from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.bridge_evaluation import float32, given_coordinates, log_stretch
from cdm_ray.evaluation.bridge_metrics import WeightSummary, log_weights, simulate_bridge
from cdm_ray.evaluation.features import tensors_digest
from cdm_ray.evaluation.npz import short_digest
from cdm_ray.evaluation.sample_images import SETTINGS_NAME, samples_root
from cdm_ray.networks.control import BridgeControl
from cdm_ray.processes.bridge import Bridge
from cdm_ray.processes.simulation import check_paths
from cdm_ray.randomness import generator
from cdm_ray.storage import AnyPath, whole_file, write_whole

STREAM = 6
"""First part of the seeds of the noise drawn here."""
CHUNK = 512
"""Paths that are simulated together, each chunk from noise of its own: what is in memory at once.
Fixed, since the noise depends on it."""

Append = Callable[[NDArray[np.float32], NDArray[np.float64]], None]
"""append(states [n, K + 1, d], log_weights [n])."""


@dataclass(frozen=True)
class PathSamples:
    """Paths in a file."""

    file: AnyPath
    paths: int
    weights: WeightSummary


def sample_paths(config: BridgeConfig, checkpoint: Checkpoint) -> PathSamples:
    """Write `eval.paths` paths of the averaged weights, simulated as the evaluation does, with
    `eval.steps` steps, to `paths_file`; `settings.json` beside it tells what its folder stands for.

    A path depends on the weights, `eval.seed`, `eval.steps` and its number: more paths begin with
    those of fewer. Raises ConfigError when the weights do not fit or pyarrow is missing, RunFailed
    when a path diverges; the file is then as it was before.
    """
    bridge, state_dict = bridge_of(config), checkpoint.tensors(EMA)
    control = trained_control(config, bridge, state_dict, str(checkpoint.folder))
    settings, file = _settings(config, state_dict), paths_file(config, checkpoint)
    times = bridge.times(config.eval.steps).numpy()
    shape = (config.eval.paths, len(times), config.dim)
    writer = {"npz": _npz, "parquet": _parquet}[config.eval.format]
    write_whole(file.with_name(SETTINGS_NAME), (json.dumps(settings, indent=1) + "\n").encode())
    every_weight = []
    with whole_file(file) as temporary, writer(temporary, times, shape) as append:
        for states, weights in _simulated(config, float32(bridge), control):
            append(states, weights)
            every_weight.append(weights)
    summary = WeightSummary.of(torch.from_numpy(np.concatenate(every_weight)))
    return PathSamples(file, config.eval.paths, summary)


def paths_file(config: BridgeConfig, checkpoint: Checkpoint) -> AnyPath:
    """`<run>/samples/<checkpoint>-<key>/paths.npz` or `.parquet`; the key stands for all that
    determines the paths."""
    settings = _settings(config, checkpoint.tensors(EMA))
    key = short_digest(json.dumps(settings, sort_keys=True))
    folder = samples_root(checkpoint) / f"{checkpoint.name}-{key}"
    return folder / f"paths.{config.eval.format}"


def print_plan(config: BridgeConfig, checkpoint: Checkpoint) -> None:
    """What `sample_paths` would do."""
    bridge = bridge_of(config)
    trained_control(config, bridge, checkpoint.tensors(EMA), str(checkpoint.folder))
    evaluation = config.eval
    size = 4 * evaluation.paths * (evaluation.steps + 1) * config.dim
    print(f"checkpoint  {checkpoint.folder}, averaged weights")
    print(f"paths       {evaluation.paths:,} with {evaluation.steps:,} steps")
    print(f"noise       eval.seed={evaluation.seed}")
    print(f"states      {size:,} bytes")
    print(f"file        {paths_file(config, checkpoint)}")


def print_samples(samples: PathSamples) -> None:
    """The file, and what the importance weights say."""
    weights, log_p = samples.weights, samples.weights.log_p
    print(f"file   {samples.file} ({samples.paths:,} paths)")
    print(f"ESS    {weights.ess:.3f} of the paths")
    print(f"log p  {float(log_p.mean):.5g} ± {float(log_p.error):.2g}, of the end given the start")


def _simulated(
    config: BridgeConfig, bridge: Bridge, control: BridgeControl
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float64]]]:
    """States [n, K + 1, d] and log weights [n] of one chunk after the other."""
    asked, stretch = config.eval, log_stretch(bridge)
    firsts = range(0, asked.paths, CHUNK)
    bar = tqdm(firsts, desc="simulating paths", file=sys.stderr, dynamic_ncols=True)
    for number, first in enumerate(bar):
        seed = generator(STREAM, asked.seed, number).initial_seed()
        # Whole chunks, so that a path does not depend on how many follow it.
        paths = simulate_bridge(control.drift, bridge, steps=asked.steps, paths=CHUNK, seed=seed)
        check_paths(paths, bridge.process, f"paths from {first}, eval.seed={asked.seed}")
        weights = log_weights(control.drift, bridge, paths, pinned=True) - stretch
        states = given_coordinates(bridge, paths.states).transpose(0, 1).float()
        wanted = min(CHUNK, asked.paths - first)
        yield states[:wanted].contiguous().numpy(), weights[:wanted].numpy()


def _settings(config: BridgeConfig, state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """All that determines the paths."""
    parts = {name: getattr(config, name) for name in ("process", "bridge", "network")}
    return {
        "weights": tensors_digest(state_dict),
        **{name: part.model_dump(mode="json") for name, part in parts.items()},
        "eval": config.eval.model_dump(include={"paths", "steps", "seed"}),
    }


@contextmanager
def _npz(path: Path, times: NDArray[np.float64], shape: tuple[int, ...]) -> Iterator[Append]:
    """What `np.savez` would write, without all of the states at once."""
    every_weight = []
    with zipfile.ZipFile(path, "w") as archive:
        _add(archive, "times", times)
        with archive.open("states.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)

            def append(states: NDArray[np.float32], log_weights: NDArray[np.float64]) -> None:
                member.write(states.astype("<f4", copy=False).tobytes())
                every_weight.append(log_weights)

            yield append
        _add(archive, "log_weights", np.concatenate(every_weight))


def _add(archive: zipfile.ZipFile, name: str, values: NDArray[np.float64]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, values, allow_pickle=False)


def _parquet(
    path: Path, times: NDArray[np.float64], shape: tuple[int, ...]
) -> AbstractContextManager[Append]:
    # Imported here: it takes long, only this needs it, and it comes with MLflow alone.
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(
            f"eval.format=parquet needs pyarrow ({error}); install it, or use eval.format=npz"
        ) from None
    return _parquet_rows(pyarrow, path, times, shape)


@contextmanager
def _parquet_rows(
    pyarrow: Any, path: Path, times: NDArray[np.float64], shape: tuple[int, ...]
) -> Iterator[Append]:
    _, points, dim = shape
    kinds = {"path": "int64", "step": "int32", "time": "float64"}
    kinds |= {f"x{axis}": "float32" for axis in range(dim)} | {"log_weight": "float64"}
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in kinds.items()])
    written = 0
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def append(states: NDArray[np.float32], log_weights: NDArray[np.float64]) -> None:
            nonlocal written
            count = len(states)
            columns = {
                "path": np.repeat(np.arange(written, written + count), points),
                "step": np.tile(np.arange(points, dtype=np.int32), count),
                "time": np.tile(times, count),
                **{f"x{axis}": states[:, :, axis].ravel() for axis in range(dim)},
                "log_weight": np.repeat(log_weights, points),
            }
            writer.write_table(pyarrow.table(columns, schema=schema))
            written += count

        yield append
