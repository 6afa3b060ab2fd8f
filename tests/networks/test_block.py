import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cdm_ray.networks.block import ADM_STYLE, UNetBlock, song_style
from cdm_ray.networks.dropout import Dropout
from cdm_ray.randomness import BlockRng
from tests.networks.architectures import loud, noise

STYLES = {"song": song_style((1, 1)), "adm": ADM_STYLE}


@pytest.mark.parametrize("style", STYLES)
def test_dropout_is_the_input_of_the_second_convolution(style):
    block = loud(UNetBlock(8, 8, 4, STYLES[style], dropout=0.3))
    x = noise(2, 8, 4, 4)
    dropped = block(x, noise(2, 4), torch.zeros_like)
    expected = x + block.conv1.bias[:, None, None]
    torch.testing.assert_close(dropped, expected * (math.sqrt(0.5) if style == "song" else 1.0))


@pytest.mark.parametrize(
    ("style", "modulated"),
    [
        ("song", lambda norm, h, m: norm(h + m[:, :, None, None])),
        (
            "adm",
            lambda norm, h, m: norm(h) * (1 + m[:, :8, None, None]) + m[:, 8:, None, None],
        ),
    ],
)
def test_embedding_is_added_or_scales_and_shifts(style, modulated):
    block = loud(UNetBlock(8, 8, 4, STYLES[style], dropout=0.0))
    x, embedding, met = noise(2, 8, 4, 4), noise(2, 4), []
    block(x, embedding, lambda h: met.append(h) or h)
    h = block.conv0(F.silu(block.norm0(x)))
    expected = F.silu(modulated(block.norm1, h, block.affine(embedding)))
    torch.testing.assert_close(met[0], expected)


@pytest.mark.parametrize(("style", "heads"), [("song", 1), ("adm", 2)])
def test_attention_is_softmax_attention_in_each_head(style, heads):
    """Channels are head by head; q, k and v of a channel lie side by side."""
    channels = 128
    block = loud(UNetBlock(channels, channels, 4, STYLES[style], dropout=0.0, attention=True))
    qkv = noise(2, 3 * channels, 4, 4)
    expected = torch.empty(2, channels, 16)
    width = channels // heads
    for head in range(heads):
        part = qkv.flatten(2)[:, 3 * width * head : 3 * width * (head + 1)]
        q, k, v = (part[:, kind::3] for kind in range(3))
        weights = (q.transpose(1, 2) @ k / math.sqrt(width)).softmax(dim=2)
        expected[:, width * head : width * (head + 1)] = v @ weights.transpose(1, 2)
    torch.testing.assert_close(block._attend(qkv), expected.view(2, channels, 4, 4))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_keeps_the_layout_and_may_use_the_fused_kernel(layout, style):
    block = UNetBlock(64, 64, 4, STYLES[style], dropout=0.1, attention=True)
    block.to(memory_format=layout)
    x = noise(2, 64, 4, 4).contiguous(memory_format=layout)
    mask = Dropout(BlockRng.for_lanes(0, 0, [0], "cpu")).draw(x.shape, 0.1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # alone: anything else is an error
        out = block(x, noise(2, 4), mask)
    assert out.is_contiguous(memory_format=layout)
