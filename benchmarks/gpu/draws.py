"""The random numbers of a step, drawn before it.

A BlockRng draws with one generator per lane. torch.compile cannot trace a draw with a generator
(the graph breaks at each one, in every block with dropout), and CUDA graphs need every generator
registered (torch 2.11). So the step is traced or captured with a `Tape` in place of the BlockRng:
the same numbers, from buffers that stay where they are and are filled anew before each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cdm_ray.randomness import BlockRng


class Recorder(BlockRng):
    """A BlockRng that writes down what is drawn."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__(generators)
        self.drawn: list[tuple[str, tuple[int, ...]]] = []

    def normal(self, *shape: int) -> torch.Tensor:
        self.drawn.append(("normal", shape))
        return super().normal(*shape)

    def uniform(self, *shape: int) -> torch.Tensor:
        self.drawn.append(("uniform", shape))
        return super().uniform(*shape)


class Tape(BlockRng):
    """Gives what `refill` drew, in the order in which `consumer` draws.

    `consumer` is called once with a BlockRng and must always draw alike.
    """

    def __init__(self, consumer: Callable[[BlockRng], object], rng: BlockRng) -> None:
        super().__init__(rng.generators)
        recorder = Recorder(rng.generators)
        consumer(recorder)
        self.buffers = [
            (kind, torch.empty(shape, device=rng.device)) for kind, shape in recorder.drawn
        ]
        self.position = 0

    def refill(self, rng: BlockRng) -> None:
        """The numbers that `rng` would have given."""
        for kind, buffer in self.buffers:
            buffer.copy_(getattr(rng, kind)(*buffer.shape))

    def rewind(self) -> None:
        """Start again at the first number."""
        self.position = 0

    def normal(self, *shape: int) -> torch.Tensor:
        return self._take("normal", shape)

    def uniform(self, *shape: int) -> torch.Tensor:
        return self._take("uniform", shape)

    def _take(self, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        recorded, buffer = self.buffers[self.position]
        if recorded != kind or buffer.shape != shape:
            raise RuntimeError(
                f"draw {self.position} of this step is {kind} {shape}, and was recorded as "
                f"{recorded} {tuple(buffer.shape)}; the step must draw alike each time"
            )
        self.position += 1
        return buffer
