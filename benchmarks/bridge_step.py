"""What an iteration of a bridge's training costs, and how it grows.

`python benchmarks/bridge_step.py` measures one process with one thread, writes
benchmarks/results/bridge_step.json and prints a table, which `python benchmarks/bridges.py --table`
puts into docs/bridges.md. `--quick` only shows that it works.

The worker's simulation (its noise and the check of its paths included) is timed in turn with the
bare evaluation of the drift at the same states, one call per time step. Goal: at most 1.3 times it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.alone import Training, group_of_one
from cdm_ray.config import BridgeConfig, load_config
from cdm_ray.networks.control import BridgeControl
from cdm_ray.processes.simulation import Paths
from cdm_ray.randomness import BlockRng

RESULTS = Path(__file__).parent / "results" / "bridge_step.json"
COMMAND = "python benchmarks/bridge_step.py"
GOAL = 1.3
REPEATS = 9
PATHS, STEPS, DIM = 128, 200, 2
"""Where one of the three is varied, the others are these."""


@dataclass(frozen=True)
class Case:
    """A size of the problem; `dim` None: the recipe double-well-3, else OU from 1 to -1."""

    dim: int | None = DIM
    paths: int = PATHS
    steps: int = STEPS

    @property
    def problem(self) -> str:
        return "double well" if self.dim is None else f"OU, {self.dim}-D"

    def config(self) -> BridgeConfig:
        sizes = [f"simulation.paths={self.paths}", f"simulation.steps={self.steps}"]
        if self.dim is None:
            return load_config(BridgeConfig, "double-well-3", sizes)
        ends = [f"bridge.start={[1.0] * self.dim}", f"bridge.end={[-1.0] * self.dim}"]
        return load_config(BridgeConfig, None, ["process.kind=ou", *ends, *sizes])


CASES = [
    Case(dim=None),
    *(Case(dim=dim) for dim in (DIM, 5, 20, 100)),
    *(Case(paths=paths) for paths in (32, 64, 256, 512)),
    *(Case(steps=steps) for steps in (100, 500, 1000)),
]
QUICK = [Case(dim=None, paths=8, steps=20), Case(paths=8, steps=20)]


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """CPU time of the parts of an iteration, and the ratio of the simulation to the bare drift: all
    in turn, `repeats` times, medians and ranges. This process must be in a group."""
    config = case.config()
    training = Training(config)
    run = training.run
    training.advance(config.train.inner_steps)  # warm-up; sets the anneals
    (step,) = next(run.passes(training.engine, 0))
    batch = step.batch
    lanes = range(config.simulation.lanes)
    rng = BlockRng.for_lanes(config.run.seed, 1, lanes, torch.device("cpu"))
    parts: dict[str, Callable[[], object]] = {
        "drift": lambda: bare_drift(run.average, batch.paths),
        "calls": lambda: bare_calls(run.average, batch.paths),
        "simulation": lambda: run.draw_paths(rng, 1),
        "targets": lambda: run.consistency.targets(run.average, batch.paths),
        "optimizer": lambda: training.learn(batch, rng),
        "iteration": lambda: training.advance(config.train.inner_steps),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(-1, repeats):  # the first is warm-up
        for name in parts if repeat % 2 else reversed(parts):
            begin = time.process_time()
            parts[name]()
            if repeat >= 0:
                times[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "problem": case.problem,
        "paths": case.paths,
        "steps": case.steps,
        "inner_steps": config.train.inner_steps,
        "pairs": config.pairs,
        "path_steps_per_second": case.paths * case.steps / medians["simulation"],
        "simulation_over_drift": ratios(times["simulation"], times["drift"]),
        "simulation_over_calls": ratios(times["simulation"], times["calls"]),
        "milliseconds": {name: 1000 * value for name, value in medians.items()},
    }


def ratios(top: list[float], bottom: list[float]) -> dict[str, float]:
    """Median and range of the ratios within the repeats."""
    values = [a / b for a, b in zip(top, bottom, strict=True)]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


@torch.no_grad()
def bare_drift(control: BridgeControl, paths: Paths) -> None:
    """The drift at the states of paths, one call per time step."""
    for x, t in zip(paths.states[:-1], paths.times[:-1], strict=True):
        control.drift(x, t)


@torch.no_grad()
def bare_calls(control: BridgeControl, paths: Paths) -> None:
    """The calls that the simulation makes, at the states of paths."""
    rest = control.rest_on(paths.times)
    for k, x in enumerate(paths.states[:-1]):
        rest(x, k)


def table(measured: dict[str, Any]) -> str:
    """Markdown: a line for each case."""
    versions = ", ".join(f"{name} {number}" for name, number in measured["versions"].items())
    largest = max(case["simulation_over_drift"]["median"] for case in measured["cases"])
    shape = measured["cases"][0]
    lines = [
        f"Medians (ranges) of {measured['repeats']} repeats, everything in turn; CPU time of one "
        f"process with one thread on {measured['machine']}; {versions}; {measured['date']}. "
        "Simulation / drift is the time of the worker's simulation, noise and checks included, "
        "over that of the bare drift at the same states, one call per time step: at most "
        f"{largest:.2f}, goal {GOAL}. The simulation computes what depends on the time alone at "
        "once for all steps; simulation / calls is its time over that of its own network calls "
        "alone. An iteration, measured as a whole, has one simulation, one sweep for the targets "
        f"and {shape['inner_steps']} optimizer step(s) on {shape['pairs']:,} (path, time) pairs in "
        f"the first line. By `{measured['command']}`.",
        "",
        "| problem | paths | steps | simulation / drift | simulation / calls "
        "| path-steps per second | simulation, ms | targets, ms | optimizer step, ms "
        "| iteration, ms |",
        "|---" * 10 + "|",
    ]
    for case in measured["cases"]:
        parts = case["milliseconds"]
        costs = [parts[name] for name in ("simulation", "targets", "optimizer", "iteration")]
        cells = [
            case["problem"],
            str(case["paths"]),
            str(case["steps"]),
            *(spread(case[f"simulation_over_{what}"]) for what in ("drift", "calls")),
            f"{case['path_steps_per_second']:,.0f}",
            *(f"{cost:.1f}" for cost in costs),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def measure_all(cases: list[Case], repeats: int) -> dict[str, Any]:
    """Every case after the other, with what a reader has to know of the measurement."""
    with group_of_one():
        found = [measure(case, repeats) for case in cases]
    return {
        "date": datetime.date.today().isoformat(),
        "command": COMMAND,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "repeats": repeats,
        "cases": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes nothing")
    if parser.parse_args().quick:
        print(table(measure_all(QUICK, 1)))
        return
    measured = measure_all(CASES, REPEATS)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(measured, indent=1))
    print(table(measured))


if __name__ == "__main__":
    main()
