"""A run starts from the weights of the file, all of them, or says which it does not and why."""

import pytest
import torch
from safetensors.torch import save_file

from cdm_ray.config import BridgeConfig, ImageConfig, NetworkConfig, load_config
from cdm_ray.errors import ConfigError
from cdm_ray.initial_weights import initialise, load_into, read_initial
from cdm_ray.networks import build_network
from cdm_ray.networks.published import Published
from tests.checkpoints import make_checkpoint
from tests.edm_pickles import checkpoint, dumps, fixture, network

LABEL, BIAS = "model.map_label.weight", "model.map_label.bias"
AUGMENT = "model.map_augment.weight"


def build(*, label_dim=0, augment_dim=0, **fields):
    """A network whose parameters all differ from 0."""
    config = NetworkConfig(
        **{
            "model_channels": 16,
            "channel_mult": (1, 2),
            "num_blocks": 1,
            "attn_resolutions": (4,),
            **fields,
        }
    )
    torch.manual_seed(label_dim + augment_dim)
    built = build_network(
        config, resolution=8, channels=1, label_dim=label_dim, augment_dim=augment_dim
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return built


def published(built, **settings):
    tensors = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    return Published(tensors, "file.safetensors", settings)


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_a_published_network_is_taken_whole(architecture, tmp_path):
    tensors, arguments = fixture(f"{architecture}-cond")
    path = tmp_path / "network.pkl"
    path.write_bytes(dumps(checkpoint(network(tensors, arguments))))
    settings = read_initial(str(path)).settings
    fields = {k.split(".")[1]: v for k, v in settings.items() if k.startswith("network.")}
    torch.manual_seed(0)
    ours = build_network(
        NetworkConfig(**fields), resolution=16, channels=3, label_dim=3, augment_dim=9
    )
    report = initialise(ours, str(path))
    assert set(report.copied) == set(tensors)
    assert not report.zeroed
    assert not report.unused
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert report.summary() == (
        f"network.init={path}: {len(tensors)} of {len(tensors)} tensors copied, {numbers:,} numbers"
    )


def outputs(built, label_dim=0, labels=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 8, 8, generator=generator)
    if label_dim:
        labels = torch.eye(label_dim)[:3]
    with torch.no_grad():
        return built(x, torch.tensor([0.1, 1.0, 10.0]), labels)


def test_labels_that_the_file_lacks_start_without_effect():
    theirs, ours = build(), build(label_dim=4, augment_dim=9)
    report = load_into(ours, published(theirs))
    assert report.zeroed == {
        LABEL: "the file's network takes no classes",
        BIAS: "the file's network takes no classes",
        AUGMENT: "the file's network takes no augmentation labels",
    }
    assert not report.unused
    assert torch.equal(outputs(ours, 4), outputs(theirs))
    assert "starts at 0      model.map_augment.weight: the file's network" in report.summary()


def test_labels_that_the_run_does_not_have_are_left_in_the_file():
    theirs, ours = build(label_dim=4, augment_dim=9), build()
    report = load_into(ours, published(theirs))
    assert set(report.unused) == {LABEL, BIAS, AUGMENT}
    assert not report.zeroed
    assert f"not used         {LABEL}: [16, 4], this network takes no" in report.summary()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_another_number_of_classes_starts_at_what_the_classes_share():
    theirs, ours = build(label_dim=4), build(label_dim=3)
    report = load_into(ours, published(theirs))
    assert report.zeroed == {LABEL: "the file's is [16, 4], for another number of classes"}
    assert not ours.state_dict()[LABEL].any()
    assert torch.equal(ours.state_dict()[BIAS], theirs.state_dict()[BIAS])


def test_filters_may_be_left_out_of_a_file_but_not_differ():
    theirs, ours = build(), build()
    weights = published(theirs)
    filters = [name for name in weights.tensors if name.endswith("resample_filter")]
    without = {n: t for n, t in weights.tensors.items() if n not in filters}
    report = load_into(ours, Published(without, "file", {}))
    assert report.constant == filters
    assert f"{len(filters)} resampling filters" in report.summary()
    weights.tensors[filters[0]].mul_(2)
    with pytest.raises(ConfigError, match=f"{filters[0]} holds another filter"):
        load_into(ours, weights)


NORM = "model.enc.8x8_block0.norm0.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop(NORM), f"in 1 places: {NORM} [16] is not in the file"),
        (
            lambda tensors: tensors.update({"model.extra": torch.ones(2, 3)}),
            "in 1 places: model.extra [2, 3] is in the file only",
        ),
        (
            lambda tensors: tensors.update({NORM: torch.ones(8)}),
            f"in 1 places: {NORM} is [8] in the file and [16] in the network",
        ),
        (
            lambda tensors: [tensors.update({f"x{i}": torch.ones(1)}) for i in range(9)],
            "in 9 places: x0 [1] is in the file only; x1 [1] is in the file only; x2 [1] is in the "
            "file only; ...; set network.* to the network that the file is of",
        ),
    ],
)
def test_nothing_else_may_differ_and_the_network_is_then_untouched(change, told):
    ours = build()
    weights = published(build(label_dim=4))
    change(weights.tensors)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_into(ours, weights)
    assert str(caught.value).startswith("network.init=file.safetensors: does not fit")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_misfit_says_which_settings_the_file_asks_for(tmp_path):
    tensors, arguments = fixture("ddpmpp-uncond")
    path = tmp_path / "network.pkl"
    path.write_bytes(dumps(checkpoint(network(tensors, arguments))))
    with pytest.raises(ConfigError) as caught:
        initialise(build(), str(path))
    assert str(caught.value).startswith(f"network.init={path}: does not fit")
    assert str(caught.value).endswith(
        "set data.resolution=16 data.channels=3 network.architecture=ddpmpp "
        "network.model_channels=16 network.channel_mult=[1,2] network.num_blocks=2 "
        "network.attn_resolutions=[8] network.sigma_data=0.5 network.class_conditional=false"
    )


