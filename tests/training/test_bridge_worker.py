"""A worker's share of a bridge: what its lanes simulate does not depend on who else there is."""

import math

import pytest
import torch

from cdm_ray.bridges import control_of
from cdm_ray.checkpoint import Checkpoint, TrainingState
from cdm_ray.config import BridgeConfig, load_config
from cdm_ray.config.bridges import AnnealConfig
from cdm_ray.errors import RunFailed
from cdm_ray.processes.annealing import Annealed
from cdm_ray.processes.references import OrnsteinUhlenbeck
from cdm_ray.processes.simulation import Paths
from cdm_ray.randomness import BlockRng
from cdm_ray.training.bridge_worker import BridgeRun, Replay, annealing_at
from cdm_ray.training.engine import Engine
from cdm_ray.training.loop import run_loop
from cdm_ray.training.rates import bridge_rates
from tests.distributed import run_workers

SMALL = [
    "network.width=8",
    "simulation.steps=12",
    "simulation.paths=16",
    "simulation.lanes=4",
    "train.iterations=6",
    "train.inner_steps=1",
    "train.pairs=null",
    "control.weighting=inclusive",
    "train.log_every=1",
    "ray.workers=1",
    "eval.every_iterations=null",
]
CPU = torch.device("cpu")


def small(*overrides):
    return load_config(BridgeConfig, None, [*SMALL, *overrides])


class Recorder:
    def __init__(self):
        self.records = []

    def record(self, record):
        self.records.append(record)

    def after_step(self, state):
        pass


def train(config, lanes):
    run = BridgeRun(config, lanes, CPU)
    engine = Engine(
        control_of(config, run.bridge),
        config.optimizer,
        zero_stage=config.train.zero_stage,
        precision="fp32",
        micro_steps=1,
    )
    recorder = Recorder()
    run_loop(
        engine,
        run.objective,
        run.passes(engine, 0),
        TrainingState(0, 0, 0),
        last_step=config.steps,
        batch=config.pairs,
        train=config.train,
        rates=lambda state: bridge_rates(config, state.step),
        hooks=recorder,
    )
    weights = {name: tensor.clone() for name, tensor in engine.gather("ema")}
    return weights, [record.metrics for record in recorder.records], run


def train_share(rank, world, cases):
    lanes = [range(4), [0, 1, 2], [3]] if world == 2 else [range(4)]
    mine = lanes[-world:][rank]
    return [train(small(*overrides), mine)[:2] for overrides in cases]


CASES = [
    (),
    ("train.pairs=64", "train.inner_steps=2", "train.iterations=3"),
    ("simulation.replay=2", "control.variate=innovation"),
    ("train.zero_stage=3", "anneal.drift=sine", "anneal.sigma=1.5", "anneal.tolerance=0.1"),
]


def test_two_unequal_workers_learn_what_one_does():
    (alone,) = run_workers(train_share, 1, CASES)
    first, second = run_workers(train_share, 2, CASES)
    for case in range(len(CASES)):
        weights, metrics = alone[case]
        assert len(metrics) == 6
        for told, _ in (first[case], second[case]):
            for name, expected in weights.items():
                # six Adam steps in float32 on sums of another order
                torch.testing.assert_close(told[name], expected, rtol=1e-3, atol=2e-5)
        for told, expected in zip(first[case][1], metrics, strict=True):
            assert told["loss/control"] == pytest.approx(expected["loss/control"], rel=1e-3)


