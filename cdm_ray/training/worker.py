"""What one Ray Train worker does for an image run: build, restore, train, write checkpoints."""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from cdm_ray.checkpoint import (
    CHECKPOINTS,
    EMA,
    WEIGHTS,
    Checkpoint,
    TrainingState,
    newest_checkpoint,
)
from cdm_ray.config import ImageConfig, build_config, to_yaml
from cdm_ray.data.manifest import Manifest
from cdm_ray.data.stream import LaneStream, RawBatch
from cdm_ray.errors import ConfigError, RunFailed
from cdm_ray.initial_weights import initialise
from cdm_ray.networks import build_network
from cdm_ray.networks.precond import EDMPrecond
from cdm_ray.objectives.augmentation import augment
from cdm_ray.objectives.base import ImageBatch
from cdm_ray.objectives.image import ImageObjective
from cdm_ray.randomness import BlockRng
from cdm_ray.tracking import RunHandle, Tracker
from cdm_ray.training.checkpoint import write_average, write_checkpoint
from cdm_ray.training.engine import Engine
from cdm_ray.training.evaluations import snapshot_path
from cdm_ray.training.lanes import MicroStep, deal_lanes, micro_steps
from cdm_ray.training.loop import Pass, Record, run_loop

FATAL_FILE = "fatal.json"
FATAL_ERRORS = (RunFailed, ConfigError)
"""A restart would only repeat them."""


@dataclass(frozen=True)
class Assignment:
    """Everything a worker is told."""

    config: dict[str, Any]
    tracking: RunHandle | None
    launch: str
    """Identity of this launch: a restart within it does not repeat a fatal error."""


def train_worker(options: dict[str, Assignment]) -> dict[str, Any]:
    """Entry point for Ray Train, with {"assignment": Assignment}.

    Returns {"images_per_second": median} or, after an error that a restart would only repeat,
    {"fatal": message}.
    """
    assignment = options["assignment"]
    config = build_config(ImageConfig, assignment.config)
    if (message := fatal_message(config.run_folder, assignment.launch)) is not None:
        return {"fatal": message}
    try:
        images_per_second = _train(config, assignment)
    except FATAL_ERRORS as error:
        told = {"launch": assignment.launch, "message": str(error)}
        (config.run_folder / FATAL_FILE).write_text(json.dumps(told))
        raise
    return {"images_per_second": images_per_second}


def fatal_message(run_folder: Path, launch: str) -> str | None:
    """What ended this launch of the run for good, if a worker has told it."""
    try:
        content = json.loads((run_folder / FATAL_FILE).read_text())
    except FileNotFoundError:
        return None
    return content["message"] if content["launch"] == launch else None


def _train(config: ImageConfig, assignment: Assignment) -> float | None:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    manifest = Manifest.load(config.data.path)
    checkpoint = _agree_on_checkpoint(config.run_folder / CHECKPOINTS)
    network = random_network(config, manifest)
    if checkpoint is not None:
        network.load_state_dict(checkpoint.tensors(WEIGHTS))
    elif config.network.init is not None:
        initialise(network, config.network.init)
    dealt = deal_lanes(config.data.lanes, world)
    lanes_per_pass = config.train.micro_batch and config.train.micro_batch // config.lane_batch
    schedule = micro_steps(dealt, rank, lanes_per_pass)
    engine = Engine(
        network.to(device),
        config.optimizer,
        zero_stage=config.train.zero_stage,
        precision=_precision(config, device),
        micro_steps=len(schedule),
    )
    state = TrainingState(0, 0, 0) if checkpoint is None else checkpoint.state
    if checkpoint is not None:
        _restore(engine, checkpoint, config, manifest)
    rollout_network = None
    if config.cp.weight > 0 and config.cp.rollout_weights == "ema":
        rollout_network = random_network(config, manifest)
        rollout_network.load_state_dict(network.state_dict())  # buffers have no average
        rollout_network.to(device).requires_grad_(False)
    objective = ImageObjective(
        config.dsm,
        config.cp,
        config.network.sigma_data,
        rollout_model=rollout_network,
    )
    lanes = [lane for micro in schedule if micro.counts for lane in micro.lanes]
    hooks = _Hooks(config, engine, assignment, state)
    with (
        closing(hooks),
        LaneStream(
            config.data,
            manifest,
            seed=config.run.seed,
            lanes=lanes,
            lane_batch=config.lane_batch,
            start_step=state.step,
        ) as stream,
    ):
        run_loop(
            engine,
            objective,
            step_passes(config, stream, schedule, lanes, manifest, device, state.step),
            state,
            last_step=config.steps,
            train=config.train,
            optimizer=config.optimizer,
            ema=config.ema,
            hooks=hooks,
            before_step=(lambda: _copy_average(engine, rollout_network))
            if rollout_network is not None
            else None,
        )
    return hooks.images_per_second


