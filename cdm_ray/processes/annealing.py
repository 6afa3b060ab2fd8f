"""A reference process on the way to itself: less drift and more noise at first."""

from __future__ import annotations

from torch import Tensor

from cdm_ray.processes.references import ReferenceProcess


class Annealed(ReferenceProcess):
    """`drift_share` b(x) and `sigma_factor` sigma(t) of a process; both may be changed and are 1 at
    first. Without its drift a process is Brownian and its bridge is known."""

    def __init__(self, process: ReferenceProcess) -> None:
        super().__init__(process.dim, process.noise)
        self.process = process
        self.drift_share, self.sigma_factor = 1.0, 1.0

    def drift(self, x: Tensor) -> Tensor:
        drift = self.process.drift(x)
        return drift if self.drift_share == 1 else self.drift_share * drift

    def sigma(self, t: Tensor) -> Tensor:
        sigma = self.process.sigma(t)
        return sigma if self.sigma_factor == 1 else self.sigma_factor * sigma

    def inside(self, x: Tensor) -> Tensor:
        return self.process.inside(x)
