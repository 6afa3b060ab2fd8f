"""DeepSpeed behind four verbs: forward, backward, step, and full tensors in and out.

Everything that differs between ZeRO stages ends here; the loop and the checkpoints do not know the
stage. Collective calls (all ranks, same order) are marked as such.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from cdm_ray.checkpoint import KINDS, WEIGHTS
from cdm_ray.config import OptimizerConfig
from cdm_ray.training.optimizer import EMAAdam


@dataclass(frozen=True)
class StepResult:
    applied: bool
    """False if the gradients were not finite: nothing changed."""
    grad_norm: float
    """Global gradient norm before clipping; infinite when not applied."""


class Engine:
    """A network under DeepSpeed ZeRO with EMAAdam.

    `micro_steps` backward passes make one optimizer step. Gradients are averaged over workers, so
    the loss to give to `backward` is the local sum times workers / global batch.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        optimizer: OptimizerConfig,
        *,
        zero_stage: Literal[0, 1, 2, 3],
        precision: Literal["fp32", "bf16"],
        micro_steps: int,
    ) -> None:
        import deepspeed  # late: seconds of imports, and only workers train

        # Else the first start on a CPU compiles an operation that is never used.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.utils.logger.setLevel(logging.ERROR)  # warns of every optimizer but its own
        warnings.filterwarnings("ignore", message=".*(all_gather|reduce_scatter).*deprecated.*")
        self.zero_stage = zero_stage
        self._accessors = deepspeed.utils
        self._optimizer = EMAAdam(network.parameters(), optimizer, guard=zero_stage == 0)
        self._deepspeed, *_ = deepspeed.initialize(
            model=network,
            optimizer=self._optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: sizes may differ
                "gradient_accumulation_steps": micro_steps,
                "steps_per_print": 10**12,
                "gradient_clipping": 0.0 if zero_stage == 0 else optimizer.clip_norm or 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": zero_stage},
                "bf16": {"enabled": precision == "bf16"},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
        )
        self._micro_steps = micro_steps

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward pass of the network."""
        return self._deepspeed(*args, **kwargs)

    @property
    def network(self) -> torch.nn.Module:
        return self._deepspeed.module

    @property
    def device(self) -> torch.device:
        return self._deepspeed.device

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients. Collective; every rank as often."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def end_micro_step(self) -> None:
        """After every backward pass but the last one of a step."""
        self._deepspeed.step()

    def step(self, lr: float, ema_beta: float) -> StepResult:
        """After the last backward pass of a step: update weights and average. Collective."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["ema_beta"] = ema_beta
        self._deepspeed.step()
        norm = self._deepspeed.get_global_grad_norm()
        return StepResult(self._deepspeed.was_step_applied(), float(norm))

    @property
    def optimizer_steps(self) -> int:
        """Updates applied so far, Adam's bias-correction count."""
        for state in self._optimizer.state.values():
            return int(state["step"].item())
        return 0

    @torch.no_grad()
    def gather(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full float32 tensor) of every parameter, for a kind of KINDS. Collective.

        The tensor may be live memory: copy it to keep it.
        """
        for name, parameter in self.network.named_parameters():
            yield name, self._full(parameter, kind)

    @torch.no_grad()
    def restore(
        self,
        tensors: Callable[[str, str], torch.Tensor],
        optimizer_steps: int,
        prime: Callable[[], torch.Tensor],
    ) -> None:
        """Set all state from `tensors(kind, name)`. Collective.

        The network must already hold the weights: low-precision and ZeRO-3 copies are made from
        them at initialisation. `prime` computes any scalar from the network; DeepSpeed creates and
        links the optimizer's state in its first step, so one with zero gradient is taken, and
        everything that it touched is then overwritten.
        """
        for index in range(self._micro_steps):
            if index:
                self.end_micro_step()
            with torch.enable_grad():
                self.backward(prime() * 0.0)
        result = self.step(lr=0.0, ema_beta=0.0)
        if not result.applied:
            raise RuntimeError("the weights of the checkpoint give non-finite outputs")
        for kind in KINDS:
            for name, parameter in self.network.named_parameters():
                self._set(parameter, kind, tensors(kind, name).to(self.device))
        for state in self._optimizer.state.values():
            state["step"].fill_(optimizer_steps)

    def _full(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
        if self.zero_stage == 0:
            if kind == WEIGHTS:
                return parameter.detach()
            return self._optimizer.state[parameter][kind]
        if kind == WEIGHTS:
            return self._accessors.safe_get_full_fp32_param(parameter)
        return self._accessors.safe_get_full_optimizer_state(parameter, kind)

    def _set(self, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        if self.zero_stage == 0:
            self._full(parameter, kind).copy_(value)
        elif self.zero_stage < 3:
            if kind == WEIGHTS:
                self._accessors.safe_set_full_fp32_param(parameter, value)
            else:
                self._accessors.safe_set_full_optimizer_state(parameter, value, kind)
        else:
            # DeepSpeed's full setter fails where a parameter does not divide by the ranks; the
            # local one takes this rank's share, zero-padded at the end.
            share = cast(Any, parameter).ds_tensor.numel()
            padded = torch.nn.functional.pad(
                value.flatten(), (0, share * dist.get_world_size() - value.numel())
            )
            local = padded[share * dist.get_rank() : share * (dist.get_rank() + 1)]
            if kind == WEIGHTS:
                self._accessors.safe_set_local_fp32_param(parameter, local)
            else:
                self._accessors.safe_set_local_optimizer_state(parameter, local, kind)
