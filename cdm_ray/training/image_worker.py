"""What one Ray Train worker does for an image run: build, restore, train, write checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import ray.train
import ray.train.torch
import torch

from cdm_ray.checkpoint import CHECKPOINTS, WEIGHTS, TrainingState
from cdm_ray.config import ImageConfig
from cdm_ray.data.manifest import Manifest
from cdm_ray.data.stream import LaneStream, RawBatch
from cdm_ray.initial_weights import initialise
from cdm_ray.networks import build_network
from cdm_ray.networks.precond import EDMPrecond
from cdm_ray.objectives.augmentation import augment
from cdm_ray.objectives.base import ImageBatch, Term
from cdm_ray.objectives.image import ImageObjective
from cdm_ray.randomness import BlockRng
from cdm_ray.training.engine import Engine
from cdm_ray.training.lanes import MicroStep, deal_lanes, micro_steps
from cdm_ray.training.loop import Pass, run_loop
from cdm_ray.training.rates import image_rates
from cdm_ray.training.worker import (
    Assignment,
    Pace,
    Speed,
    WorkerHooks,
    agree_on_checkpoint,
    copy_average,
    precision,
    restore,
    run_worker,
)


def train_worker(options: dict[str, Assignment]) -> dict[str, Any]:
    """Entry point for Ray Train."""
    return run_worker(options, ImageConfig, _train)


def _train(config: ImageConfig, assignment: Assignment) -> Pace | None:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    manifest = Manifest.load(config.data.path)
    checkpoint = agree_on_checkpoint(config.run_folder / CHECKPOINTS)
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
        precision=precision(config, device),
        micro_steps=len(schedule),
    )
    state = TrainingState(0, 0, 0) if checkpoint is None else checkpoint.state
    if checkpoint is not None:
        restore(engine, checkpoint, lambda: _prime(engine, config, manifest))
    rollout_network = None
    if any(map(rolls_out_average, config.segments.values())):
        rollout_network = random_network(config, manifest)
        # Buffers have no average; parameters get theirs before each step, and are not whole here.
        rollout_network.load_state_dict(dict(network.named_buffers()), strict=False)
        rollout_network.to(device).requires_grad_(False)
    lanes = [lane for micro in schedule if micro.counts for lane in micro.lanes]
    hooks = WorkerHooks(config, engine, assignment, state, Speed("images", 1.0))
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
        state = run_loop(
            engine,
            ImageObjectives(config, rollout_network),
            step_passes(config, stream, schedule, lanes, manifest, device, state.step),
            state,
            last_step=config.steps,
            batch=config.train.batch,
            train=config.train,
            rates=lambda state: image_rates(config, state.samples_seen),
            hooks=hooks,
            before_step=update_of_rollouts(config, engine, rollout_network, state.step),
        )
    return hooks.pace(state)


def rolls_out_average(config: ImageConfig) -> bool:
    """Whether the averaged weights drive the rollouts of CP."""
    return config.cp.weight > 0 and config.cp.rollout_weights == "ema"


class ImageObjectives:
    """The objective of each step, as `config.schedule` has it; `average` is the network with the
    averaged weights, if any step needs it."""

    def __init__(self, config: ImageConfig, average: EDMPrecond | None) -> None:
        self._config = config
        self._objectives = {
            first: ImageObjective(
                part.dsm,
                part.cp,
                part.network.sigma_data,
                rollout_model=average if rolls_out_average(part) else None,
            )
            for first, part in config.segments.items()
        }

    def __call__(
        self, model: Any, batch: ImageBatch, rng: BlockRng, samples_seen: int
    ) -> dict[str, Term]:
        segment = self._config.segment_at(samples_seen // self._config.train.batch)
        return self._objectives[segment](model, batch, rng, samples_seen)


def update_of_rollouts(
    config: ImageConfig, engine: Engine, average: EDMPrecond | None, step: int
) -> Callable[[], None] | None:
    """What has to be called before each step from `step` on: copies the averaged weights into the
    network that drives rollouts, if that step needs it."""
    if average is None:
        return None
    steps = itertools.count(step)

    def update() -> None:
        if rolls_out_average(config.at(next(steps))):
            copy_average(engine, average)

    return update


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


def _prime(engine: Engine, config: ImageConfig, manifest: Manifest) -> torch.Tensor:
    shape = (1, config.data.channels, config.data.resolution, config.data.resolution)
    labels = manifest.num_classes if config.network.class_conditional else 0
    given = {"class_labels": labels, "augment_labels": config.augment_dim}
    return engine(
        torch.zeros(shape, device=engine.device),
        torch.ones(1, device=engine.device),
        **{k: torch.zeros(1, n, device=engine.device) for k, n in given.items() if n},
    ).sum()


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
