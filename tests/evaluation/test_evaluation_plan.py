import pytest
import torch

from cdm_ray.config import ImageConfig, build_config
from cdm_ray.data.manifest import Manifest
from cdm_ray.evaluation.features import load_extractor
from cdm_ray.evaluation.frechet import GivenMoments
from cdm_ray.evaluation.plan import evaluation_key, item_seeds, plan


def config(sections=None, **evaluation):
    values = {
        "data": {"resolution": 8, "channels": 1, "lanes": 4},
        "network": {"channel_mult": [1], "attn_resolutions": []},
        "eval": {"extractor": "digits", **evaluation},
    }
    for name, section in (sections or {}).items():
        values[name] = values.get(name, {}) | section
    return build_config(ImageConfig, values)


@pytest.mark.parametrize(
    ("images", "batch", "tasks"),
    [(5000, 100, 17), (50_000, 256, 49), (1000, 256, 4), (10, 256, 1), (257, 256, 2)],
)
def test_every_image_of_every_range_is_in_exactly_one_task_of_a_few_batches(images, batch, tasks):
    items = plan(config(images=images, batch=batch, first_seeds=[0, 50_000]), real_images=130)
    for source, seed_range in [("sde", 0), ("sde", 1), ("ode", 0), ("ode", 1)]:
        rows = [i.rows for i in items if (i.source, i.seed_range) == (source, seed_range)]
        assert [index for part in rows for index in part] == list(range(images))
        assert len(rows) == tasks
        assert max(map(len, rows)) <= 4 * batch
    real = [index for item in items if item.source == "data" for index in item.rows]
    assert real == list(range(130))


def test_the_longest_tasks_come_first():
    sampler = {"ode_steps": 40, "sde_steps": 20}
    sources = [item.source for item in plan(config({"sampler": sampler}, images=10), 10)]
    assert sources == ["data", "ode", "sde"]
    sources = [item.source for item in plan(config({"sampler": {"ode_steps": 3}}, images=10), 10)]
    assert sources == ["data", "sde", "ode"]


def test_seeds_count_from_the_first_of_their_range():
    cfg = config(images=500, batch=100, first_seeds=[7, 50_000])
    items = [item for item in plan(cfg, 2) if item.source == "ode"]
    seeds = [seed for item in items for seed in item_seeds(cfg.eval, item, item.rows)]
    assert seeds == [*range(7, 507), *range(50_000, 50_500)]


def key(cfg, weights=None, fingerprint="a", reference=None):
    manifest = Manifest(
        resolution=8,
        channels=1,
        shards=({"name": "s.tar", "samples": 2, "sha256": "0" * 64},),
        fingerprint=fingerprint * 64,
    )
    weights = weights or {"w": torch.ones(3)}
    return evaluation_key(cfg, weights, manifest, load_extractor(cfg.eval, "cpu"), reference)


def test_the_key_changes_with_whatever_determines_the_numbers():
    zero = torch.zeros(2, dtype=torch.float64).numpy()
    keys = [
        key(config()),
        key(config(), weights={"w": torch.tensor([1.0, 1.0, 2.0])}),
        key(config(), fingerprint="b"),
        key(config(), reference=GivenMoments(zero, zero)),
        key(config(), reference=GivenMoments(zero + 1, zero)),
        key(config(images=100)),
        key(config(batch=100)),
        key(config(first_seeds=[1])),
        key(config(kid_subset=10)),
        key(config(pr_images=10)),
        key(config(drift_images=10)),
        key(config({"sampler": {"ode_steps": 17}})),
        key(config({"sampler": {"epsilon_scale": 1.001}})),
        key(config({"network": {"sigma_data": 0.4}})),
    ]
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_change_with_what_does_not():
    others = [
        key(config({"run": {"name": "x"}})),
        key(config({"ray": {"workers": 2}})),
        key(config({"data": {"path": "elsewhere"}})),
        key(config({"sampler": {"kind": "sde"}})),
        key(config({"network": {"activation_checkpointing": True}})),
        key(config(every_kimg=10)),
        key(config(extractor_file="unused.pt")),
        key(config(), weights={"w": torch.ones(3)}),
    ]
    assert set(others) == {key(config())}
