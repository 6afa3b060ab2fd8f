import json
import warnings

import pytest
import torch
from safetensors import safe_open

from cdm_ray.config import EvalConfig
from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.features import DIGITS_FILE, DigitsNetwork, load_extractor, tensors_digest
from cdm_ray.evaluation.train_digits_features import (
    PROVENANCE_KEY,
    accuracy,
    digits_split,
    train,
    write,
)

DIGITS = EvalConfig(extractor="digits")


class Inception(torch.nn.Module):
    """Stand-in with the interface of the field's Inception file."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.shape[1] == 3
        assert img.is_floating_point()
        means = img.mean(dim=[2, 3])
        if return_features:
            return means.repeat(1, self.width)[:, : self.width]
        return means


class NoFeatures(torch.nn.Module):
    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return img


def script(module, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


def inception(path):
    return load_extractor(EvalConfig(extractor="inception", extractor_file=str(path)), "cpu")


@pytest.fixture(scope="module")
def provenance():
    with safe_open(DIGITS_FILE, "pt") as file:
        return json.loads(file.metadata()[PROVENANCE_KEY])


def test_shipped_digits_weights_reach_the_accuracy_that_they_state(provenance):
    network = DigitsNetwork()
    with safe_open(DIGITS_FILE, "pt") as file:
        network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    _, held_out = digits_split()
    measured = accuracy(network, held_out)
    assert measured > 0.97
    assert provenance["held_out_images"] == len(held_out.labels)
    # One image of 360 may flip between processors.
    assert measured == pytest.approx(provenance["held_out_accuracy"], abs=1.5 / 360)


def test_shipped_digits_weights_are_the_ones_that_were_measured(provenance):
    extractor = load_extractor(DIGITS, "cpu")
    assert extractor.fingerprint == provenance["digest"]
    assert DIGITS_FILE.stat().st_size < 300_000


def test_digits_training_repeats_bit_for_bit_and_learns(tmp_path):
    train_split, held_out = digits_split()
    torch.manual_seed(1)
    first = train(train_split, epochs=2)
    torch.manual_seed(2)  # the caller's generator plays no part
    second = train(train_split, epochs=2)
    assert accuracy(first, held_out) > 0.8
    write(first, train_split, held_out, tmp_path / "first.safetensors")
    write(second, train_split, held_out, tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (
        tmp_path / "second.safetensors"
    ).read_bytes()


def test_digits_training_leaves_the_callers_settings():
    train_split, _ = digits_split()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(train_split, epochs=0)
    assert torch.equal(torch.rand(2), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_digits_features_are_the_penultimate_layer():
    extractor = load_extractor(DIGITS, "cpu")
    images = digits_split()[1].images[:5]
    features = extractor(images)
    assert (extractor.name, extractor.dim) == ("digits", 64)
    assert features.shape == (5, 64)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    network = DigitsNetwork()
    with safe_open(DIGITS_FILE, "pt") as file:
        network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    torch.testing.assert_close(network.classifier(features), network(images))


def test_digits_features_refuse_other_image_sizes():
    with pytest.raises(ConfigError, match=r"8x8 greyscale images, not \[3, 8, 8\]"):
        load_extractor(DIGITS, "cpu")(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_inception_gets_pixels_as_floats_up_to_255_and_returns_features(tmp_path):
    extractor = inception(script(Inception(2048), tmp_path / "inception.pt"))
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    images[:, 0], images[:, 1] = 255, 100
    features = extractor(images)
    assert (extractor.name, extractor.dim) == ("inception", 2048)
    assert features.shape == (4, 2048)
    assert features[0, :3].tolist() == [255.0, 100.0, 0.0]


def test_inception_gets_greyscale_as_three_equal_channels(tmp_path):
    extractor = inception(script(Inception(2048), tmp_path / "inception.pt"))
    features = extractor(torch.full((2, 1, 16, 16), 200, dtype=torch.uint8))
    assert features[0, :3].tolist() == [200.0, 200.0, 200.0]


def test_fingerprint_is_the_digest_of_the_file_and_follows_a_replaced_file(tmp_path):
    path = script(Inception(2048), tmp_path / "inception.pt")
    first = inception(path)
    assert len(first.fingerprint) == 64
    assert inception(path) is first

    class Other(Inception):
        pass

    script(Other(2048), path)
    assert inception(path).fingerprint != first.fingerprint


def test_missing_inception_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"extractor_file=.*absent.pt: no such file"):
        inception(tmp_path / "absent.pt")


def test_file_that_is_no_torchscript_is_refused(tmp_path):
    path = tmp_path / "inception.pt"
    path.write_bytes(b"not a zip file")
    with pytest.raises(ConfigError, match=r"inception.pt: not a TorchScript file"):
        inception(path)


def test_torchscript_of_another_interface_is_refused(tmp_path):
    path = script(NoFeatures(), tmp_path / "inception.pt")
    with pytest.raises(ConfigError, match=r"cannot be called as module\(images, return_features"):
        inception(path)


def test_wrong_number_of_features_is_refused(tmp_path):
    path = script(Inception(1000), tmp_path / "inception.pt")
    with pytest.raises(ConfigError, match=r"\[1000\] features per image, Inception gives \[2048\]"):
        inception(path)


def test_digest_changes_with_values_shapes_types_and_names():
    base = {"w": torch.zeros(2, 3)}
    variants = [
        {"w": torch.ones(2, 3)},
        {"w": torch.zeros(3, 2)},
        {"w": torch.zeros(2, 3, dtype=torch.int32)},
        {"v": torch.zeros(2, 3)},
    ]
    digests = {tensors_digest(tensors) for tensors in [base, *variants]}
    assert len(digests) == 5
