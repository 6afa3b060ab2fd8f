"""The training loop: a model, a stream of batches, and an objective whose terms are summed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist

from cdm_ray.checkpoint import TrainingState
from cdm_ray.config import TrainConfig
from cdm_ray.errors import RunFailed
from cdm_ray.objectives.base import Term
from cdm_ray.randomness import BlockRng
from cdm_ray.training.engine import Engine, StepResult
from cdm_ray.training.rates import Rates

B = TypeVar("B", contravariant=True)


class Objective(Protocol[B]):
    """`value` of each term is a sum over the samples of the batch."""

    def __call__(
        self, model: Any, batch: B, rng: BlockRng, samples_seen: int
    ) -> dict[str, Term]: ...


@dataclass(frozen=True)
class Pass(Generic[B]):
    """One micro-step's batch with its random numbers; `counts` as in lanes.MicroStep."""

    batch: B
    rng: BlockRng
    counts: bool


@dataclass(frozen=True)
class Record:
    """What rank 0 logs: means over the steps since the record before."""

    step: int
    samples_seen: int
    samples_per_second: float
    metrics: dict[str, float]


class Hooks(Protocol):
    """What the surroundings do at certain steps; `record` is called on rank 0 only."""

    def record(self, record: Record) -> None: ...

    def after_step(self, state: TrainingState) -> None: ...


@dataclass
class Meter:
    """Term sums on the device since the last record, read back once per record."""

    names: tuple[str, ...] = ()
    sums: torch.Tensor | None = None
    steps: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, terms: dict[str, Term]) -> None:
        values = torch.stack([term.value.detach().float() for term in terms.values()])
        if self.sums is None:
            self.names, self.sums = tuple(terms), values
        else:
            self.sums += values

    def take(self, batch: int) -> tuple[dict[str, float], float]:
        """Means per sample over all workers, and samples per second. Collective."""
        assert self.sums is not None
        dist.all_reduce(self.sums)
        means = (self.sums / (batch * self.steps)).tolist()
        now = time.perf_counter()
        metrics = {f"loss/{name}": mean for name, mean in zip(self.names, means, strict=True)}
        speed = batch * self.steps / (now - self.started)
        self.names, self.sums, self.steps, self.started = (), None, 0, now
        return metrics, speed


def run_loop(
    engine: Engine,
    objective: Objective[B],
    passes: Iterable[Sequence[Pass[B]]],
    state: TrainingState,
    *,
    last_step: int,
    batch: int,
    train: TrainConfig,
    rates: Callable[[TrainingState], Rates],
    hooks: Hooks,
    before_step: Callable[[], None] | None = None,
) -> TrainingState:
    """Train from `state` to `last_step`; `passes` yields this worker's micro-steps of each step, of
    which those of all workers have `batch` samples.

    Raises RunFailed after `train.max_nonfinite_in_row` steps without finite gradients.
    """
    scale = dist.get_world_size() / batch
    meter, skipped, skipped_in_row = Meter(), 0, 0
    iterator = iter(passes)
    while state.step < last_step:
        if before_step is not None:
            before_step()
        for index, micro in enumerate(batches := next(iterator)):
            if index:
                engine.end_micro_step()
            terms = objective(engine, micro.batch, micro.rng, state.samples_seen)
            if micro.counts:
                meter.add(terms)
            total = torch.stack([term.value * term.weight for term in terms.values()]).sum()
            engine.backward(total * (scale if micro.counts else 0.0))
        assert batches, "a step has at least one micro-step"
        meter.steps += 1
        lr, ema_beta = rates(state)
        result = engine.step(lr, ema_beta)
        state = TrainingState(
            step=state.step + 1,
            samples_seen=state.samples_seen + batch,
            optimizer_steps=state.optimizer_steps + result.applied,
        )
        skipped += not result.applied
        skipped_in_row = 0 if result.applied else skipped_in_row + 1
        if skipped_in_row >= train.max_nonfinite_in_row:
            raise RunFailed(_diagnosis(state, skipped_in_row, meter.take(batch)[0], lr))
        if state.step % train.log_every == 0 or state.step == last_step:
            losses, speed = meter.take(batch)
            if dist.get_rank() == 0:
                metrics = losses | _step_metrics(result, lr, skipped)
                hooks.record(Record(state.step, state.samples_seen, speed, metrics))
        hooks.after_step(state)
    return state


def _step_metrics(result: StepResult, lr: float, skipped: int) -> dict[str, float]:
    return {
        "gradient_norm": result.grad_norm,
        "learning_rate": lr,
        "steps_skipped_nonfinite": float(skipped),
    }


def _diagnosis(state: TrainingState, in_row: int, metrics: dict[str, float], lr: float) -> str:
    losses = ", ".join(f"{name}={value:g}" for name, value in metrics.items() if "loss/" in name)
    return (
        f"step {state.step}: gradients were not finite for {in_row} steps in a row "
        f"({losses}, lr={lr:g}); lower optimizer.lr, set optimizer.clip_norm, "
        "or look at the data, then start again from the last checkpoint"
    )
