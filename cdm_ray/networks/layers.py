"""Building blocks of the EDM networks; parameter names are those of the published weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from cdm_ray.networks.dropout import Dropout


def xavier_uniform_(layer: torch.nn.Conv2d | torch.nn.Linear, gain: float = 1.0) -> None:
    """Glorot & Bengio's initialisation times `gain`; biases 0."""
    torch.nn.init.xavier_uniform_(layer.weight, gain=gain)
    if layer.bias is not None:
        torch.nn.init.zeros_(layer.bias)


def linear(in_features: int, out_features: int, *, bias: bool = True) -> torch.nn.Linear:
    layer = torch.nn.Linear(in_features, out_features, bias=bias)
    xavier_uniform_(layer)
    return layer


def group_norm(channels: int) -> torch.nn.GroupNorm:
    """As many groups as divide `channels`, at most 32, of at least 4 channels each."""
    groups = max(g for g in range(1, min(32, channels // 4) + 1) if channels % g == 0)
    return torch.nn.GroupNorm(groups, channels, eps=1e-6)


class Conv(torch.nn.Conv2d):
    """Convolution of odd kernel size that keeps the resolution, after an optional 2x resampling
    with the separable filter that the buffer `resample_filter` holds."""

    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        gain: float = 1.0,
        resample: str | None = None,
        resample_filter: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        xavier_uniform_(self, gain)
        self.resample = resample
        self.box = tuple(resample_filter) == (1, 1)
        if resample is not None:
            taps = torch.tensor(resample_filter, dtype=torch.float32)
            taps = taps.outer(taps) / taps.sum() ** 2
            self.register_buffer("resample_filter", taps[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.resample is None:
            return super().forward(x)
        if self.box:  # the same as below, and faster
            down = self.resample == "down"
            x = F.avg_pool2d(x, 2) if down else F.interpolate(x, scale_factor=2)
        else:
            taps = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
            padding = (taps.shape[-1] - 1) // 2
            if self.resample == "down":
                x = F.conv2d(x, taps, stride=2, padding=padding, groups=x.shape[1])
            else:
                x = F.conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=x.shape[1])
        return super().forward(x)


class UNetBlock(torch.nn.Module):
    """Residual block with noise embedding and optional self-attention (Song et al. 2021)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        dropout: float,
        attention: bool = False,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm0 = group_norm(in_channels)
        self.conv0 = Conv(in_channels, out_channels, 3, resample=resample)
        self.affine = linear(embedding_channels, out_channels)
        self.norm1 = group_norm(out_channels)
        # Nearly zero: every block starts as the identity.
        self.conv1 = Conv(out_channels, out_channels, 3, gain=1e-5)
        self.skip = None
        if in_channels != out_channels or resample is not None:
            self.skip = Conv(in_channels, out_channels, 1, resample=resample)
        self.norm2 = group_norm(out_channels) if attention else None
        if attention:
            self.qkv = Conv(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = Conv(out_channels, out_channels, 1, gain=1e-5)

    def forward(
        self, x: torch.Tensor, embedding: torch.Tensor, dropout: Dropout | None
    ) -> torch.Tensor:
        """x [N, in, H, W], embedding [N, embedding_channels] -> [N, out, H', W']."""
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(embedding)[:, :, None, None]))
        if dropout is not None:
            h = dropout(h, self.dropout)
        h = self.conv1(h)
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.norm2 is not None:
            # x first: the sum takes the memory format of its first term.
            x = (x + self.proj(self._attend(self.qkv(self.norm2(x))))) * math.sqrt(0.5)
        return x

    @staticmethod
    def _attend(qkv: torch.Tensor) -> torch.Tensor:
        """Single-head attention over positions; the published weights interleave q, k and v by
        channel."""
        n, c, h, w = qkv.shape
        parts = qkv.permute(0, 2, 3, 1).reshape(n, 1, h * w, c // 3, 3).permute(4, 0, 1, 2, 3)
        # The fused kernels want each position's channels side by side.
        q, k, v = parts.contiguous().unbind(0)
        a = F.scaled_dot_product_attention(q, k, v)
        return a.reshape(n, h, w, c // 3).permute(0, 3, 1, 2)


class PositionalEmbedding(torch.nn.Module):
    """Sinusoidal embedding of the noise level, frequencies from 1 down to 1/10000."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """noise [N] -> [N, channels]: sines, then cosines."""
        half = self.channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=noise.device) / (half - 1)
        phase = noise.float()[:, None] * (1e-4**exponent)
        return torch.cat([phase.sin(), phase.cos()], dim=1)
