"""Weights come out of a file as they are in it, and what is no weight file is told."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from cdm_ray.config import NetworkConfig
from cdm_ray.errors import ConfigError
from cdm_ray.networks import build_network
from cdm_ray.networks.published import EXPORT_KEY, read_weights
from tests.edm_pickles import checkpoint, dumps, fixture, network, tiny_network


@pytest.mark.parametrize("labels", ["cond", "uncond"])
@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_a_published_pickle_gives_its_weights_bit_by_bit(architecture, labels, tmp_path):
    tensors, arguments = fixture(f"{architecture}-{labels}")
    path = tmp_path / "network.pkl"
    path.write_bytes(dumps(checkpoint(network(tensors, arguments))))
    weights = read_weights(path)
    assert weights.origin == str(path)
    assert weights.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(weights.tensors[name], tensor), name
        assert weights.tensors[name].dtype == torch.float32


@pytest.mark.parametrize("labels", ["cond", "uncond"])
@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_the_settings_build_the_network_of_the_file(architecture, labels, tmp_path):
    tensors, arguments = fixture(f"{architecture}-{labels}")
    path = tmp_path / "network.pkl"
    path.write_bytes(dumps(checkpoint(network(tensors, arguments))))
    settings = read_weights(path).settings
    assert settings["network.architecture"] == architecture
    fields = {k.split(".")[1]: v for k, v in settings.items() if k.startswith("network.")}
    built = build_network(
        NetworkConfig(**fields),
        resolution=settings["data.resolution"],
        channels=settings["data.channels"],
        label_dim=arguments["label_dim"],
        augment_dim=arguments["augment_dim"],
    )
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (
            {"model_type": "SongUNet"},
            {"architecture": "ddpmpp", "model_channels": 128, "channel_mult": [1, 2, 2, 2]}
            | {"num_blocks": 4, "attn_resolutions": [16]},
        ),
        (
            {},
            {"architecture": "adm", "model_channels": 192, "channel_mult": [1, 2, 3, 4]}
            | {"num_blocks": 3, "attn_resolutions": [32, 16, 8]},
        ),
    ],
)
def test_what_the_file_does_not_say_has_the_original_default(arguments, settings, tmp_path):
    ema = network({"model.weight": torch.ones(1)}, arguments)
    ema.meta["state"]["_init_args"] = (32, 3, 10)  # resolution, channels, classes
    path = tmp_path / "network.pkl"
    path.write_bytes(dumps(checkpoint(ema)))
    assert read_weights(path).settings == {
        "data.resolution": 32,
        "data.channels": 3,
        "network.sigma_data": 0.5,
        "network.class_conditional": True,
    } | {f"network.{name}": value for name, value in settings.items()}


@pytest.mark.parametrize("arguments", [{"model_channels": "128"}, {"channel_mult": [[1]]}])
def test_arguments_that_are_no_numbers_are_left_out(arguments, tmp_path):
    path = tmp_path / "network.pkl"
    path.write_bytes(dumps(checkpoint(network({"model.weight": torch.ones(1)}, arguments))))
    assert f"network.{next(iter(arguments))}" not in read_weights(path).settings


@pytest.mark.parametrize("home", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_scalars_are_read_from_both_of_its_homes(home, tmp_path):
    ema = network({"model.weight": torch.ones(1)}, {"sigma_data": 0.25})
    content = checkpoint(ema)
    for state in (
        ema.meta["state"],
        *(m.meta["state"] for m in ema.meta["state"]["_modules"].values()),
    ):
        del state["_non_persistent_buffers_set"]  # no set of protocol 3
    data = dumps(content, protocol=3)
    for known in ("numpy.core.multiarray", "numpy._core.multiarray"):
        data = data.replace(f"c{known}\n".encode(), f"c{home}\n".encode())
    assert f"c{home}\nscalar\n".encode() in data
    path = tmp_path / "network.pkl"
    path.write_bytes(data)
    assert read_weights(path).settings["network.sigma_data"] == 0.25


def test_views_of_one_storage_come_apart(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    path = tmp_path / "network.pkl"
    ema = network({"model.a": whole[1:].t(), "model.b": whole[:, 2]}, {})
    path.write_bytes(dumps(checkpoint(ema)))
    tensors = read_weights(path).tensors
    assert torch.equal(tensors["model.a"], whole[1:].t())
    assert torch.equal(tensors["model.b"], whole[:, 2])
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    tensors["model.a"].zero_()
    assert torch.equal(tensors["model.b"], whole[:, 2])


@pytest.mark.parametrize("kind", ["pkl", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_become_float32(kind, dtype, tmp_path):
    tensor = torch.tensor([1.5, -0.25, 3.0], dtype=dtype)
    path = tmp_path / f"network.{kind}"
    if kind == "pkl":
        path.write_bytes(dumps(checkpoint(network({"model.weight": tensor}, {}))))
    else:
        save_file({"model.weight": tensor}, path)
    read = read_weights(path).tensors["model.weight"]
    assert read.dtype == torch.float32
    assert torch.equal(read, torch.tensor([1.5, -0.25, 3.0]))


@pytest.mark.parametrize("kind", ["pkl", "safetensors"])
@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.tensor([1.0, float("nan")]), "model.weight holds numbers that are not finite"),
        (torch.tensor([1, 2]), "model.weight is torch.int64"),
    ],
)
def test_what_no_weights_can_be_is_told(kind, tensor, told, tmp_path):
    path = tmp_path / f"network.{kind}"
    if kind == "pkl":
        ema = tiny_network()
        ema.meta["state"]["_modules"]["model"].meta["state"]["_buffers"]["weight2"] = tensor
        told = told.replace("weight", "weight2")
        path.write_bytes(dumps(checkpoint(ema)))
    else:
        save_file({"model.weight": tensor}, path)
    with pytest.raises(ConfigError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"{path}: {told}")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"G": 1, "D": 2, "G_ema": 3}, "it holds the keys D, G, G_ema, and should have"),
        ({"ema": tiny_network(), "optimizer": {}}, "it holds the keys ema, optimizer, and"),
        ([1], "it holds a list"),
        ({"ema": {"model.weight": 1}}, "the network is a 'dict'"),
        (
            checkpoint(network({"model.w": torch.ones(1)}, {}, "VPPrecond")),
            "is a 'VPPrecond'; only",
        ),
    ],
)
def test_what_is_no_edm_checkpoint_is_told(content, told, tmp_path):
    path = tmp_path / "network.pkl"
    path.write_bytes(dumps(content))
    with pytest.raises(ConfigError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("_modules"), "the module ema has no _modules"),
        (lambda state: state["_buffers"].update(x=3), "x in _buffers is a int"),
        (lambda state: state["_modules"].update(x=torch.ones(1)), "x in _modules is a Tensor"),
        (lambda state: state.update(_init_kwargs=[]), "no _init_args, _init_kwargs in ema"),
    ],
)
def test_a_network_of_another_build_is_told(change, told, tmp_path):
    ema = tiny_network()
    change(ema.meta["state"])
    path = tmp_path / "network.pkl"
    path.write_bytes(dumps(checkpoint(ema)))
    with pytest.raises(ConfigError, match=told):
        read_weights(path)


def test_a_damaged_or_missing_safetensors_file_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(ConfigError, match=r"weights\.safetensors: cannot be read"):
        read_weights(path)
    save_file({"model.weight": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"weights\.safetensors: no sound safetensors file"):
        read_weights(path)
    save_file({"model.weight": torch.ones(1)}, path, {EXPORT_KEY: "{}"})
    with pytest.raises(ConfigError, match="does not tell which network"):
        read_weights(path)


def test_other_kinds_of_files_are_not_opened(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(1))
    with pytest.raises(ConfigError, match=r"weights\.pt: weights of an unknown kind; give EDM's"):
        read_weights(path)
