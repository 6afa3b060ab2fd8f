"""The benchmark of bridges in small: its runs continue, failures are results, its table is true."""

import math
from dataclasses import replace

import pytest

from benchmarks import bridge_step
from benchmarks.bridge_document import Interval, by_recipe, document, draw, table, write_document
from benchmarks.bridge_runs import REJECTION, VARIANTS, Result, Task, own_variant, reduced
from benchmarks.bridges import Store, perform_all, processes_of_groups

RECIPE = "double-well-3"
TINY = (
    "train.iterations=5",
    "control.weighting=inclusive",
    "train.inner_steps=2",
    "train.pairs=64",
    "simulation.paths=16",
    "simulation.steps=30",
    "eval.paths=32",
    "eval.steps=30",
    # a closed form instead of the recipe's grid
    "process.kind=ou",
    "process.height=null",
    "eval.grid=null",
)
DEFAULT, OTHER = "SC2, inclusive, variate", "SC1, geom"


def about(settings: tuple[str, ...]) -> dict:
    return {
        "command": "python benchmarks/bridges.py",
        "date": "2001-02-03",
        "versions": {"torch": "1.2.3"},
        "seeds": 1,
        "share": 0.1,
        "settings": list(settings),
    }


def refuse(*_):
    raise AssertionError("nothing was missing")


def test_every_run_becomes_a_result_that_is_not_made_again(tmp_path):
    wild = (*TINY, "optimizer.lr=1e30")
    tasks = [
        Task(RECIPE, DEFAULT, 0, TINY),
        Task(RECIPE, OTHER, 0, TINY),
        Task(RECIPE, OTHER, 1, wild),
        Task(RECIPE, "Brownian guide", 0, TINY, seconds=0.0),
        Task(RECIPE, REJECTION, 0, TINY, seconds=0.0),
    ]
    store = Store(tmp_path / "results.json")
    store.about = {RECIPE: about(TINY)}
    with processes_of_groups(1) as pool:
        perform_all(tasks, store, pool.submit)
        step = pool.submit(bridge_step.measure, bridge_step.Case(paths=8, steps=20), 1).result()

    again = Store(tmp_path / "results.json")
    perform_all(tasks, again, refuse)
    with pytest.raises(AssertionError, match="missing"):
        perform_all([replace(tasks[0], settings=wild)], again, refuse)

    default, other, diverged, guide, free = again.results()
    assert (default.variant, other.variant, diverged.seed) == (DEFAULT, OTHER, 1)
    for run in (default, other):
        assert (run.iterations, run.steps, run.weighted_paths) == (5, 10, 32)
        assert math.isfinite(run.metrics["kl_from_truth"])
        assert run.failure is None
    assert diverged.metrics == {}
    assert diverged.failure.startswith("diverged: iteration 1: a path left")
    assert guide.metrics["kl_from_truth"] > 0
    assert guide.weighted_paths == 1000
    assert free.metrics["log_p"] == pytest.approx(guide.metrics["log_p"], abs=0.3)

    write_document(again.about, again.results(), tmp_path / "docs" / "bridges.md")
    text = (tmp_path / "docs" / "bridges.md").read_text()
    assert f"| **{DEFAULT}** | " in text
    assert f"| {OTHER} (1 of 2 failed) | " in text
    assert (tmp_path / "docs" / "bridges_kl.png").is_file()

    costs = step["milliseconds"]
    assert set(costs) == {"drift", "calls", "simulation", "targets", "optimizer", "iteration"}
    shown = bridge_step.table(about(()) | {"machine": "m", "repeats": 1, "cases": [step]})
    assert "| OU, 2-D | 8 | 20 | " in shown


def run_of(variant: str, seed: int, kl: float, **changes) -> Result:
    metrics = {"kl_from_truth": kl, "cost": 5 * kl, "ess": 0.5}
    result = Result(RECIPE, variant, seed, "", 10.0 + seed, 100, 100, 1000, metrics)
    return replace(result, **changes)


def test_a_table_has_intervals_over_the_seeds_that_did_not_fail_and_says_which_did():
    lost = {"metrics": {}, "failure": "diverged: iteration 7", "weighted_paths": 0, "steps": 7}
    groups = by_recipe(
        [
            *(run_of(DEFAULT, seed, kl) for seed, kl in enumerate((0.018, 0.019, 0.020))),
            run_of(OTHER, 0, 0.3),
            run_of(OTHER, 1, 0.0, **lost),
            *(run_of("SC1, endpoint", seed, 0.0, **lost) for seed in range(2)),
        ]
    )[RECIPE]
    header, _, default, other, endpoint, _, title, _, *failures = table(
        groups, own=DEFAULT
    ).splitlines()
    assert header == (
        "| variant | KL(truth ‖ model) | cost | ESS, % | paths of ESS, log p | CPU s | steps |"
    )
    # Student: t(0.975, 2) = 4.303, times 0.001 / sqrt(3)
    assert default == (
        f"| **{DEFAULT}** | 0.0190 ± 0.0025 | 0.095 ± 0.012 | 50.0 | 1,000 | 11.0 | 100 |"
    )
    assert other == f"| {OTHER} (1 of 2 failed) | 0.300 | 1.50 | 50.0 | 1,000 | 10.5 | 54 |"
    assert endpoint == "| SC1, endpoint (2 of 2 failed) | – | – | – | – | 10.5 | 7 |"
    assert title == "Failed:"
    assert failures[0] == f"- {OTHER}, seed 1: diverged: iteration 7"
    assert len(failures) == 3


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1.0, 3.0], "2 ± 13"),
        ([100.0, 102.0, 104.0], "102.0 ± 5.0"),
        ([-4.581], "-4.58"),
        ([0.0], "0"),
        ([2.0, 2.0], "2.00"),
    ],
)
def test_numbers_have_as_many_digits_as_they_are_known_to(values, shown):
    assert str(Interval.of(values)) == shown


def test_a_problem_without_truth_has_costs_and_no_figure(tmp_path):
    run = Result(RECIPE, DEFAULT, 0, "", 1.0, metrics={"cost": 2.0, "ess": 0.1, "log_p": -1.0})
    recipes = by_recipe([run])
    assert not draw(recipes, tmp_path / "none.png")
    text = document({RECIPE: about(TINY)}, recipes, figure=False)
    assert "no truth is known" in text
    assert "| 2.00 | 10.0 | -1.00 |" in text


def test_variants_are_the_product_of_losses_with_the_recipe_among_them():
    assert len(VARIANTS) == 2 * 2 * 3 + 2
    settings = reduced(RECIPE, 0.1, ())
    assert own_variant(RECIPE, settings) in VARIANTS
    identities = {Task(RECIPE, variant, 0, settings).identity for variant in VARIANTS}
    assert len(identities) == len(VARIANTS)
