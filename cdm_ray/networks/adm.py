"""ADM (Dhariwal & Nichol 2021), with the augmentation labels of EDM (Karras et al. 2022)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cdm_ray.networks.block import ADM_STYLE
from cdm_ray.networks.embedding import PositionalEmbedding
from cdm_ray.networks.layers import Conv, fan_in_uniform_, group_norm
from cdm_ray.networks.unet import UNet, UNetSize


class ADM(UNet):
    """Residual blocks whose norms the embedding scales and shifts, attention in heads of 64
    channels, labels added to the mapped noise embedding."""

    def __init__(self, size: UNetSize) -> None:
        super().__init__(size, ADM_STYLE, 4 * size.model_channels)
        width = self.embedding_channels
        # Linear layers start as PyTorch makes them, which is fan_in_uniform_.
        self.map_noise = PositionalEmbedding(size.model_channels, sines_first=False)
        self.map_augment: torch.nn.Linear | None = None
        if size.augment_dim:
            self.map_augment = torch.nn.Linear(size.augment_dim, size.model_channels, bias=False)
            torch.nn.init.zeros_(self.map_augment.weight)
        self.map_layer0 = torch.nn.Linear(size.model_channels, width)
        self.map_layer1 = torch.nn.Linear(width, width)
        self.map_label: torch.nn.Linear | None = None
        if size.label_dim:
            # A table of embeddings, one column each, from N(0, 1).
            self.map_label = torch.nn.Linear(size.label_dim, width, bias=False)
            torch.nn.init.normal_(self.map_label.weight)
        skips = self._add_encoder(stem=size.levels[0][1], residual=False)
        last = self._add_decoder(skips, attend_once=False)
        self.out_norm = group_norm(last, self.style.norm_eps)
        self.out_conv = Conv(last, size.channels, 3)
        fan_in_uniform_(self.out_conv, self.style.last_gain)

    def embed(
        self,
        noise: torch.Tensor,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        embedding = self.map_noise(noise).to(dtype)
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels.to(dtype))
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None:
            assert class_labels is not None
            embedding = embedding + self.map_label(class_labels.to(dtype))
        return F.silu(embedding)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_conv(F.silu(self.out_norm(x)))
