"""Embeddings of the noise level c_noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch


class PositionalEmbedding(torch.nn.Module):
    """Sinusoids of `channels` / 2 frequencies in geometric progression from 1 towards 1/10000.

    Song et al. (2021) include 1/10000 and put the sines first; Dhariwal & Nichol (2021) stop one
    step short of it and put the cosines first (`sines_first=False`).
    """

    def __init__(self, channels: int, *, sines_first: bool) -> None:
        super().__init__()
        self.channels = channels
        self.sines_first = sines_first

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """noise [N] -> [N, channels] float32."""
        half = self.channels // 2
        steps = half - 1 if self.sines_first else half
        exponent = torch.arange(half, dtype=torch.float32, device=noise.device) / steps
        phase = noise.float()[:, None] * (1e-4**exponent)
        waves = (phase.sin(), phase.cos()) if self.sines_first else (phase.cos(), phase.sin())
        return torch.cat(waves, dim=1)


class FourierEmbedding(torch.nn.Module):
    """Sinusoids of random frequencies from N(0, `scale`^2), which are not trained (Song et al.
    2021)."""

    freqs: torch.Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """noise [N] -> [N, channels] float32: sines, then cosines."""
        phase = 2 * math.pi * noise.float()[:, None] * self.freqs
        return torch.cat([phase.sin(), phase.cos()], dim=1)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        exact = self.freqs
        super()._apply(fn, recurse)
        if self.freqs.dtype != exact.dtype:
            # Rounded to bf16 they would be other frequencies: phases off by tenths of a radian.
            self.freqs = exact.to(self.freqs.device)
        return self
