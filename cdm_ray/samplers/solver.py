"""What a sampler is: a path from noise to data that shows its state at every noise level."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from cdm_ray.processes.rollout import DrawNoise, Field

PathFunction = Callable[[Field, Tensor, Tensor, DrawNoise], Iterator[Tensor]]
"""path(denoise, x, sigmas, draw_noise): the states at sigmas[1:], one by one.

`denoise`(x, sigma) with a 0-dim sigma > 0 gives D in the dtype of x (`in_float32` makes such a
function of a network). `x` [N, ...] is the state at sigmas[0], `sigmas` [K + 1] decrease and may
end at 0. Both float64 on one device; so are the states, which are not to be changed in place.
Gradients are recorded unless the caller turns them off.
"""


@dataclass(frozen=True)
class Solver:
    """A way to run a denoiser from noise to data."""

    name: str
    path: PathFunction
    evaluations_per_step: int
    """Network evaluations of a step, but for a step to 0, which has one."""
    stochastic: bool
    """Whether it follows the reverse SDE, with noise of its own, or the probability-flow ODE."""
    order: int
    """Of its error, in the size of the steps: of the state for an ODE solver, of the law of the
    states for a stochastic one."""

    def evaluations(self, steps: int, *, ends_at_zero: bool) -> int:
        """Network evaluations of a path of so many steps, the last of them to 0 or not."""
        whole = steps - 1 if ends_at_zero else steps
        return self.evaluations_per_step * whole + int(ends_at_zero)

    def sample(self, denoise: Field, x: Tensor, sigmas: Tensor, draw_noise: DrawNoise) -> Tensor:
        """The last state of the path."""
        for state in self.path(denoise, x, sigmas, draw_noise):
            x = state
        return x
