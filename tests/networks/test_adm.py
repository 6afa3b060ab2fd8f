import torch

from tests.networks.architectures import build, loud, noise


def test_first_convolution_is_as_wide_as_its_level():
    network = build("adm", channel_mult=(2, 2), channels=3)
    assert network.model.enc["8x8_conv"].weight.shape == (64, 3, 3, 3)
    assert network(noise(1, 3, 8, 8), torch.ones(1)).shape == (1, 3, 8, 8)


def test_label_is_a_row_of_a_table_added_to_the_mapped_noise():
    network = loud(build("adm", label_dim=10)).model
    level, labels = torch.tensor([0.3, -1.0]), torch.eye(10)[[7, 2]]
    told = network.embed(level, labels, None, torch.float32)
    mapped = network.map_layer1(
        torch.nn.functional.silu(network.map_layer0(network.map_noise(level)))
    )
    expected = torch.nn.functional.silu(mapped + network.map_label.weight.T[[7, 2]])
    torch.testing.assert_close(told, expected)
