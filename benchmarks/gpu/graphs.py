"""CUDA graphs: what a call launches, recorded once and started as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Capture = Callable[[Callable[[], object]], Callable[[], object]]
"""capture(body) -> replay; the body takes and gives tensors through memory that stays in place."""
WARMUP = 3
"""Runs before a capture: they choose kernels and allocate workspaces."""


def cuda_capture(body: Callable[[], object]) -> Callable[[], object]:
    """`body` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


class GraphedDenoiser:
    """A denoiser whose calls without gradient are graphs, one for each shape; the others go to it
    as they are.

    Dropout is left out of the graphs: use it with networks that have none. A result is overwritten
    by the next call of that shape.
    """

    def __init__(self, denoiser: Callable[..., Tensor], capture: Capture) -> None:
        self.denoiser, self.capture = denoiser, capture
        self._calls: dict[Any, _GraphedCall] = {}

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout: Any = None,
    ) -> Tensor:
        if torch.is_grad_enabled():
            return self.denoiser(x, sigma, class_labels, augment_labels, dropout)
        given = (x, sigma, class_labels, augment_labels)
        key = tuple(None if t is None else (t.shape, t.dtype) for t in given)
        if key not in self._calls:
            self._calls[key] = _GraphedCall(self.denoiser, given, self.capture)
        return self._calls[key](given)


class _GraphedCall:
    def __init__(
        self, function: Callable[..., Tensor], given: tuple[Tensor | None, ...], capture: Capture
    ) -> None:
        self.inputs = tuple(None if t is None else t.clone() for t in given)

        def body() -> None:
            self.output = function(*self.inputs)

        self.replay = capture(body)

    def __call__(self, given: tuple[Tensor | None, ...]) -> Tensor:
        for mine, tensor in zip(self.inputs, given, strict=True):
            if mine is not None and tensor is not None:
                mine.copy_(tensor)
        self.replay()
        return self.output