def test_another_preconditioning_is_refused():
    weights = published(build(), **{"network.sigma_data": 0.25})
    with pytest.raises(ConfigError, match="network.sigma_data is 0.25 there and 0.5 here"):
        load_into(build(), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_safetensors_file_of_anybody_is_taken(dtype, tmp_path):
    theirs, ours = build(), build(augment_dim=9)
    path = tmp_path / "anybody.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in theirs.state_dict().items()}
    save_file(tensors, path)
    initialise(ours, str(path))
    for name, tensor in tensors.items():
        assert torch.equal(ours.state_dict()[name], tensor.float()), name


@pytest.mark.parametrize("place", ["checkpoints/step-00000007", "."])
def test_a_checkpoint_or_run_gives_its_averaged_weights(place, tmp_path):
    theirs = build(label_dim=10)
    make_checkpoint(tmp_path, load_config(ImageConfig, "digits"), theirs.state_dict())
    ours = build()
    report = initialise(ours, str(tmp_path / place))
    assert report.origin == str(tmp_path / "checkpoints/step-00000007")
    assert set(report.copied) == set(ours.state_dict())
    assert torch.equal(ours.state_dict()[NORM], theirs.state_dict()[NORM])
    with pytest.raises(ConfigError, match=r"set data.resolution=8 .* network.channel_mult=\[1,2\]"):
        initialise(build(channel_mult=(1, 1)), str(tmp_path / place))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    made = make_checkpoint(tmp_path, load_config(ImageConfig, "digits"), build().state_dict())
    (made.folder / "ema.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"network.init=.*ema.safetensors: truncated or changed"):
        read_initial(str(made.folder))


@pytest.mark.parametrize("name", ["missing.pkl", "missing"])
def test_a_place_with_nothing_is_told_what_could_be_there(name, tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_initial(str(tmp_path / name))
    assert str(caught.value) == (
        f"network.init={tmp_path / name}: no such file or folder; give EDM's .pkl, a .safetensors, "
        "or the folder of a checkpoint or a run"
    )


def test_the_checkpoint_of_a_bridge_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "well", load_config(BridgeConfig, None), {}).folder
    with pytest.raises(ConfigError, match=rf"network.init={folder}: not a checkpoint of jobs/t"):
        read_initial(str(folder))
