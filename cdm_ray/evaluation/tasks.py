"""How evaluation hands work out: the caller decides where a function is mapped over items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class MapTasks(Protocol):
    """`[function(item) for item in items]`, anywhere, in the order of the items.

    The function and the items must be serialisable; `cdm_ray.cluster.map_tasks` runs Ray tasks.
    """

    def __call__(
        self, function: Callable[[T], R], items: Sequence[T], description: str, /
    ) -> list[R]: ...


def task_device() -> torch.device:
    """The GPU that this task was given, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def split_evenly(count: int, parts: int) -> list[range]:
    """0 .. count - 1 as at most `parts` consecutive ranges, none empty, sizes differing by <= 1."""
    parts = min(parts, count)
    bounds = [count * part // parts for part in range(parts + 1)] if parts else [0]
    return [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
