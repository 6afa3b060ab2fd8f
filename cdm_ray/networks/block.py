"""The residual block of all networks, and the two styles it comes in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from cdm_ray.networks.dropout import Mask
from cdm_ray.networks.layers import (
    Conv,
    Direction,
    Resample,
    fan_in_uniform_,
    group_norm,
    xavier_uniform_,
)


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks of one network have in common."""

    init: Callable[[torch.nn.Conv2d | torch.nn.Linear, float], None]
    """Initialises a layer at a gain."""
    last_gain: float
    """Gain of the layer that ends a branch: (nearly) 0, so that a block starts as the identity."""
    qkv_gain: float
    norm_eps: float
    unit_variance: bool
    """The sum of a branch and what it bypasses is divided by sqrt(2)."""
    adaptive_scale: bool
    """The embedding scales and shifts the second norm's result; else it is added before the
    norm."""
    learned_resampled_skip: bool
    """The bypass of a resampling block has a 1x1 convolution."""
    head_channels: int | None
    """Channels per attention head; None: a single head."""
    resample_filter: tuple[int, ...] = (1, 1)


def song_style(resample_filter: tuple[int, ...]) -> BlockStyle:
    """Song et al. 2021, as configured by EDM (Karras et al. 2022, table 7)."""
    return BlockStyle(
        init=xavier_uniform_,
        last_gain=1e-5,
        qkv_gain=math.sqrt(0.2),
        norm_eps=1e-6,
        unit_variance=True,
        adaptive_scale=False,
        learned_resampled_skip=True,
        head_channels=None,
        resample_filter=resample_filter,
    )


ADM_STYLE = BlockStyle(
    init=fan_in_uniform_,
    last_gain=0.0,
    qkv_gain=1.0,
    norm_eps=1e-5,
    unit_variance=False,
    adaptive_scale=True,
    learned_resampled_skip=False,
    head_channels=64,
)
"""Dhariwal & Nichol 2021."""


class UNetBlock(torch.nn.Module):
    """Residual block with noise embedding, optional resampling and optional self-attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        style: BlockStyle,
        *,
        dropout: float,
        attention: bool = False,
        direction: Direction | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.style = style
        self.dropout = dropout
        self.direction = direction
        taps = style.resample_filter

        def conv(cin: int, cout: int, kernel: int, gain: float, resampled: bool = False) -> Conv:
            layer = Conv(cin, cout, kernel, direction=direction if resampled else None, taps=taps)
            style.init(layer, gain)
            return layer

        self.norm0 = group_norm(in_channels, style.norm_eps)
        self.conv0 = conv(in_channels, out_channels, 3, 1.0, resampled=True)
        self.affine = torch.nn.Linear(
            embedding_channels, out_channels * (2 if style.adaptive_scale else 1)
        )
        style.init(self.affine, 1.0)
        self.norm1 = group_norm(out_channels, style.norm_eps)
        self.conv1 = conv(out_channels, out_channels, 3, style.last_gain)
        self.skip: Conv | Resample | None = None
        if in_channels != out_channels or (direction and style.learned_resampled_skip):
            self.skip = conv(in_channels, out_channels, 1, 1.0, resampled=True)
        elif direction is not None:
            self.skip = Resample(direction, taps)
        self.norm2 = group_norm(out_channels, style.norm_eps) if attention else None
        if attention:
            self.heads = out_channels // (style.head_channels or out_channels)
            self.qkv = conv(out_channels, 3 * out_channels, 1, style.qkv_gain)
            self.proj = conv(out_channels, out_channels, 1, style.last_gain)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, mask: Mask | None) -> torch.Tensor:
        """x [N, in, H, W], embedding [N, embedding_channels], mask [N, out, H', W'] of the hidden
        layer or None (no dropout) -> [N, out, H', W']."""
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(embedding)[:, :, None, None]
        if self.style.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + modulation)
        h = F.silu(h)
        if mask is not None:
            h = mask(h)
        h = self.conv1(h)
        x = self._sum(h, x if self.skip is None else self.skip(x))
        if self.norm2 is not None:
            # x first: the sum takes the memory format of its first term.
            x = self._sum(x, self.proj(self._attend(self.qkv(self.norm2(x)))))
        return x

    def _sum(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a + b) * math.sqrt(0.5) if self.style.unit_variance else a + b

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Attention over positions [N, 3C, H, W] -> [N, C, H, W]; in the published weights the
        channels are head by head, and q, k and v of a channel lie side by side."""
        n, c, h, w = qkv.shape
        parts = qkv.permute(0, 2, 3, 1).reshape(n, h * w, self.heads, -1, 3)
        # The fused kernels want each position's channels side by side.
        q, k, v = parts.permute(4, 0, 2, 1, 3).contiguous().unbind(0)
        a = F.scaled_dot_product_attention(q, k, v)
        return a.transpose(1, 2).reshape(n, h, w, c // 3).permute(0, 3, 1, 2)
