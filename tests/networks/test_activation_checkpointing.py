"""Activation checkpointing saves memory and changes nothing else."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from cdm_ray.networks.dropout import Dropout
from cdm_ray.randomness import BlockRng
from tests.networks.architectures import ARCHITECTURES, build, loud, noise


class CountingDropout(Dropout):
    """Counts the bytes of its masks, which checkpointing keeps outside of autograd."""

    kept = 0

    def draw(self, shape, p):
        mask = super().draw(shape, p)
        self.kept += mask.dropped.nbytes
        return mask


def training_step(architecture, *, checkpointing):
    """Loss, gradients of all parameters and of x, and bytes that the backward pass waits for."""
    network = loud(
        build(
            architecture,
            label_dim=10,
            augment_dim=9,
            dropout=0.3,
            activation_checkpointing=checkpointing,
        )
    ).requires_grad_(True)
    x = noise(4, 1, 8, 8).requires_grad_()
    rng = BlockRng.for_lanes(0, 0, [0, 1], "cpu")
    dropout = CountingDropout(rng, torch.tensor([True, False, True, True]))
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        denoised = network(x, torch.rand(4), torch.eye(10)[:4], noise(4, 9), dropout)
        loss = denoised.square().mean()
    held = sum(storage.nbytes() for storage in saved.values())
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    held -= sum(storage.nbytes() for pointer, storage in saved.items() if pointer in weights)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    after = rng.uniform(2)
    return loss.detach(), gradients | {"x": x.grad}, held, dropout.kept, after


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_the_same_bits_for_less_memory(architecture):
    torch.manual_seed(3)
    loss, gradients, held, _, after = training_step(architecture, checkpointing=False)
    torch.manual_seed(3)
    told = training_step(architecture, checkpointing=True)
    assert torch.equal(loss, told[0])
    assert gradients.keys() == told[1].keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, told[1][name]), name
    assert torch.equal(after, told[4])  # as many numbers were drawn
    assert told[2] + told[3] < held / 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_kept_without_gradient(architecture, monkeypatch):
    network = build(architecture, activation_checkpointing=True)
    monkeypatch.setattr("cdm_ray.networks.unet.checkpoint", None)  # called, it would fail
    with torch.no_grad():
        network(noise(1, 1, 8, 8), torch.ones(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_second_derivatives_are_the_same(architecture):
    def penalty_gradient(checkpointing):
        network = loud(build(architecture, activation_checkpointing=checkpointing))
        network.requires_grad_(True)
        x = noise(2, 1, 8, 8).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(
                network(x, torch.ones(2)).square().sum(), x, create_graph=True
            )
            gradient.square().sum().backward()
        return x.grad

    torch.testing.assert_close(penalty_gradient(True), penalty_gradient(False))
