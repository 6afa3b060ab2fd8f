"""The whole training step, network and objective included, is the same however it is split."""

import pytest
import torch

from cdm_ray.checkpoint import KINDS, TrainingState
from cdm_ray.config import ImageConfig, load_config
from cdm_ray.errors import RunFailed
from cdm_ray.networks import build_network
from cdm_ray.objectives.base import ImageBatch, Term
from cdm_ray.objectives.image import ImageObjective
from cdm_ray.randomness import BlockRng, generator
from cdm_ray.training.engine import Engine
from cdm_ray.training.lanes import deal_lanes, micro_steps
from cdm_ray.training.loop import Pass, run_loop
from cdm_ray.training.rates import image_rates
from tests.distributed import run_workers

CONFIG = load_config(
    ImageConfig,
    "digits",
    [
        "network.model_channels=8",
        "network.dropout=0.1",
        "data.lanes=8",
        "train.batch=32",
        "train.images=320",
        "train.log_every=5",
        "optimizer.rampup_images=0",
        "cp.warmup_images=100",
        "ema.halflife_images=100",
    ],
)


def make_network():
    torch.manual_seed(0)
    return build_network(CONFIG.network, resolution=8, channels=1, label_dim=10)


def lane_batch(step, lanes):
    images, labels = [], []
    for lane in lanes:
        gen = generator(9, step, lane)
        images.append(torch.rand(CONFIG.lane_batch, 1, 8, 8, generator=gen) * 2 - 1)
        labels.append(torch.randint(10, (CONFIG.lane_batch,), generator=gen))
    one_hot = torch.nn.functional.one_hot(torch.cat(labels), 10).float()
    return ImageBatch(images=torch.cat(images), class_labels=one_hot)


class Recorder:
    def __init__(self):
        self.records = []

    def record(self, record):
        self.records.append(record)

    def after_step(self, state):
        pass


def passes(schedule, step=0):
    while True:
        yield [
            Pass(
                lane_batch(step, micro.lanes),
                BlockRng.for_lanes(1, step, micro.lanes, "cpu"),
                micro.counts,
            )
            for micro in schedule
        ]
        step += 1


def train(rank, world, stage, lanes_per_pass, objective=None, train_config=CONFIG.train):
    schedule = micro_steps(deal_lanes(8, world), rank, lanes_per_pass)
    engine = Engine(
        make_network(),
        CONFIG.optimizer,
        zero_stage=stage,
        precision="fp32",
        micro_steps=len(schedule),
    )
    recorder = Recorder()
    run_loop(
        engine,
        objective or ImageObjective(CONFIG.dsm, CONFIG.cp, CONFIG.network.sigma_data),
        passes(schedule),
        TrainingState(0, 0, 0),
        last_step=CONFIG.steps,
        batch=CONFIG.train.batch,
        train=train_config,
        rates=lambda state: image_rates(CONFIG, state.samples_seen),
        hooks=recorder,
    )
    tensors = {kind: {n: t.clone() for n, t in engine.gather(kind)} for kind in KINDS}
    return tensors, [record.metrics for record in recorder.records]


def train_all(rank, world, cases):
    return {case: train(rank, world, *case) for case in cases}


STAGES = [(stage, None) for stage in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def reference():
    return run_workers(train_all, 1, [(1, None)])[0][1, None]


def assert_same_run(told, reference):
    for kind in KINDS:
        for name, expected in reference[0][kind].items():
            # ten Adam steps in float32; sums in another order differ in the last digits, which
            # Adam's normalisation amplifies where a gradient is nearly zero
            torch.testing.assert_close(told[0][kind][name], expected, rtol=1e-3, atol=2e-5)
    for metrics, expected in zip(told[1], reference[1], strict=True):
        for name in ("loss/dsm", "loss/cp", "gradient_norm", "learning_rate"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (1, [(0, None), (1, 3)]),
        (2, [*STAGES, (1, 1), (2, 2)]),
        (3, [(1, None), (2, 1)]),  # uneven: 3, 3 and 2 lanes
    ],
    ids=["1 worker", "2 workers", "3 workers"],
)
def test_stage_workers_and_micro_steps_change_nothing(reference, world, cases):
    by_rank = run_workers(train_all, world, cases)
    for case in cases:
        assert_same_run(by_rank[0][case], reference)
        # rank 0 alone records
        assert all(by_rank[rank][case][1] == [] for rank in range(1, world))


def test_records_are_means_per_image(reference):
    metrics = reference[1]
    assert len(metrics) == 2
    assert {"loss/dsm", "loss/cp", "gradient_norm", "steps_skipped_nonfinite"} <= set(metrics[0])
    objective = ImageObjective(CONFIG.dsm, CONFIG.cp, CONFIG.network.sigma_data)
    network = make_network()
    terms = objective(
        network, lane_batch(0, range(8)), BlockRng.for_lanes(1, 0, range(8), "cpu"), 0
    )
    first = terms["dsm"].value.item() / 32
    assert metrics[0]["loss/dsm"] == pytest.approx(first, rel=0.5)  # one step against five


def poisoned_from(step):
    calls = {"count": 0}

    def objective(model, batch, rng, samples_seen):
        calls["count"] += 1
        value = (model(batch.images, torch.ones(len(batch.images)), batch.class_labels) ** 2).sum()
        return {"dsm": Term(value * (float("nan") if calls["count"] > step else 1.0), 1.0)}

    return objective


def train_poisoned(rank, world, tolerated):
    config = CONFIG.train.model_copy(update={"max_nonfinite_in_row": tolerated})
    try:
        train(rank, world, 1, None, poisoned_from(3), config)
    except RunFailed as failure:
        return str(failure)
    return None


def test_nonfinite_losses_stop_the_run_with_a_diagnosis():
    messages = run_workers(train_poisoned, 2, 4)
    assert messages[0] == messages[1]
    assert "step 7: gradients were not finite for 4 steps in a row" in messages[0]
    assert "dsm=nan" in messages[0]
    assert "optimizer.lr" in messages[0]
    assert run_workers(train_poisoned, 1, 100) == [None]
