"""The steps of the GPU benchmark: alike in all variants and, by a stand-in for CUDA graphs, fit
to be captured."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.draws import Tape
from benchmarks.gpu.graphs import GraphedDenoiser
from benchmarks.gpu.settings import OBJECTIVES, QUICK, new_network
from benchmarks.gpu.variants import (
    EAGER,
    ORIGINAL,
    TF32,
    Trainer,
    TrainingStep,
    errors,
    image_objective,
    initial_weights,
    network_with,
)
from cdm_ray.objectives.base import ImageBatch
from cdm_ray.randomness import BlockRng

CPU = torch.device("cpu")
EXACT = 1e-5
"""Float32 rounding of a small network's gradient."""


class Recording(TorchDispatchMode):
    """Every operation with its tensors, as a CUDA graph keeps kernels and addresses; refuses what a
    capture refuses."""

    REFUSED = ("_local_scalar_dense", "lift_fresh", "normal_", "uniform_", "random_", "nonzero")
    """The host reads a value or sends one, or a generator is used that the graph does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        slice_set_to_true = name == "lift_fresh" and args[0].dtype == torch.bool  # a fill on a card
        assert slice_set_to_true or name not in self.REFUSED, f"{func} in a capture"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            pairs = zip(_tensors(result), _tensors(again), strict=True)
            for old, new in pairs:
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(result):
    results = result if isinstance(result, (tuple, list)) else [result]
    return [r for r in results if isinstance(r, torch.Tensor)]


def pretend_capture(body: Callable[[], object]) -> Callable[[], object]:
    """As `cuda_capture`: nothing of Python runs again in a replay."""
    body()
    recording = Recording()
    with recording:
        body()

    def replay() -> None:
        with torch.no_grad():
            recording.replay()

    return replay


@pytest.fixture(scope="module")
def weights():
    return initial_weights(QUICK)


def trainer_of(variant, weights) -> Trainer:
    return Trainer(variant, QUICK, weights)


def reference_of(weights, dropout: float = 0.0):
    return network_with(weights, QUICK, dropout=dropout, activation_checkpointing=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_tape_gives_the_numbers_of_the_generators_bit_for_bit(objective, weights):
    network = network_with(weights, QUICK, dropout=0.3)
    loss_of = image_objective(objective, QUICK)
    batch = ImageBatch(torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)))

    def terms(rng: BlockRng):
        return [term.value for term in loss_of(network, batch, rng, 0).values()]

    tape = Tape(terms, BlockRng.for_lanes(0, 0, [0, 1], CPU))
    for step in (1, 2):
        tape.refill(BlockRng.for_lanes(0, step, [0, 1], CPU))
        tape.rewind()
        torch.testing.assert_close(
            terms(tape), terms(BlockRng.for_lanes(0, step, [0, 1], CPU)), rtol=0, atol=0
        )


def test_a_tape_refuses_a_step_that_draws_otherwise():
    rng = BlockRng.for_lanes(0, 0, [0], CPU)
    tape = Tape(lambda rng: rng.normal(2, 3), rng)
    with pytest.raises(RuntimeError, match=r"uniform \(2, 3\).*recorded as normal"):
        tape.uniform(2, 3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_whole_step_can_be_a_graph(objective, dropout, weights):
    variant = replace(TF32, dropout=dropout)
    trainer = trainer_of(variant, weights)
    step = TrainingStep(trainer, objective, 4, QUICK, graph="step", capture=pretend_capture)
    for _ in range(2):  # weights change where the graph reads them
        step()
    trainer.load(weights)
    assert max(errors(step, reference_of(weights, dropout))) < EXACT


class ElsewhereRng(BlockRng):
    """Draws nothing, on a device that is not the host."""

    device = torch.device("meta")

    def normal(self, *shape):
        return torch.empty(shape, device=self.device)

    uniform = normal


class NothingOnTheHost(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(tree_leaves((args, kwargs, result))):
            assert tensor.device.type == "meta", f"{func} has a tensor on the host"
        return result


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_has_no_tensor_on_the_host(objective):
    network = new_network(QUICK, dropout=0.3).to("meta", torch.bfloat16)
    images = torch.empty(8, 3, 8, 8, device="meta")
    batch = ImageBatch(images, augment_labels=torch.empty(8, 9, device="meta"))
    rng = ElsewhereRng([torch.Generator()] * 2)
    with NothingOnTheHost():
        terms = image_objective(objective, QUICK)(network, batch, rng, 0)
        torch.stack([term.value for term in terms.values()]).sum().backward()


def test_rollouts_alone_can_be_graphs(weights):
    trainer = trainer_of(TF32, weights)
    step = TrainingStep(trainer, "cp released", 4, QUICK, graph="rollouts", capture=pretend_capture)
    step()
    trainer.load(weights)
    assert max(errors(step, reference_of(weights))) < EXACT


def test_the_errors_of_a_cp_row_show_what_the_denoising_loss_would_hide(weights):
    trainer = trainer_of(TF32, weights)
    step = TrainingStep(trainer, "cp recommended", 4, QUICK)
    exact = step.model
    # wrong by 1 % at the ends of the rollouts only, half as many rows as the batch has
    step.model = lambda x, *rest, **more: exact(x, *rest, **more) * (1 if len(x) == 4 else 1.01)
    assert min(errors(step, reference_of(weights))) > 1e-2


def test_a_graphed_denoiser_reads_its_inputs_anew_at_every_call():
    def denoiser(x, sigma, class_labels, augment_labels):
        return x * sigma + augment_labels.sum(1)

    graphed = GraphedDenoiser(denoiser, pretend_capture)
    draws = BlockRng.for_lanes(0, 0, [0], CPU)
    with torch.no_grad():
        for n in (2, 3, 2, 3):
            x, sigma, labels = draws.normal(n, n), draws.normal(n), draws.normal(n, 9)
            torch.testing.assert_close(
                graphed(x, sigma, augment_labels=labels), denoiser(x, sigma, None, labels)
            )


def test_all_variants_take_the_same_step(weights):
    moved = {}
    for variant in (ORIGINAL, TF32, EAGER):
        trainer = trainer_of(variant, weights)
        before = torch.cat([w.flatten() for w in trainer.masters]).clone()
        TrainingStep(trainer, "dsm", 4, QUICK)()
        after = torch.cat([w.detach().flatten() for w in trainer.masters])
        moved[variant] = after - before
        rest = torch.cat([w.flatten() for w in trainer.averages]) - before
        torch.testing.assert_close(rest, (1 - QUICK.ema_decay) * moved[variant])
    # Adam's first step is lr times the sign of the gradient, which rounding turns for tiny ones.
    for variant, share in ((ORIGINAL, 0.999), (EAGER, 0.95)):
        agree = (moved[variant] - moved[TF32]).abs() < 0.01 * QUICK.lr
        assert agree.float().mean() > share


def test_bf16_weights_follow_float32_masters_that_remember_small_steps(weights):
    trainer = trainer_of(EAGER, weights)
    trainer.optimizer.param_groups[0]["lr"] = 1e-6  # below the resolution of bf16
    step = TrainingStep(trainer, "dsm", 4, QUICK)
    for _ in range(3):
        step()
    masters = torch.cat([w.flatten() for w in trainer.masters])
    initial = torch.cat([weights[n].flatten() for n, _ in trainer.network.named_parameters()])
    assert (masters - initial).abs().max() > 1e-6
    low = torch.cat([w.detach().flatten() for w in trainer.weights])
    assert torch.equal(low, masters.bfloat16())
