"""DDPM++ (Song et al. 2021) in the configuration of EDM (Karras et al. 2022, table 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from cdm_ray.networks.dropout import Dropout
from cdm_ray.networks.layers import Conv, PositionalEmbedding, UNetBlock, group_norm, linear


class DDPMpp(torch.nn.Module):
    """U-Net F(x, c_noise) with residual blocks, embedded noise level, labels and augmentations."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        label_dim: int,
        augment_dim: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        embedding = 4 * model_channels
        self.label_dim = label_dim
        self.augment_dim = augment_dim
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_label = linear(label_dim, model_channels) if label_dim else None
        self.map_augment = linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = linear(model_channels, embedding)
        self.map_layer1 = linear(embedding, embedding)

        def block(
            cin: int, cout: int, *, attention: bool = False, resample: str | None = None
        ) -> UNetBlock:
            return UNetBlock(
                cin, cout, embedding, dropout=dropout, attention=attention, resample=resample
            )

        widths = [model_channels * mult for mult in channel_mult]
        self.enc = torch.nn.ModuleDict()
        skips: list[int] = []
        cin = channels
        for level, width in enumerate(widths):
            res = resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv(cin, model_channels, 3)
                cin = model_channels
            else:
                self.enc[f"{res}x{res}_down"] = block(cin, cin, resample="down")
            skips.append(cin)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = block(
                    cin, width, attention=res in attn_resolutions
                )
                cin = width
                skips.append(cin)

        self.dec = torch.nn.ModuleDict()
        for level, width in reversed(list(enumerate(widths))):
            res = resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(cin, cin, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cin, cin)
            else:
                self.dec[f"{res}x{res}_up"] = block(cin, cin, resample="up")
            for index in range(num_blocks + 1):
                last = index == num_blocks
                self.dec[f"{res}x{res}_block{index}"] = block(
                    cin + skips.pop(), width, attention=last and res in attn_resolutions
                )
                cin = width
        self.dec[f"{resolution}x{resolution}_aux_norm"] = group_norm(cin)
        self.dec[f"{resolution}x{resolution}_aux_conv"] = Conv(cin, channels, 3, gain=1e-5)

    def forward(
        self,
        x: torch.Tensor,
        noise: torch.Tensor,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None,
        dropout: Dropout | None,
    ) -> torch.Tensor:
        """x [N, C, H, W], noise [N] (c_noise), one-hot class_labels [N, K], augment_labels
        [N, A] or None (not augmented) -> F [N, C, H, W].

        Raises ValueError for labels that the network needs and lacks, or has no use for.
        """
        if (class_labels is None) != (self.label_dim == 0):
            given = "none" if class_labels is None else "some"
            raise ValueError(f"the network takes {self.label_dim} classes; class_labels: {given}")
        if augment_labels is not None and self.augment_dim == 0:
            raise ValueError("the network takes no augment_labels")
        embedding = self.map_noise(noise).to(x.dtype)
        if self.map_label is not None:
            assert class_labels is not None
            # one-hot vectors of unit variance
            scaled = class_labels.to(x.dtype) * math.sqrt(self.label_dim)
            embedding = embedding + self.map_label(scaled)
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels.to(x.dtype))
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))

        skips: list[torch.Tensor] = []
        for layer in self.enc.values():
            x = layer(x, embedding, dropout) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if isinstance(layer, UNetBlock):
                if "_block" in name:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, embedding, dropout)
            elif name.endswith("_aux_norm"):
                x = F.silu(layer(x))
            else:
                x = layer(x)
        return x
