"""A source image is cropped, resized and encoded as EDM's tool does, or refused with the reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cdm_ray.data.images import UnusableImage, encode_png, load_image


def file_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("width", "height"), [(17, 11), (10, 31), (12, 12), (4, 4), (9, 8)])
def test_the_largest_centred_square_is_resized_with_lanczos(width, height):
    pixels = noise(width, height)
    side = min(width, height)
    rows = slice((height - side) // 2, (height + side) // 2)
    columns = slice((width - side) // 2, (width + side) // 2)
    square = Image.fromarray(np.ascontiguousarray(pixels[rows, columns]))
    expected = square.resize((8, 8), Image.Resampling.LANCZOS)
    image = load_image(file_bytes(Image.fromarray(pixels)), resolution=8, channels=3)
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_an_image_of_the_right_size_keeps_its_pixels():
    pixels = noise(8, 8)
    image = load_image(file_bytes(Image.fromarray(pixels)), resolution=8, channels=3)
    assert np.array_equal(np.asarray(image), pixels)
    decoded = Image.open(io.BytesIO(encode_png(image)))
    assert np.array_equal(np.asarray(decoded), pixels)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA"])
@pytest.mark.parametrize(("channels", "expected"), [(1, "L"), (3, "RGB")])
def test_colour_spaces_are_converted(mode, channels, expected):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    raw = file_bytes(Image.new("RGB", (6, 6), (204, 204, 204)).convert(mode), kind)
    image = load_image(raw, resolution=4, channels=channels)
    assert (image.mode, image.size) == (expected, (4, 4))
    if mode != "1":  # black and white is dithered
        assert np.abs(np.asarray(image).astype(int) - 204).max() <= 1


def huge_png() -> bytes:
    """A PNG of 70 bytes whose header claims 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def slightly_huge() -> bytes:
    """90 million pixels: Pillow alone would only warn."""
    return file_bytes(Image.new("1", (10_000, 9_000)))


CUT = file_bytes(Image.fromarray(noise(40, 40)))[:-400]
DEEP = file_bytes(Image.fromarray(np.full((4, 4), 40_000, np.uint16)))
GLASS = file_bytes(Image.new("RGBA", (4, 4), (1, 2, 3, 100)))
GIF_TRANSPARENCY = file_bytes(Image.new("P", (4, 4), 0), transparency=0)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "no image"),
        (b"%PDF-1.4 and so on", "no image"),
        (CUT, "truncated"),
        (huge_png(), "exceeds limit"),
        (slightly_huge(), "exceeds limit"),
        (DEEP, "more than 8 bits"),
        (GLASS, "transparent"),
        (GIF_TRANSPARENCY, "transparent"),
    ],
    ids=["empty", "pdf", "cut", "bomb", "small-bomb", "16-bit", "alpha", "palette-alpha"],
)
def test_an_image_that_cannot_be_packed_is_refused_with_the_reason(raw, reason):
    with pytest.raises(UnusableImage, match=reason):
        load_image(raw, resolution=4, channels=3)
