"""Feature networks behind the Fréchet distance.

Two are known: `digits`, a small classifier of 8x8 handwritten digits that ships with the package
(trained by `train_digits_features.py`), and `inception`, the TorchScript Inception file that the
field computes its FID with, named by the user.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cdm_ray.config import EvalConfig
from cdm_ray.errors import ConfigError

DIGITS_FILE = Path(__file__).parent / "assets" / "digits_features.safetensors"
DIGITS_DIM = 64
INCEPTION_DIM = 2048
FEATURE_DIMS = {"digits": DIGITS_DIM, "inception": INCEPTION_DIM}
"""Of each `eval.extractor`."""
_INCEPTION_HINT = "name the TorchScript Inception file (inception-2015-12-05.pt)"


@dataclass(frozen=True)
class FeatureExtractor:
    """Images to feature vectors, on one device.

    `fingerprint` identifies the weights (hexadecimal SHA-256); two extractors with the same one
    give comparable numbers.
    """

    name: str
    dim: int
    fingerprint: str
    device: torch.device
    network: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Images uint8 [N, C, H, W] to features float32 [N, dim]; both keep their own device."""
        with torch.no_grad():
            return self.network(images.to(self.device)).float().to(images.device)


def load_extractor(config: EvalConfig, device: torch.device | str) -> FeatureExtractor:
    """The extractor of `eval.extractor`, loaded once per process, device and file version.

    Raises ConfigError when the Inception file is missing or is not what its name promises.
    """
    if config.extractor == "digits":
        return _load_digits(torch.device(device))
    path = Path(config.extractor_file or "").expanduser()
    if not path.is_file():
        raise ConfigError(
            f"eval.extractor_file={config.extractor_file}: no such file; {_INCEPTION_HINT}"
        )
    status = path.stat()
    return _load_inception(path, (status.st_mtime_ns, status.st_size), torch.device(device))


class DigitsNetwork(nn.Module):
    """Classifier of 8x8 greyscale digits whose penultimate layer serves as features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.hidden = nn.Linear(32 * 4 * 4, DIGITS_DIM)
        self.classifier = nn.Linear(DIGITS_DIM, 10)

    def features(self, images: Tensor) -> Tensor:
        """Images uint8 [N, 1, 8, 8] to float32 [N, 64]."""
        h = images.float() / 127.5 - 1
        h = F.gelu(self.conv0(h))
        h = F.gelu(self.conv1(h))
        h = F.gelu(self.conv2(h))
        return F.gelu(self.hidden(h.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 [N, 1, 8, 8] to logits [N, 10]."""
        return self.classifier(self.features(images))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _load_digits(device: torch.device) -> FeatureExtractor:
    tensors = load_file(DIGITS_FILE)
    network = DigitsNetwork()
    network.load_state_dict(tensors)
    network.to(device).requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 8, 8):
            raise ConfigError(
                f"eval.extractor=digits is for 8x8 greyscale images, not {list(images.shape[1:])}; "
                "use eval.extractor=inception"
            )
        return network.features(images)

    return FeatureExtractor("digits", DIGITS_DIM, tensors_digest(tensors), device, features)


@lru_cache(maxsize=2)
def _load_inception(
    path: Path, _version: tuple[int, int], device: torch.device
) -> FeatureExtractor:
    """`_version` is part of the cache key only: a file that was replaced is read again."""
    try:
        with warnings.catch_warnings():
            # The field distributes Inception as TorchScript and as nothing else.
            warnings.filterwarnings(
                "ignore", message=".*torch.jit.load.*", category=DeprecationWarning
            )
            module = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise ConfigError(
            f"eval.extractor_file={path}: not a TorchScript file ({_first_line(error)}); "
            f"{_INCEPTION_HINT}"
        ) from None

    def features(images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return module(images.float(), return_features=True)

    _check_inception(path, features, device)
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return FeatureExtractor("inception", INCEPTION_DIM, fingerprint, device, features)


def _check_inception(
    path: Path, features: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    """Run two black images through the file: the interface and the width must be Inception's."""
    try:
        with torch.no_grad():
            out = features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device))
    except RuntimeError as error:
        raise ConfigError(
            f"eval.extractor_file={path}: cannot be called as module(images, return_features=True) "
            f"({_first_line(error)}); {_INCEPTION_HINT}"
        ) from None
    if out.shape != (2, INCEPTION_DIM):
        raise ConfigError(
            f"eval.extractor_file={path}: gives {list(out.shape[1:])} features per image, "
            f"Inception gives [{INCEPTION_DIM}]; {_INCEPTION_HINT}"
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
