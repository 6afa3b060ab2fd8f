"""Layers of the EDM networks; parameter names are those of the published weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional as F

Direction = Literal["down", "up"]


def xavier_uniform_(layer: torch.nn.Conv2d | torch.nn.Linear, gain: float = 1.0) -> None:
    """Glorot & Bengio's initialisation times `gain`; biases 0."""
    torch.nn.init.xavier_uniform_(layer.weight, gain=gain)
    if layer.bias is not None:
        torch.nn.init.zeros_(layer.bias)


@torch.no_grad()
def fan_in_uniform_(layer: torch.nn.Conv2d | torch.nn.Linear, gain: float = 1.0) -> None:
    """Weights and biases uniform within `gain` / sqrt(fan-in) of 0: PyTorch's own, scaled."""
    layer.reset_parameters()
    for parameter in layer.parameters():
        parameter.mul_(gain)


def group_norm(channels: int, eps: float) -> torch.nn.GroupNorm:
    """As many groups as divide `channels`, at most 32, of at least 4 channels each."""
    groups = max(g for g in range(1, min(32, channels // 4) + 1) if channels % g == 0)
    return torch.nn.GroupNorm(groups, channels, eps=eps)


def separable_filter(taps: Sequence[int]) -> torch.Tensor:
    """[1, 1, k, k], the outer product of symmetric `taps`, of unit sum."""
    row = torch.tensor(taps, dtype=torch.float32)
    return (row.outer(row) / row.sum() ** 2)[None, None]


def resample(x: torch.Tensor, direction: Direction, kernel: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] at half or twice the resolution, filtered with `kernel` [1, 1, k, k], k even,
    zero beyond the border."""
    size, channels = kernel.shape[-1], x.shape[1]
    if size == 2:  # symmetric, hence a box: the same as below, and faster
        return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2)
    kernel = kernel.to(x.dtype).expand(channels, -1, -1, -1)
    padding = (size - 1) // 2
    if direction == "down":
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)


class Resample(torch.nn.Module):
    """Half or twice the resolution, with the filter that the buffer `resample_filter` holds."""

    resample_filter: torch.Tensor

    def __init__(self, direction: Direction, taps: Sequence[int]) -> None:
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", separable_filter(taps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return resample(x, self.direction, self.resample_filter)


class Conv(torch.nn.Conv2d):
    """Convolution of odd kernel size that keeps the resolution, after an optional resampling with
    the filter that the buffer `resample_filter` holds."""

    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        direction: Direction | None = None,
        taps: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.direction: Direction | None = direction
        if direction is not None:
            self.register_buffer("resample_filter", separable_filter(taps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.direction is not None:
            x = resample(x, self.direction, self.resample_filter)
        return super().forward(x)


class ConvThenDown(torch.nn.Conv2d):
    """3x3 convolution at the resolution of the input, then halving it (Song et al. 2021, residual
    encoder).

    The convolution reaches as far beyond the border as the filter does, so that the filter meets
    zero-padded images and no padding of its own.
    """

    resample_filter: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, taps: Sequence[int]) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1 + (len(taps) - 1) // 2)
        self.register_buffer("resample_filter", separable_filter(taps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.resample_filter.to(x.dtype).expand(self.out_channels, -1, -1, -1)
        return F.conv2d(super().forward(x), kernel, stride=2, groups=self.out_channels)
