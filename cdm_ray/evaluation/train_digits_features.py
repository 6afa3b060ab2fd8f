"""Train the `digits` feature network and write its weights into the package.

    python -m cdm_ray.evaluation.train_digits_features [OUTPUT.safetensors]

Runs in under a minute on one core and gives the same bytes whenever it is repeated on one machine
with one version of PyTorch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from cdm_ray.evaluation.features import DIGITS_FILE, DigitsNetwork, tensors_digest
from cdm_ray.randomness import generator

SEED = 0
EPOCHS = 60
BATCH = 64
LR = 3e-3
WEIGHT_DECAY = 0.05
TEST_FRACTION = 0.2
PROVENANCE_KEY = "provenance"


class Split(NamedTuple):
    """Images uint8 [N, 1, 8, 8] and labels int64 [N]."""

    images: Tensor
    labels: Tensor


def digits_split() -> tuple[Split, Split]:
    """The training and the held-out digits, split by class with a fixed seed."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    parts = train_test_split(
        pixels, digits.target, test_size=TEST_FRACTION, random_state=SEED, stratify=digits.target
    )
    train_x, test_x, train_y, test_y = (torch.from_numpy(np.ascontiguousarray(p)) for p in parts)
    return Split(train_x, train_y.long()), Split(test_x, test_y.long())


def train(split: Split, epochs: int = EPOCHS) -> DigitsNetwork:
    """Classifier trained with AdamW, a cosine learning rate and shifts by up to one pixel."""
    with _deterministic():
        network = DigitsNetwork()
        optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        steps = epochs * (len(split.labels) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(epochs):
            rng = generator(SEED, epoch)
            order = torch.randperm(len(split.labels), generator=rng)
            for start in range(0, len(order) - BATCH + 1, BATCH):
                chosen = order[start : start + BATCH]
                logits = network(_shift(split.images[chosen], rng))
                loss = F.cross_entropy(logits, split.labels[chosen], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network


def accuracy(network: DigitsNetwork, split: Split) -> float:
    """Share of the images that are classified correctly."""
    with torch.no_grad():
        return (network(split.images).argmax(1) == split.labels).double().mean().item()


def write(network: DigitsNetwork, train_split: Split, test_split: Split, path: Path) -> None:
    """Weights as safetensors, with what they were trained on and reached as metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    provenance = {
        "description": "classifier of scikit-learn's 8x8 digits; features = GELU of `hidden`",
        "held_out_accuracy": round(accuracy(network, test_split), 6),
        "held_out_images": len(test_split.labels),
        "train_images": len(train_split.labels),
        "epochs": EPOCHS,
        "seed": SEED,
        "torch": torch.__version__,
        "digest": tensors_digest(tensors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # One key: safetensors writes several in an order that changes from run to run.
    save_file(tensors, path, metadata={PROVENANCE_KEY: json.dumps(provenance)})


def _shift(images: Tensor, rng: torch.Generator) -> Tensor:
    """Move each image by -1, 0 or 1 pixels in x and in y; what enters is background."""
    n, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1))
    top, left = torch.randint(0, 3, (2, n, 1, 1), generator=rng)
    rows = top + torch.arange(height)[None, :, None]
    columns = left + torch.arange(width)[None, None, :]
    return padded[torch.arange(n)[:, None, None], 0, rows, columns][:, None]


@contextmanager
def _deterministic() -> Iterator[None]:
    """One thread, fixed seed, deterministic kernels; the caller's settings come back after."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            yield
    finally:
        torch.use_deterministic_algorithms(strict)
        torch.set_num_threads(threads)


def main() -> None:
    """Train, write and report."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DIGITS_FILE
    train_split, test_split = digits_split()
    network = train(train_split)
    write(network, train_split, test_split, path)
    print(
        f"{path}: {path.stat().st_size:,} bytes, held-out accuracy "
        f"{accuracy(network, test_split):.4f} on {len(test_split.labels)} images"
    )


if __name__ == "__main__":
    main()
