"""A diffusion bridge: a reference process that is told where it has to end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_ray.errors import ConfigError
from cdm_ray.processes.references import ReferenceProcess


@dataclass(frozen=True)
class Bridge:
    """dX = b(X) dt + sigma(t) dB from X_0 = `start`, conditioned on X_T = `end`, T = `duration`.

    Raises ConfigError for states of another dimension or that are not finite, and a duration that
    is not positive.
    """

    process: ReferenceProcess
    start: Tensor
    """[d]."""
    end: Tensor
    """[d]."""
    duration: float

    def __post_init__(self) -> None:
        dim = self.process.dim
        for name, state in (("start", self.start), ("end", self.end)):
            if state.shape != (dim,) or not state.isfinite().all():
                raise ConfigError(
                    f"{name}={state.tolist()} of a bridge in {dim} dimensions; give {dim} finite "
                    "coordinates"
                )
        if not (math.isfinite(self.duration) and self.duration > 0):
            raise ConfigError(f"duration={self.duration} of a bridge; it has to be positive")

    def times(self, steps: int) -> Tensor:
        """Equal steps from 0 to T, float64 [steps + 1]."""
        return torch.linspace(0.0, self.duration, steps + 1, dtype=torch.float64)
