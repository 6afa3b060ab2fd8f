"""Simulating a path with the current model: the one loop behind CP and SDE sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cdm_ray.processes.edm import Step


def rollout(
    field: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    step: Step,
    x: torch.Tensor,
    times: torch.Tensor,
    draw_noise: Callable[[], torch.Tensor],
    *,
    first_field: torch.Tensor | None = None,
) -> torch.Tensor:
    """State at `times[-1]` of a path that starts from `x` at `times[0]`.

    `field(x, t)` is what the model says at a point, `step(x, field, t, t_next, noise)` moves on.
    x [N, ...]; times [K + 1] or, for paths with times of their own, [K + 1, N]; K >= 1.
    `first_field` is field(x, times[0]) where it is known already.
    """
    for k in range(len(times) - 1):
        known = first_field if k == 0 else None
        value = field(x, times[k]) if known is None else known
        x = step(x, value, times[k], times[k + 1], draw_noise())
    return x
