"""An evaluation that was killed goes on where it was, and ends as if nothing had happened."""

import json
import logging

import pytest
import torch

from cdm_ray.config import ImageConfig, build_config
from cdm_ray.evaluation import evaluate as module
from cdm_ray.evaluation import work
from cdm_ray.evaluation.generate import generate
from cdm_ray.networks import build_network
from cdm_ray.storage import path_of


def config(path, **evaluation):
    values = {
        "data": {"path": path, "resolution": 8, "channels": 1, "lanes": 4},
        "network": {
            "model_channels": 8,
            "channel_mult": [1],
            "num_blocks": 1,
            "attn_resolutions": [],
        },
        "sampler": {"ode_steps": 3, "sde_steps": 3},
        "eval": {
            "images": 66,
            "batch": 20,
            "first_seeds": [0, 100],
            "extractor": "digits",
            "kid_subset": 30,
            "grid": 25,
            "drift_images": 12,
            "drift_sigmas": 2,
            **evaluation,
        },
    }
    return build_config(ImageConfig, values)


@pytest.fixture(scope="module")
def weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network(config("x").network, resolution=8, channels=1, label_dim=0)
        return {k: v + 0.05 * torch.randn_like(v) for k, v in network.state_dict().items()}


class Map:
    """In this process; the process "is killed" when `limit` items are done."""

    def __init__(self, limit=None):
        self.limit, self.done = limit, []

    def __call__(self, function, items, description):
        results = []
        for item in items:
            if self.limit is not None and len(self.done) == self.limit:
                raise KeyboardInterrupt
            results.append(function(item))
            self.done.append(description.partition(" (")[0])
        return results


@pytest.fixture(autouse=True)
def _quick_figures(monkeypatch):
    """Drawing takes longer than everything else here together."""

    def drift_figures(drift, folder):
        folder.mkdir(exist_ok=True)
        path = folder / "cp_residual.png"
        path.write_text(json.dumps(drift.curves()))
        return {"cp_residual": path}

    monkeypatch.setattr(module, "drift_figures", drift_figures)


@pytest.fixture
def call(dataset, weights, tmp_path):
    def call(map_tasks, name="out", root=tmp_path, **evaluation):
        return module.evaluate(
            config(dataset.path, **evaluation),
            weights,
            dataset.manifest,
            cache_folder=root / f"cache-{name}",
            out_folder=root / name,
            map_tasks=map_tasks,
        )

    return call


@pytest.fixture
def made(monkeypatch):
    """First seeds of every batch that was generated without looking at the drift."""
    seeds = []

    def counting(network, config, batch, *args):
        seeds.append(batch[0])
        return generate(network, config, batch, *args)

    monkeypatch.setattr(work, "generate", counting)
    return seeds


def contents(result):
    return {path.name: path.read_bytes() for path in result.folder.iterdir()}


# Reference features, their statistics, the real images of 7 shards; then 1 task of real images and
# 4 each of 2 samplers and 2 ranges; then a score of each of these.
BEFORE, TASKS, SCORES = 2 + 7, 17, 4


@pytest.mark.parametrize("limit", [1, BEFORE + 1, BEFORE + 12, BEFORE + TASKS + 1])
def test_a_killed_evaluation_repeats_nothing_and_ends_with_the_same_bytes(call, made, limit):
    whole = Map()
    undisturbed = call(whole, "undisturbed")
    assert len(whole.done) == BEFORE + TASKS + SCORES
    expected = sorted(made)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        call(Map(limit))
    rest = Map()
    result = call(rest)
    assert sorted(made) == expected
    assert rest.done == whole.done[limit:]
    assert result.metrics == undisturbed.metrics
    assert contents(result) == contents(undisturbed)


def test_at_a_url_it_continues_and_ends_with_the_same_bytes(call, memory):
    with pytest.raises(KeyboardInterrupt):
        call(Map(BEFORE + 12), root=path_of(memory))
    rest = Map()
    result = call(rest, root=path_of(memory))
    assert len(rest.done) == TASKS + SCORES - 12
    assert contents(result) == contents(call(Map(), "undisturbed"))
    assert [path.name for path in result.folder.parent.iterdir()] == [result.folder.name]


def test_killed_again_and_again_it_gets_there(call, made):
    undisturbed = call(Map(), "undisturbed")
    expected = sorted(made)
    made.clear()
    for limit in [BEFORE + 1, *[1] * (TASKS + SCORES - 2)]:
        with pytest.raises(KeyboardInterrupt):
            call(Map(limit))
    assert call(Map(1)).metrics == undisturbed.metrics  # the last score is left to do
    assert sorted(made) == expected


def test_a_damaged_part_is_computed_again_with_a_warning(call, made, tmp_path, caplog):
    undisturbed = call(Map(), "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        call(Map(18))
    parts = sorted(tmp_path.glob("out/parts-*/*.safetensors"))
    parts[3].write_bytes(parts[3].read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        result = call(Map())
    assert parts[3].name in caplog.text
    assert result.metrics == undisturbed.metrics
    assert not list(tmp_path.glob("out/parts-*"))


def test_other_settings_do_not_mix_with_what_a_kill_left(call, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        call(Map(15))
    result = call(Map(), first_seeds=[50, 100])
    assert result.metrics == call(Map(), "undisturbed", first_seeds=[50, 100]).metrics
    assert len(list(tmp_path.glob("out/parts-*"))) == 1  # those of the first are still there


def test_a_repeated_evaluation_is_answered_from_its_results(call):
    first = call(Map())
    again = Map()
    assert call(again) == first
    assert again.done == []


def test_an_evaluation_with_other_settings_leaves_the_first_ones_results(call, tmp_path):
    first = call(Map(), first_seeds=[0])
    before = contents(first)
    second = call(Map(), first_seeds=[1])
    assert first.folder.parent == second.folder.parent == tmp_path / "out"
    assert contents(first) == before
    assert second.metrics["fd_digits_ode"] != first.metrics["fd_digits_ode"]


@pytest.mark.parametrize("damage", ["truncated", "no metrics", "no grid"])
def test_damaged_results_are_reported_and_computed_again(call, caplog, damage):
    first = call(Map(), first_seeds=[0])
    before = contents(first)
    path = first.folder / "results.json"
    if damage == "truncated":
        path.write_text(path.read_text()[:100])
    elif damage == "no metrics":
        path.write_text(json.dumps({"first_seeds": [0]}))
    else:
        first.grids["ode"].unlink()
    with caplog.at_level(logging.WARNING):
        again = call(Map(), first_seeds=[0])
    assert "evaluating again" in caplog.text
    assert contents(again) == before
