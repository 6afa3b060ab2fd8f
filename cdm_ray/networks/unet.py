"""The U-Net that all networks are: levels of residual blocks with skip connections."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch.utils.checkpoint import checkpoint

from cdm_ray.networks.block import BlockStyle, UNetBlock
from cdm_ray.networks.dropout import Dropout, Mask
from cdm_ray.networks.layers import Conv, ConvThenDown, Direction


@dataclass(frozen=True)
class UNetSize:
    """What a user chooses about any of the networks."""

    resolution: int
    channels: int
    """Of the images."""
    label_dim: int
    """Classes; 0: unconditional."""
    augment_dim: int
    """Width of the augmentation labels; 0: the network takes none."""
    model_channels: int
    channel_mult: Sequence[int]
    """Channels of each level in `model_channels`; each further level halves the resolution."""
    num_blocks: int
    """Residual blocks per level of the encoder; the decoder has one more."""
    attn_resolutions: Sequence[int]
    dropout: float
    activation_checkpointing: bool

    @property
    def levels(self) -> list[tuple[int, int]]:
        """Resolution and channels of each level."""
        return [
            (self.resolution >> level, self.model_channels * mult)
            for level, mult in enumerate(self.channel_mult)
        ]


class UNet(torch.nn.Module, ABC):
    """F(x, c_noise). A subclass makes the embedding and the last layers, and calls `_add_encoder`
    and `_add_decoder`, which name the layers as the published weights do."""

    def __init__(self, size: UNetSize, style: BlockStyle, embedding_channels: int) -> None:
        super().__init__()
        self.size, self.style, self.embedding_channels = size, style, embedding_channels

    @abstractmethod
    def embed(
        self,
        noise: torch.Tensor,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """What every block is told, [N, embedding_channels]."""

    @abstractmethod
    def project(self, x: torch.Tensor) -> torch.Tensor:
        """The last block's result as F."""

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
        if (class_labels is None) != (self.size.label_dim == 0):
            given = "none" if class_labels is None else "some"
            raise ValueError(
                f"the network takes {self.size.label_dim} classes; class_labels: {given}"
            )
        if augment_labels is not None and self.size.augment_dim == 0:
            raise ValueError("the network takes no augment_labels")
        masks = iter(repeat(None) if dropout is None else self._draw_masks(x, dropout))
        embedding = self.embed(noise, class_labels, augment_labels, x.dtype)
        image = x
        skips: list[torch.Tensor] = []
        for layer in self.enc.values():
            if isinstance(layer, ConvThenDown):
                x = image = skips[-1] = (x + layer(image)) * math.sqrt(0.5)
            elif isinstance(layer, UNetBlock):
                x = self._run(layer, x, None, embedding, next(masks))
                skips.append(x)
            else:
                x = layer(x)
                skips.append(x)
        for name, layer in self.dec.items():
            if isinstance(layer, UNetBlock):
                skip = skips.pop() if "_block" in name else None
                x = self._run(layer, x, skip, embedding, next(masks))
        return self.project(x)

    def _draw_masks(self, x: torch.Tensor, dropout: Dropout) -> list[Mask | None]:
        """Masks of all blocks, in their order, for images x."""
        masks = []
        n, _, height, width = x.shape
        for block in (*self.enc.values(), *self.dec.values()):
            if not isinstance(block, UNetBlock):
                continue
            if block.direction == "down":
                height, width = height // 2, width // 2
            elif block.direction == "up":
                height, width = height * 2, width * 2
            masks.append(dropout.draw((n, block.out_channels, height, width), block.dropout))
        return masks

    def _run(
        self,
        block: UNetBlock,
        x: torch.Tensor,
        skip: torch.Tensor | None,
        embedding: torch.Tensor,
        mask: Mask | None,
    ) -> torch.Tensor:
        if not (self.size.activation_checkpointing and torch.is_grad_enabled()):
            return _joined(block, x, skip, embedding, mask)
        return checkpoint(
            _joined,
            block,
            x,
            skip,
            embedding,
            mask,
            use_reentrant=False,
            preserve_rng_state=False,  # no layer draws from the global generators
        )

    def _add_encoder(self, *, stem: int, residual: bool) -> list[int]:
        """Make `enc`; returns the channels of the skip connections, in their order.

        `stem`: channels of the first convolution. `residual`: each further level also sees the
        image, convolved and halved along with the levels.
        """
        size, style = self.size, self.style
        self.enc = torch.nn.ModuleDict()
        skips: list[int] = []
        cin, image = stem, size.channels
        for level, (res, width) in enumerate(size.levels):
            if level == 0:
                conv = Conv(size.channels, stem, 3)
                style.init(conv, 1.0)
                self.enc[f"{res}x{res}_conv"] = conv
            else:
                self.enc[f"{res}x{res}_down"] = self._block(cin, cin, direction="down")
                if residual:
                    aux = ConvThenDown(image, cin, style.resample_filter)
                    style.init(aux, 1.0)
                    self.enc[f"{res}x{res}_aux_residual"] = aux
                    image = cin
            skips.append(cin)
            for index in range(size.num_blocks):
                attention = res in size.attn_resolutions
                self.enc[f"{res}x{res}_block{index}"] = self._block(cin, width, attention=attention)
                cin = width
                skips.append(cin)
        return skips

    def _add_decoder(self, skips: list[int], *, attend_once: bool) -> int:
        """Make `dec`; returns the channels of its result.

        `attend_once`: attention in the last block of a level only, else in all of them.
        """
        size = self.size
        self.dec = torch.nn.ModuleDict()
        cin = skips[-1]
        for level, (res, width) in reversed(list(enumerate(size.levels))):
            if level == len(size.levels) - 1:
                self.dec[f"{res}x{res}_in0"] = self._block(cin, cin, attention=True)
                self.dec[f"{res}x{res}_in1"] = self._block(cin, cin)
            else:
                self.dec[f"{res}x{res}_up"] = self._block(cin, cin, direction="up")
            for index in range(size.num_blocks + 1):
                last = index == size.num_blocks
                attention = res in size.attn_resolutions and (last or not attend_once)
                self.dec[f"{res}x{res}_block{index}"] = self._block(
                    cin + skips.pop(), width, attention=attention
                )
                cin = width
        return cin

    def _block(
        self,
        in_channels: int,
        out_channels: int,
        *,
        attention: bool = False,
        direction: Direction | None = None,
    ) -> UNetBlock:
        return UNetBlock(
            in_channels,
            out_channels,
            self.embedding_channels,
            self.style,
            dropout=self.size.dropout,
            attention=attention,
            direction=direction,
        )


def _joined(
    block: UNetBlock,
    x: torch.Tensor,
    skip: torch.Tensor | None,
    embedding: torch.Tensor,
    mask: Mask | None,
) -> torch.Tensor:
    """The block of x and the skip connection; under checkpointing neither's copy is kept."""
    return block(x if skip is None else torch.cat([x, skip], dim=1), embedding, mask)
