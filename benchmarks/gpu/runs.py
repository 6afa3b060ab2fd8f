"""What one visit to a card measures, and how each part of it is measured."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from benchmarks.gpu.graphs import GraphedDenoiser, cuda_capture
from benchmarks.gpu.kernels import profile_step
from benchmarks.gpu.measure import Device, time_call
from benchmarks.gpu.report import ROLLOUTS, Report, Row
from benchmarks.gpu.sampling import heun_evaluations, heun_run, relative_error
from benchmarks.gpu.settings import (
    OBJECTIVES,
    PUBLISHED_AUGMENT,
    PUBLISHED_DROPOUT,
    Sizes,
    section,
)
from benchmarks.gpu.variants import (
    BLOCKS,
    COMPILED,
    EAGER,
    EAGER_NCHW,
    ORIGINAL,
    TF32,
    Graph,
    Trainer,
    TrainingStep,
    Variant,
    errors,
    graph_breaks,
    initial_weights,
    matmul_precision,
    network_with,
)
from cdm_ray.objectives.augmentation import augment
from cdm_ray.objectives.cp import forward_units
from cdm_ray.randomness import BlockRng

GRAPH_NAMES: dict[Graph, str] = {"no": "", "rollouts": ROLLOUTS, "step": " + graph"}
CHECKED_SAMPLES = 16
Call = TypeVar("Call", bound=Callable[[], object])


@dataclass(frozen=True)
class Task:
    what: str
    """One of OBJECTIVES, "sampling" or "augmentation"."""
    variant: Variant
    batch: int
    graph: Graph = "no"

    @property
    def name(self) -> str:
        return self.variant.name + GRAPH_NAMES[self.graph]

    def __str__(self) -> str:
        return f"{self.what}, {self.name}, {self.batch}"


def plan(sizes: Sizes) -> list[Task]:
    """The most important first; those of a variant side by side, since they share a trainer."""
    large, small, *others = sizes.batches
    cp, shots = sizes.cp_batch, sizes.sample_batch
    both: tuple[Graph, ...] = ("no", "step")
    tasks = [Task("dsm", EAGER, batch, graph) for batch in (large, small) for graph in both]
    tasks += [Task("sampling", EAGER, shots, graph) for graph in both]
    tasks += [Task("dsm", v, batch) for v in (ORIGINAL, TF32) for batch in (small, large)]
    tasks += [Task("dsm", COMPILED, batch, graph) for batch in (large, small, cp) for graph in both]
    tasks += [Task("cp recommended", COMPILED, cp, graph) for graph in both]
    tasks += [Task("cp released", COMPILED, cp, graph) for graph in GRAPH_NAMES]
    tasks += [Task("sampling", COMPILED, shots, graph) for graph in both]
    tasks += [Task("augmentation", EAGER, large)]
    tasks += [Task("dsm", EAGER, cp, graph) for graph in both]
    tasks += [Task("cp recommended", EAGER, cp, graph) for graph in both]
    tasks += [Task("cp released", EAGER, cp, graph) for graph in GRAPH_NAMES]
    for variant in (EAGER, COMPILED):
        dropping = replace(variant, name=f"{variant.name}, dropout", dropout=PUBLISHED_DROPOUT)
        tasks += [Task("dsm", dropping, small, graph) for graph in both]
    tasks += [Task("dsm", EAGER_NCHW, large)]
    tasks += [Task("dsm", BLOCKS, large, graph) for graph in both]
    for variant in (COMPILED, EAGER):
        tasks += [Task("dsm", variant, batch, graph) for batch in others for graph in both]
    tasks += [Task("dsm", TF32, batch) for batch in others]
    return list(dict.fromkeys(tasks))


class Runner:
    """Measures tasks on a device; keeps the trainer of the last variant."""

    def __init__(self, device: Device, sizes: Sizes, report: Report) -> None:
        self.device, self.sizes, self.report = device, sizes, report
        weights = initial_weights(sizes)
        self.weights = {name: w.to(device.device) for name, w in weights.items()}
        self.trainer: Trainer | None = None
        self.best: Task | None = None
        self.cannot_compile = why_not_compile(device.device, sizes.compiler)

    def missing(self, task: Task) -> str | None:
        """Why the task cannot be measured here."""
        if task.graph != "no" and self.device.device.type != "cuda":
            return "CUDA only"
        if task.variant.compiled != "no" and self.cannot_compile:
            return f"torch.compile: {self.cannot_compile}"
        return None

    def new_row(self, task: Task) -> Row:
        """The task's row in the report, not measured yet."""
        row = Row(task.what, task.name, task.batch, missing=self.missing(task))
        self.report.rows.append(row)
        return row

    def run(self, task: Task, row: Row) -> None:
        """Fills in the row."""
        trainer = self._trainer(task.variant)
        trainer.load(self.weights)
        gc.collect()  # the step before, which refers to itself
        self.device.reset_peak()
        if task.what == "sampling":
            self._sampling(task, trainer, row)
        elif task.what == "augmentation":
            self._augmentation(row)
        else:
            self._training(task, trainer, row)
        if task.what == "dsm" and task.variant != ORIGINAL and row is self.report.best():
            self.best = task

    def drop(self) -> None:
        """Forget the trainer and what was compiled for it."""
        self.trainer = None
        torch.compiler.reset()
        gc.collect()

    def profile(self) -> None:
        """Of the fastest denoising step."""
        if self.best is None:
            return
        step = self._step(self.best, self._trainer(self.best.variant))
        self.device.times(step, 2)
        self.report.kernels = profile_step(step, self.device.device)
        self.report.profiled = str(self.best)

    def _training(self, task: Task, trainer: Trainer, row: Row) -> None:
        step = self._timed(row, lambda: self._step(task, trainer))
        units = forward_units(section(OBJECTIVES[task.what])) / forward_units(
            section(OBJECTIVES["dsm"])
        )
        row.flops = task.batch * self.report.network_flops * units
        trainer.load(self.weights)
        row.loss_error, row.gradient_error = errors(step, self._reference(task.variant))

    def _sampling(self, task: Task, trainer: Trainer, row: Row) -> None:
        denoiser: Callable[..., torch.Tensor] = trainer.model
        if task.graph != "no":
            denoiser = GraphedDenoiser(denoiser, cuda_capture)
        run = self._timed(
            row, lambda: heun_run(denoiser, self.sizes, task.batch, self.device.device)
        )
        row.flops = task.batch * self.report.network_flops / 3 * heun_evaluations(self.sizes)
        checked = min(CHECKED_SAMPLES, task.batch)
        exact = heun_run(self._reference(task.variant), self.sizes, checked, self.device.device)
        with matmul_precision(False):
            row.loss_error = relative_error(run()[:checked], exact())

    def _augmentation(self, row: Row) -> None:
        size, device = self.sizes.resolution, self.device.device
        rng = BlockRng.for_lanes(0, 0, range(row.batch // self.sizes.lane_batch), device)
        images = rng.uniform(row.batch, self.sizes.channels, size, size) * 2 - 1
        self._timed(row, lambda: lambda: augment(images, PUBLISHED_AUGMENT, rng))

    def _timed(self, row: Row, make: Callable[[], Call]) -> Call:
        """What `make` makes, its calls timed."""
        breaks, start = graph_breaks(), time.perf_counter()
        call = make()
        self.device.times(call, 1)
        row.first_call_seconds = time.perf_counter() - start
        row.graph_breaks = graph_breaks() - breaks
        row.seconds = time_call(call, self.device, self.sizes)
        row.peak_bytes = self.device.peak_bytes()
        return call

    def _step(self, task: Task, trainer: Trainer) -> TrainingStep:
        return TrainingStep(trainer, task.what, task.batch, self.sizes, graph=task.graph)

    def _trainer(self, variant: Variant) -> Trainer:
        if self.trainer is None or self.trainer.variant != variant:
            self.drop()
            self.trainer = Trainer(variant, self.sizes, self.weights)
        return self.trainer

    def _reference(self, variant: Variant) -> torch.nn.Module:
        """The float32 network of `initial_weights`; with activation checkpointing, so that it fits
        beside the variant's memory at every batch."""
        changes = {"dropout": variant.dropout, "activation_checkpointing": True}
        return network_with(self.weights, self.sizes, **changes)


def why_not_compile(device: torch.device, backend: str) -> str | None:
    """None if torch.compile works here."""
    try:
        torch.compile(torch.square, backend=backend)(torch.ones(2, device=device))
    except Exception as error:  # of the compiler behind it, whichever kind
        return first_line(error)
    return None


def first_line(error: Exception) -> str:
    """Of its message, after its type."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:150]
