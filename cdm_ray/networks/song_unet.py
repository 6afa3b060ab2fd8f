"""DDPM++ and NCSN++ (Song et al. 2021) as configured by EDM (Karras et al. 2022, table 7)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from cdm_ray.networks.block import song_style
from cdm_ray.networks.embedding import FourierEmbedding, PositionalEmbedding
from cdm_ray.networks.layers import Conv, group_norm, xavier_uniform_
from cdm_ray.networks.unet import UNet, UNetSize


@dataclass(frozen=True)
class SongVariant:
    """What DDPM++ and NCSN++ differ in."""

    fourier: bool
    """Noise level as random Fourier features; else positional."""
    noise_mult: int
    """Width of the noise embedding in `model_channels`."""
    residual_encoder: bool
    resample_filter: tuple[int, ...]


DDPMPP = SongVariant(fourier=False, noise_mult=1, residual_encoder=False, resample_filter=(1, 1))
NCSNPP = SongVariant(
    fourier=True, noise_mult=2, residual_encoder=True, resample_filter=(1, 3, 3, 1)
)


class SongUNet(UNet):
    """Residual blocks scaled to unit variance, single-head attention, labels added to the noise
    embedding."""

    def __init__(self, size: UNetSize, variant: SongVariant) -> None:
        noise_channels = size.model_channels * variant.noise_mult
        super().__init__(size, song_style(variant.resample_filter), 4 * size.model_channels)

        def linear(cin: int, cout: int, *, bias: bool = True) -> torch.nn.Linear:
            layer = torch.nn.Linear(cin, cout, bias=bias)
            xavier_uniform_(layer)
            return layer

        self.map_noise: torch.nn.Module
        if variant.fourier:
            self.map_noise = FourierEmbedding(noise_channels)
        else:
            self.map_noise = PositionalEmbedding(noise_channels, sines_first=True)
        self.map_label = linear(size.label_dim, noise_channels) if size.label_dim else None
        self.map_augment = (
            linear(size.augment_dim, noise_channels, bias=False) if size.augment_dim else None
        )
        self.map_layer0 = linear(noise_channels, self.embedding_channels)
        self.map_layer1 = linear(self.embedding_channels, self.embedding_channels)
        skips = self._add_encoder(stem=size.model_channels, residual=variant.residual_encoder)
        width = self._add_decoder(skips, attend_once=True)
        self.last = f"{size.resolution}x{size.resolution}_aux"
        self.dec[f"{self.last}_norm"] = group_norm(width, self.style.norm_eps)
        conv = Conv(width, size.channels, 3)
        xavier_uniform_(conv, self.style.last_gain)
        self.dec[f"{self.last}_conv"] = conv

    def embed(
        self,
        noise: torch.Tensor,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        embedding = self.map_noise(noise).to(dtype)
        if self.map_label is not None:
            assert class_labels is not None
            # one-hot vectors of unit variance
            scaled = class_labels.to(dtype) * math.sqrt(self.size.label_dim)
            embedding = embedding + self.map_label(scaled)
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels.to(dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return self.dec[f"{self.last}_conv"](F.silu(self.dec[f"{self.last}_norm"](x)))
