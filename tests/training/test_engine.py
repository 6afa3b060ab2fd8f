"""The engine gives the same training at every ZeRO stage, and puts back what it took out."""

import pytest
import torch

from cdm_ray.checkpoint import KINDS
from cdm_ray.config import OptimizerConfig
from cdm_ray.training.engine import Engine
from cdm_ray.training.optimizer import EMAAdam
from tests.distributed import run_workers

OPTIMIZER = OptimizerConfig(lr=1e-2, clip_norm=50.0)
BATCH = 16


def small_network():
    torch.manual_seed(0)
    # 7 channels: no parameter but one divides by two ranks, so every stage has to pad
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 7, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(7, 1, 3, padding=1)
    )


def micro_loss(engine, rank, world, step, micro):
    """Sum over this rank's rows of a batch that does not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(10 * step + micro)
    rows = torch.randn(BATCH // 2, 1, 8, 8, generator=generator).chunk(world)[rank]
    dtype = next(engine.network.parameters()).dtype
    return ((engine(rows.to(dtype)).float() - rows) ** 2).sum()


def train(engine, rank, world, steps, factor=1.0):
    results = []
    for step in steps:
        for micro in range(2):
            if micro:
                engine.end_micro_step()
            loss = micro_loss(engine, rank, world, step, micro)
            engine.backward(loss * factor * world / BATCH)
        results.append(engine.step(lr=1e-2, ema_beta=0.5))
    return results


def tensors(engine):
    return {
        kind: {name: tensor.detach().float().clone() for name, tensor in engine.gather(kind)}
        for kind in KINDS
    }


def new_engine(stage, precision, network=None):
    return Engine(
        network or small_network(), OPTIMIZER, zero_stage=stage, precision=precision, micro_steps=2
    )


def story(rank, world, cases):
    """Per case: state after 6 steps, straight and through a restore at 3; a poisoned step."""
    told = {}
    for stage, precision in cases:
        engine = new_engine(stage, precision)
        norms = [result.grad_norm for result in train(engine, rank, world, range(3))]
        middle, count = tensors(engine), engine.optimizer_steps
        train(engine, rank, world, range(3, 6))
        straight = tensors(engine)

        network = small_network()
        network.load_state_dict(middle["weights"])
        resumed = new_engine(stage, precision, network)
        resumed.restore(
            lambda kind, name, middle=middle: middle[kind][name],
            count,
            lambda resumed=resumed: micro_loss(resumed, rank, world, 0, 0),
        )
        restored = tensors(resumed)
        train(resumed, rank, world, range(3, 6))
        through = tensors(resumed)
        # only rank 0's gradients are poisoned: all ranks must skip
        poisoned = train(resumed, rank, world, [6], factor=float("nan") if rank == 0 else 1.0)[0]
        told[stage, precision] = {
            "norms": norms,
            "middle": middle,
            "restored": restored,
            "straight": straight,
            "through": through,
            "poisoned": (poisoned.applied, poisoned.grad_norm, resumed.optimizer_steps),
            "after_poison": tensors(resumed),
            "recovered": train(resumed, rank, world, [7])[0].applied,
        }
    return told


CASES = [(0, "fp32"), *((stage, p) for stage in (1, 2, 3) for p in ("fp32", "bf16"))]


@pytest.fixture(scope="module")
def stories():
    return {world: run_workers(story, world, CASES)[0] for world in (1, 2)}


def assert_equal(a, b):
    for kind in KINDS:
        for name in a[kind]:
            assert torch.equal(a[kind][name], b[kind][name]), (kind, name)


def assert_close(a, b, rtol):
    for kind in KINDS:
        for name in a[kind]:
            torch.testing.assert_close(a[kind][name], b[kind][name], rtol=rtol, atol=rtol)


def plain_torch():
    """The same six steps without DeepSpeed: torch's Adam, norm clipping, a hand-made average."""
    network = small_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    average = None
    for step in range(6):
        optimizer.zero_grad()
        for micro in range(2):
            generator = torch.Generator().manual_seed(10 * step + micro)
            rows = torch.randn(BATCH // 2, 1, 8, 8, generator=generator)
            (((network(rows) - rows) ** 2).sum() / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 50.0)
        optimizer.step()
        weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        average = (
            weights if average is None else {n: average[n].lerp(weights[n], 0.5) for n in weights}
        )
    return weights, average


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_as_plain_torch_does(stories, stage, world):
    weights, average = plain_torch()
    told = stories[world][stage, "fp32"]["straight"]
    for name in weights:
        # six Adam steps in float32 on sums of another order
        torch.testing.assert_close(told["weights"][name], weights[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(told["ema"][name], average[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_restored_run_is_bit_identical(stories, case, world):
    told = stories[world][case]
    assert_equal(told["middle"], told["restored"])
    assert_equal(told["straight"], told["through"])


def test_bf16_keeps_float32_master_weights(stories):
    """Masters rounded to bf16 at a restore would still be close: they have to be exact."""
    for stage in (1, 2, 3):
        for weight in stories[2][stage, "bf16"]["restored"]["weights"].values():
            assert not torch.equal(weight, weight.bfloat16().float())


def test_bf16_stages_agree(stories):
    reference = stories[2][1, "bf16"]["straight"]["weights"]
    for stage in (2, 3):
        for name, weight in stories[2][stage, "bf16"]["straight"]["weights"].items():
            # bf16 has 8 bits of mantissa; the stages accumulate in another order
            torch.testing.assert_close(weight, reference[name], rtol=2e-2, atol=2e-3)


def test_number_of_workers_changes_nothing_but_rounding(stories):
    for case in CASES:
        if case[1] == "fp32":
            assert_close(stories[1][case]["straight"], stories[2][case]["straight"], rtol=1e-5)


def test_gradient_norm_is_the_global_one(stories):
    reference = stories[1][0, "fp32"]["norms"]
    for world in (1, 2):
        for stage in (0, 1, 2, 3):
            assert stories[world][stage, "fp32"]["norms"] == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_nonfinite_gradients_of_one_rank_skip_the_step_on_all(stories, case):
    told = stories[2][case]
    applied, norm, count = told["poisoned"]
    assert not applied
    assert not torch.isfinite(torch.tensor(norm))
    assert count == 6
    assert_equal(told["after_poison"], told["through"])
    assert told["recovered"]


def test_optimizer_refuses_a_closure():
    optimizer = EMAAdam([torch.nn.Parameter(torch.ones(1))], OPTIMIZER, guard=True)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
