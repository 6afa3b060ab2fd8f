"""How the lanes of the global batch are dealt to workers and micro-steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MicroStep:
    """One forward and backward pass of a worker."""

    lanes: tuple[int, ...]
    counts: bool
    """False: only there to keep collectives in step with workers that have more lanes; its loss
    has weight 0."""


def deal_lanes(lanes: int, workers: int) -> list[tuple[int, ...]]:
    """Contiguous lanes of each worker, as even as possible."""
    if not 1 <= workers <= lanes:
        raise ValueError(f"{lanes} lanes cannot be dealt to {workers} workers")
    return [tuple(map(int, part)) for part in np.array_split(np.arange(lanes), workers)]


def micro_steps(
    dealt: Sequence[Sequence[int]], rank: int, lanes_per_pass: int | None
) -> list[MicroStep]:
    """Passes of worker `rank`, as many for every worker; at most `lanes_per_pass` lanes in each
    (None: all at once)."""
    most = max(len(part) for part in dealt)
    passes = 1 if lanes_per_pass is None else -(-most // lanes_per_pass)
    parts = [tuple(map(int, part)) for part in np.array_split(np.array(dealt[rank]), passes)]
    return [MicroStep(part or (dealt[rank][0],), bool(part)) for part in parts]
