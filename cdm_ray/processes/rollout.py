"""Simulation of paths: one loop behind consistency losses and SDE sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
"""field(x, t): what drives the process at state x [N, ...] and time t ([N] or 0-dim). Scores of
bridges take any shape: x [..., d], and times whose shape broadcasts with its own but for d."""
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""step(x, f, t, t_next, noise): the next state, from the field's value f and standard noise."""
DrawNoise = Callable[[], Tensor]
"""draw_noise(): fresh standard normal noise, shaped like the state."""


def path(
    field: Field,
    step: Step,
    x: Tensor,
    times: Tensor,
    draw_noise: DrawNoise,
    *,
    first_field: Tensor | None = None,
) -> Iterator[Tensor]:
    """States of a path that starts from x [N, ...] at times[0]: those at times[1:], one by one.

    `times` [K + 1, N], or [K + 1] if all samples share them: K steps. Noise is drawn once per
    step. `first_field`, if known, is the field's value at the start and saves its evaluation.
    """
    value = first_field
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        x = step(x, field(x, t) if value is None else value, t, t_next, draw_noise())
        value = None
        yield x


def rollout(
    field: Field,
    step: Step,
    x: Tensor,
    times: Tensor,
    draw_noise: DrawNoise,
    *,
    first_field: Tensor | None = None,
) -> Tensor:
    """End of a `path`, at times[-1]; x itself if there is no step to make."""
    for state in path(field, step, x, times, draw_noise, first_field=first_field):
        x = state
    return x
