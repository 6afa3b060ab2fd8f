"""What a training run is part of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Surroundings:
    """What a run is part of, such as a sweep."""

    watch: Callable[[int, dict[str, float]], object] = lambda *_: None
    """Called with the step and the metrics of every evaluation, the last one at the end."""
    parent: str | None = None
    """The MLflow run whose child it is."""
    shares_cluster: bool = False
    """Whether other runs use the rest of the cluster, so that evaluations during training may only
    take what the run's own workers leave."""


ALONE = Surroundings()