@pytest.mark.parametrize("pairs", ["null", "48"])
def test_pairs_are_all_pairs_once_or_each_lanes_own(pairs):
    config = small(f"train.pairs={pairs}")
    run = BridgeRun(config, [1, 3], CPU)
    rng = BlockRng.for_lanes(0, 5, [1, 3], CPU)
    found = run._pairs(rng)
    if pairs == "null":
        assert torch.equal(found, torch.arange(12 * 8))
        return
    k, n = found // 8, found % 8
    assert ((k >= 0) & (k < 12)).all()
    assert (n[:12] < 4).all()
    assert (n[12:] >= 4).all()
    alone = BridgeRun(config, [3], CPU)._pairs(BlockRng.for_lanes(0, 5, [3], CPU))
    assert torch.equal(alone // 4, k[12:])
    assert torch.equal(alone % 4, n[12:] - 4)


def rollout(config, lanes, value):
    """Paths whose states tell the lane, the path in it and the rollout."""
    each = config.lane_paths
    tags = [100 * lane + path + 0.01 * value for lane in lanes for path in range(each)]
    states = torch.tensor(tags).expand(13, -1)[..., None].clone()
    return Paths(states, torch.linspace(0, 1, 13))


def test_replayed_paths_are_whole_and_of_their_own_lane_and_old_ones_are_forgotten():
    config, lanes = small("simulation.replay=2", "control.variate=innovation"), [0, 2]
    replay, seen = Replay(config, lanes), set()
    for step in range(60):
        rng = BlockRng.for_lanes(0, step, lanes, CPU)
        drawn = replay.exchanged(rollout(config, lanes, step), rng)
        assert drawn.increments is None
        assert (drawn.states == drawn.states[0]).all()
        tags = drawn.states[0, :, 0]
        assert torch.equal((tags // 100).long(), torch.tensor([0] * 4 + [2] * 4))
        age = step - ((tags % 1) * 100).round()
        assert ((age >= 0) & (age <= min(step, 2))).all()
        seen |= set(age.tolist())
    assert seen == {0, 1, 2}


def test_a_replay_buffer_survives_a_checkpoint_and_another_number_of_workers(tmp_path):
    config = small("simulation.replay=2", "control.variate=innovation")
    files, whole = {}, Replay(config, range(4))
    for lanes in ([0, 1, 2], [3]):
        replay = Replay(config, lanes)
        for step in range(3):
            replay.exchanged(rollout(config, lanes, step), BlockRng.for_lanes(0, step, lanes, CPU))
        files |= replay.tensors()
    for step in range(3):
        rng = BlockRng.for_lanes(0, step, range(4), CPU)
        whole.exchanged(rollout(config, range(4), step), rng)

    class Stored(Checkpoint):
        def tensors(self, kind):
            return files[kind]

    loaded = Replay(config, range(4))
    loaded.load(Stored(tmp_path, TrainingState(3, 0, 3)))
    again, expected = (
        r.exchanged(rollout(config, range(4), 3), BlockRng.for_lanes(0, 3, range(4), CPU))
        for r in (loaded, whole)
    )
    assert torch.equal(again.states, expected.states)


def test_anneals_start_and_end_where_they_should():
    config = AnnealConfig(drift="sine", sigma=3, tolerance=0.1, last_tolerance=1e-3, share=0.5)
    start, middle, end = (annealing_at(config, progress) for progress in (0.0, 0.25, 0.5))
    assert (start.drift_share, start.sigma_factor, start.tolerance) == (0.0, 3.0, 0.1)
    assert middle.drift_share == pytest.approx(math.sin(math.pi / 4))
    assert middle.sigma_factor == 2.0
    assert middle.tolerance == pytest.approx(1e-2)
    assert (end.drift_share, end.sigma_factor, end.tolerance) == (1.0, 1.0, 0.0)
    off = annealing_at(AnnealConfig(), 0.0)
    assert (off.drift_share, off.sigma_factor, off.tolerance) == (1.0, 1.0, 0.0)
    assert annealing_at(AnnealConfig(drift="linear"), 0.25).drift_share == 0.5


def test_an_annealed_process_is_a_share_of_itself():
    process = Annealed(OrnsteinUhlenbeck(2, 0.7, 1.5))
    x, t = torch.tensor([[1.0, -2.0]]), torch.tensor([0.1, 0.2])
    assert torch.equal(process.drift(x), -1.5 * x)
    process.drift_share, process.sigma_factor = 0.5, 2.0
    torch.testing.assert_close(process.drift(x), -0.75 * x)
    torch.testing.assert_close(process.sigma(t), torch.full((2,), 1.4))


def first_pass(config):
    run = BridgeRun(config, range(4), CPU)
    engine = Engine(
        control_of(config, run.bridge),
        config.optimizer,
        zero_stage=0,
        precision="fp32",
        micro_steps=1,
    )
    next(run.passes(engine, 0))
    return run, engine


def annealed_parts(rank, world):
    run, engine = first_pass(small("anneal.drift=linear", "anneal.sigma=2", "anneal.tolerance=0.1"))
    parts = (engine.network, run.average, run.consistency)
    return (
        all(part.process is run.process for part in parts),
        [part.tolerance for part in parts],
        run.process.drift_share,
        run.process.sigma_factor,
    )


def test_the_anneal_reaches_everything_that_uses_the_process():
    assert run_workers(annealed_parts, 1) == [(True, [0.1, 0.1, 0.1], 0.0, 2.0)]


def exploded(rank, world):
    euler = ("network.guide=none", "network.drift_coefficient=1", "simulation.scheme=euler")
    with pytest.raises(RunFailed) as caught:
        first_pass(small(*euler, "simulation.steps=13", "process.sigma=6"))
    return str(caught.value)


def test_paths_that_explode_end_the_run_with_a_line_that_says_where():
    (message,) = run_workers(exploded, 1)
    assert message.startswith("iteration 0: a path left the domain of its process at step ")
    assert "with sigma=6 and dt=0.0769" in message
    assert "raise the number of time steps" in message
