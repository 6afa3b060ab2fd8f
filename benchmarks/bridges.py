"""Every variant of the control-consistency loss on every bridge, and rivals at equal time.

`python benchmarks/bridges.py` trains each recipe of recipes/bridges (less those that end in -long)
in all variants with `--seeds` seeds, at a share of the recipe's iterations, then gives rivals that
need no training as many CPU seconds as the recipe's own variant trained for. Each result goes into
benchmarks/results/bridges.json at once, so that the same command continues what was interrupted;
a result is made again when the configuration behind it has changed (after a change of the code,
remove the file). Recipes may be measured by several commands, each with its own `--share`. Last it
writes docs/bridges.md and its figure; `--table` does only that.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.alone import join_group_of_one
from benchmarks.bridge_document import write_document
from benchmarks.bridge_runs import (
    REJECTION,
    RIVALS,
    VARIANTS,
    Result,
    Task,
    own_variant,
    perform,
    prepare,
    reduced,
)
from cdm_ray.config import BridgeConfig, recipe_names

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bridges.json"
DOCUMENT = ROOT / "docs" / "bridges.md"
COMMAND = "python benchmarks/bridges.py"
VERSIONS = ("torch", "deepspeed")

SHARE = 0.2
"""Of a recipe's iterations."""
SETTINGS = ("eval.paths=1000", "eval.steps=200")
"""What differs from the recipes in all variants."""


class Store:
    """Results in a JSON file, which is whole at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.about: dict[str, Any] = {}
        """What was measured by recipe, as `main` writes it."""
        self._results: dict[tuple[str, str, int], Result] = {}
        if path.is_file():
            content = json.loads(path.read_text())
            self.about = content["about"]
            for values in content["results"]:
                self._keep(Result(**values))

    def _keep(self, result: Result) -> None:
        self._results[result.key] = result

    def add(self, result: Result) -> None:
        self._keep(result)
        self.save()

    def save(self) -> None:
        content = {"about": self.about, "results": [asdict(r) for r in self._results.values()]}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1))
        os.replace(part, self._path)

    def has(self, task: Task) -> bool:
        found = self._results.get((task.recipe, task.variant, task.seed))
        return found is not None and found.identity == task.identity

    def results(self) -> list[Result]:
        """In the order of recipes and variants."""
        order = [*VARIANTS, *RIVALS, REJECTION]
        names = list(self.about)
        return sorted(
            (r for r in self._results.values() if r.recipe in names and r.variant in order),
            key=lambda r: (names.index(r.recipe), order.index(r.variant), r.seed),
        )

    def mean_seconds(self, recipe: str, variant: str) -> float:
        """Of the training of a variant; of all variants if it is not there."""
        trained = [r for r in self._results.values() if r.recipe == recipe and r.steps]
        chosen = [r for r in trained if r.variant == variant] or trained
        return statistics.mean(r.seconds for r in chosen)


def rival_tasks(store: Store, recipes: dict[str, tuple[str, ...]], seeds: int) -> list[Task]:
    tasks = []
    for recipe, settings in recipes.items():
        seconds = round(store.mean_seconds(recipe, own_variant(recipe, settings)), 1)
        tasks += [
            Task(recipe, rival, seed, settings, seconds)
            for rival in (*RIVALS, REJECTION)
            for seed in range(seeds)
        ]
    return tasks


def perform_all(tasks: list[Task], store: Store, submit: Callable[..., Future[Result]]) -> None:
    """What the store does not have yet, each result kept as soon as it is there."""
    missing = [task for task in tasks if not store.has(task)]
    futures = {submit(perform, task) for task in missing}
    for number, future in enumerate(as_completed(futures), 1):
        result = future.result()
        store.add(result)
        shown = ("kl_from_truth", "ess", "log_p")
        numbers = [f"{name} {result.metrics[name]:.4g}" for name in shown if name in result.metrics]
        what = result.failure or ", ".join(numbers)
        name = f"{result.recipe}: {result.variant}, seed {result.seed}"
        print(f"{number}/{len(missing)} {name}: {what}, {result.seconds:.1f} s", flush=True)


@contextmanager
def processes_of_groups(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that can train, each by itself; at the end only what has begun is waited for."""
    forkserver.set_forkserver_preload(["torch", "deepspeed"])  # imported once, not by each
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it on import
    forkserver.ensure_running()
    del os.environ["DS_ACCELERATOR"]
    pool = ProcessPoolExecutor(
        count, mp_context=get_context("forkserver"), initializer=join_group_of_one
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    shipped = [name for name in recipe_names(BridgeConfig) if not name.endswith("-long")]
    parser.add_argument("--recipes", nargs="+", default=shipped)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--share", type=float, default=SHARE, help="of a recipe's iterations")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="section.field=value", help="for all runs"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--table", action="store_true", help="only write the document")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    store = Store(given.results)
    if given.table and not store.about:
        sys.exit(f"{given.results}: nothing is measured yet; leave --table out")
    if not given.table:
        common = (*SETTINGS, *given.set)
        recipes = {name: reduced(name, given.share, common) for name in given.recipes}
        for name, settings in recipes.items():
            store.about[name] = {
                "command": shlex.join([*COMMAND.split(), *sys.argv[1:]]),
                "date": datetime.date.today().isoformat(),
                "versions": {name: version(name) for name in VERSIONS},
                "seeds": given.seeds,
                "share": given.share,
                "settings": settings,
            }
        tasks = [
            Task(recipe, variant, seed, settings)
            for recipe, settings in recipes.items()
            for variant in given.variants
            for seed in range(given.seeds)
        ]
        with processes_of_groups(given.processes) as pool:
            list(pool.map(prepare, recipes, recipes.values()))
            perform_all(tasks, store, pool.submit)
            perform_all(rival_tasks(store, recipes, given.seeds), store, pool.submit)
    write_document(store.about, store.results(), given.document)


if __name__ == "__main__":
    main()
