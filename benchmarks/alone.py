"""Training of a bridge in this process, without Ray: for benchmarks of bridges."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from cdm_ray.bridges import control_of
from cdm_ray.checkpoint import TrainingState
from cdm_ray.config import BridgeConfig
from cdm_ray.randomness import BlockRng
from cdm_ray.training.bridge_worker import BridgeRun, PairBatch
from cdm_ray.training.engine import Engine
from cdm_ray.training.loop import Record, run_loop
from cdm_ray.training.rates import bridge_rates


def join_group_of_one() -> None:
    """Make this process the only one of its training, with one thread on the CPU."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it on import
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@contextmanager
def group_of_one() -> Iterator[None]:
    """The same for a while."""
    join_group_of_one()
    try:
        yield
    finally:
        dist.destroy_process_group()


class Training:
    """One run of a bridge, all lanes of it, on the CPU; this process must be in a group."""

    def __init__(self, config: BridgeConfig) -> None:
        self.config = config
        self.run = BridgeRun(config, range(config.simulation.lanes), torch.device("cpu"))
        self.engine = Engine(
            control_of(config, self.run.bridge),
            config.optimizer,
            zero_stage=config.train.zero_stage,
            precision="fp32",
            micro_steps=1,
        )
        self._passes = self.run.passes(self.engine, 0)
        self._state = TrainingState(0, 0, 0)

    @property
    def steps(self) -> int:
        """Optimizer steps that were made; at a failure, those before it."""
        return self._state.step

    def advance(self, steps: int) -> None:
        """Optimizer steps as a worker makes them. Raises RunFailed."""
        run_loop(
            self.engine,
            self.run.objective,
            self._passes,
            self._state,
            last_step=self._state.step + steps,
            batch=self.config.pairs,
            train=self.config.train,
            rates=lambda state: bridge_rates(self.config, state.step),
            hooks=self,
        )

    def record(self, record: Record) -> None:
        """Hook of the loop."""

    def after_step(self, state: TrainingState) -> None:
        """Hook of the loop."""
        self._state = state

    def learn(self, batch: PairBatch, rng: BlockRng) -> None:
        """One optimizer step on given pairs, which changes no weight but costs what others do."""
        (term,) = self.run.objective(self.engine, batch, rng, 0).values()
        self.engine.backward(term.value * term.weight / self.config.pairs)
        self.engine.step(lr=0.0, ema_beta=1.0)
