"""Random numbers that do not depend on how work is split.

Every random number of a run belongs to a *block*: a lane of the global batch in training, a single
image in sampling. A block has its own generator, seeded by what the block is and never by who
computes it, so that batch size, number of workers and restarts change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator seeded by all of `key`, a tuple of non-negative integers."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(seed)


class BlockRng:
    """Draws for a batch made of equal blocks of rows, one generator per block.

    A draw of shape [N, ...] needs N divisible by the number of blocks; block b fills rows
    b*N/blocks up to (b+1)*N/blocks from its own generator.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        if not generators:
            raise ValueError("BlockRng needs at least one generator")
        self.generators = list(generators)

    @classmethod
    def for_lanes(
        cls, seed: int, step: int, lanes: Sequence[int], device: torch.device | str
    ) -> BlockRng:
        """Blocks are lanes of the training batch at one step."""
        return cls([generator(0, seed, step, lane, device=device) for lane in lanes])

    @classmethod
    def for_images(cls, seeds: Sequence[int], device: torch.device | str) -> BlockRng:
        """Blocks are single images, each with its own seed."""
        return cls([generator(1, seed, device=device) for seed in seeds])

    @property
    def blocks(self) -> int:
        return len(self.generators)

    @property
    def device(self) -> torch.device:
        return self.generators[0].device

    def _draw(self, shape: Sequence[int], fill: str) -> torch.Tensor:
        rows, rest = divmod(shape[0], self.blocks)
        if rest:
            raise ValueError(f"{shape[0]} rows cannot be split over {self.blocks} equal blocks")
        out = torch.empty(tuple(shape), device=self.device)
        for block, gen in enumerate(self.generators):
            getattr(out[block * rows : (block + 1) * rows], fill)(generator=gen)
        return out

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal draws, float32."""
        return self._draw(shape, "normal_")

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform draws in [0, 1), float32."""
        return self._draw(shape, "uniform_")
