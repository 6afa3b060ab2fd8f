"""Adam that also keeps the exponential moving average (EMA) of the weights it updates.

The average is one more moment of the optimizer: it is kept in float32 beside the master weights,
ZeRO shards it with them, and the same accessors write it to a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from cdm_ray.config import OptimizerConfig


class EMAAdam(torch.optim.Adam):
    """Adam (Kingma & Ba 2015) with `state[p]["ema"] <- b ema + (1 - b) p` after each step.

    b is `param_group["ema_beta"]`. With `guard`, a step whose gradients are not all finite changes
    nothing and sets `overflow`, and gradients are clipped to `clip_norm`: what DeepSpeed's own
    optimizers do at ZeRO stages 1 to 3, for stage 0, where it leaves the optimizer alone. The
    attributes `overflow` and `_global_grad_norm` are where DeepSpeed's engine looks for them.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], config: OptimizerConfig, *, guard: bool
    ) -> None:
        super().__init__(params, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.guard = guard
        self.clip_norm = config.clip_norm
        if guard:
            self.overflow = False
            self._global_grad_norm = torch.tensor(0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("EMAAdam takes no closure: the loop computes the gradients")
        if self.guard and not self._gradients_usable():
            return
        super().step()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            averages = [self.state[p].setdefault("ema", p.detach().clone()) for p in weights]
            if weights:
                torch._foreach_lerp_(averages, weights, 1.0 - group["ema_beta"])

    def _gradients_usable(self) -> bool:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if self.clip_norm is not None and not self.overflow:
            scale = torch.clamp(self.clip_norm / norm, max=1.0)
            torch._foreach_mul_([g for g in gradients if g is not None], scale)
        return not self.overflow