def random_network(config: ImageConfig, manifest: Manifest) -> EDMPrecond:
    """The network with the weights that `run.seed` gives, the same on every worker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return build_network(
            config.network,
            resolution=config.data.resolution,
            channels=config.data.channels,
            label_dim=manifest.num_classes if config.network.class_conditional else 0,
            augment_dim=config.augment_dim,
        )


def _precision(config: ImageConfig, device: torch.device) -> Any:
    if config.train.precision == "auto":
        on_gpu = device.type == "cuda" and config.train.zero_stage > 0
        return "bf16" if on_gpu else "fp32"
    return config.train.precision


def _agree_on_checkpoint(root: Path) -> Checkpoint | None:
    """The newest sound checkpoint as rank 0 sees it, for all ranks."""
    found = newest_checkpoint(root) if dist.get_rank() == 0 else None
    message: list[Checkpoint | None] = [found]
    dist.broadcast_object_list(message)
    return message[0]


def _restore(
    engine: Engine, checkpoint: Checkpoint, config: ImageConfig, manifest: Manifest
) -> None:
    loaded: dict[str, dict[str, torch.Tensor]] = {}

    def tensor(kind: str, name: str) -> torch.Tensor:
        if kind not in loaded:
            loaded.clear()  # one kind in memory at a time
            loaded[kind] = checkpoint.tensors(kind)
        return loaded[kind][name]

    def prime() -> torch.Tensor:
        shape = (1, config.data.channels, config.data.resolution, config.data.resolution)
        labels = manifest.num_classes if config.network.class_conditional else 0
        given = {"class_labels": labels, "augment_labels": config.augment_dim}
        return engine(
            torch.zeros(shape, device=engine.device),
            torch.ones(1, device=engine.device),
            **{k: torch.zeros(1, n, device=engine.device) for k, n in given.items() if n},
        ).sum()

    engine.restore(tensor, checkpoint.state.optimizer_steps, prime)


@torch.no_grad()
def _copy_average(engine: Engine, network: torch.nn.Module) -> None:
    """Averaged weights into `network`; the live ones before the first step. Collective."""
    kind = EMA if engine.optimizer_steps > 0 else WEIGHTS
    targets = dict(network.named_parameters())
    for name, tensor in engine.gather(kind):
        targets[name].copy_(tensor)


def step_passes(
    config: ImageConfig,
    stream: Iterator[RawBatch],
    schedule: list[MicroStep],
    lanes: list[int],
    manifest: Manifest,
    device: torch.device,
    step: int,
) -> Iterator[list[Pass[ImageBatch]]]:
    """Micro-steps of each training step: the rows of their lanes, and their random numbers."""
    classes = manifest.num_classes if config.network.class_conditional else 0
    first_row = {lane: index * config.lane_batch for index, lane in enumerate(lanes)}
    for raw in stream:
        passes = []
        for micro in schedule:
            start = first_row[micro.lanes[0]]
            rows = slice(start, start + len(micro.lanes) * config.lane_batch)
            rng = BlockRng.for_lanes(config.run.seed, step, micro.lanes, device)
            batch = image_batch(raw, rows, classes, device)
            if config.augment.p > 0:
                images, told = augment(batch.images, config.augment.p, rng)
                batch = replace(batch, images=images, augment_labels=told)
            passes.append(Pass(batch, rng, micro.counts))
        yield passes
        step += 1


def image_batch(raw: RawBatch, rows: slice, classes: int, device: torch.device) -> ImageBatch:
    """Rows of a decoded batch on the device: images in [-1, 1], labels one-hot if `classes`."""
    images = raw.images[rows].to(device, non_blocking=True).float() / 127.5 - 1.0
    labels = None
    if classes:
        assert raw.labels is not None, "check_matches refuses shards without labels"
        one_hot = torch.nn.functional.one_hot(raw.labels[rows], classes)
        labels = one_hot.to(device, torch.float32, non_blocking=True)
    return ImageBatch(images=images, class_labels=labels)


class _Progress:
    """How far the run is: a bar with losses, speed and time left, one line for each record, so
    that it reads alike on a terminal and in a job's log."""

    WIDTH = 20

    def __init__(self, name: str, state: TrainingState, last_step: int) -> None:
        self._name, self._last_step = name, last_step
        self._first_step, self._started = state.step, time.perf_counter()

    def show(self, record: Record) -> None:
        losses = [f"{k[5:]} {v:.4g}" for k, v in record.metrics.items() if k.startswith("loss/")]
        speed = f"{record.metrics['images_per_second']:.0f} images/s"
        per_step = (time.perf_counter() - self._started) / (record.step - self._first_step)
        left = datetime.timedelta(seconds=round(per_step * (self._last_step - record.step)))
        bar = "#" * (self.WIDTH * record.step // self._last_step)
        place = f"{self._name} [{bar:.<{self.WIDTH}}] step {record.step}/{self._last_step}"
        print(", ".join([place, *losses, speed, f"{left} left"]), flush=True)


class _Hooks:
    """Checkpoints, on every rank; records to MLflow and progress on rank 0."""

    def __init__(
        self, config: ImageConfig, engine: Engine, assignment: Assignment, state: TrainingState
    ) -> None:
        self._config, self._engine, self._yaml = config, engine, to_yaml(config)
        self._every = max(1, round(config.checkpoint.every_images / config.train.batch))
        self._speeds: list[float] = []
        self._tracker, self._progress = None, None
        if dist.get_rank() == 0:
            self._progress = _Progress(config.run_name, state, config.steps)
            if assignment.tracking is not None:
                self._tracker = Tracker(assignment.tracking)

    @property
    def images_per_second(self) -> float | None:
        """Median over the records on rank 0, without the first one, which holds the warm-up."""
        return statistics.median(self._speeds[1:]) if len(self._speeds) > 1 else None

    def record(self, record: Record) -> None:
        self._speeds.append(record.metrics["images_per_second"])
        if self._tracker is not None:
            self._tracker.log_metrics(
                record.metrics | {"images_seen": float(record.images_seen)}, record.step
            )
        if self._progress is not None:
            self._progress.show(record)

    def after_step(self, state: TrainingState) -> None:
        if state.step % self._every == 0 or state.step == self._config.steps:
            write_checkpoint(
                self._config.run_folder / CHECKPOINTS,
                self._engine,
                state,
                self._yaml,
                keep_last=self._config.checkpoint.keep_last,
            )
        if state.step in self._config.evaluation_steps:
            write_average(snapshot_path(self._config, state.step), self._engine)

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.close(timeout=10.0)
