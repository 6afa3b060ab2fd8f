"""One source image: decoded, cropped, resized and encoded for a shard."""

from __future__ import annotations

import io
import warnings

from PIL import Image, UnidentifiedImageError

from cdm_ray.errors import one_line

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File names that are taken for images."""

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels."""

_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class UnusableImage(ValueError):
    """A source image that cannot be packed, and why."""


def load_image(raw: bytes, *, resolution: int, channels: int) -> Image.Image:
    """Bytes of an image file -> resolution x resolution image of 1 (L) or 3 (RGB) channels.

    As EDM's dataset tool does with its center-crop transform: the largest centred square, resized
    with a Lanczos filter, EXIF orientation ignored. Raises UnusableImage for what is no image, has
    more pixels than Pillow takes for sane (89 million), has more than 8 bits per channel, or has
    transparent pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(raw), formats=_FORMATS) as image:
                converted = _convert(image, MODES[channels])
    except UnusableImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever the bytes lead them to
        raise UnusableImage(why_undecodable(error)) from None
    return _fit(converted, resolution)


def why_undecodable(error: Exception) -> str:
    """What Pillow found, in words."""
    if isinstance(error, UnidentifiedImageError):  # its message is the address of a buffer
        return "the content is no image"
    return one_line(error)


def encode_png(image: Image.Image) -> bytes:
    """PNG without compression, as EDM's tool writes: 1.4 times the size, half the decoding time."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0, optimize=False)
    return buffer.getvalue()


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode not in _CONVERTIBLE:
        raise UnusableImage(f"has more than 8 bits per channel (mode {image.mode}); convert it")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise UnusableImage("has transparent pixels; flatten it onto a background")
    return image.convert(mode)


def _fit(image: Image.Image, resolution: int) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((resolution, resolution), Image.Resampling.LANCZOS)
