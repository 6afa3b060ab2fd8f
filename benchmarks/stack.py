"""What the stack costs: whole stack against bare PyTorch, CP against DSM, streaming against
plain WebDataset. `python benchmarks/stack.py` writes benchmarks/results/stack.json and a table.

Expected before measuring: stack / bare 0.95 or better (DeepSpeed's bookkeeping and one thread of
decoding against steps of 100 ms and more); recommended CP 1.5 (3 + 6f forward passes on f = 1/4
against 3); released CP 6.33 (19 against 3).

All variants of a network run in one Ray Train worker process, one thread, in turn: each repeat
times every variant once, ratios are taken within a repeat, and the table gives their median and
range.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from readme import put_into_readme
from streaming import measure as measure_streaming

from cdm_ray import cluster
from cdm_ray.checkpoint import TrainingState
from cdm_ray.config import CPConfig, ImageConfig, build_config, load_config
from cdm_ray.data.manifest import Manifest
from cdm_ray.data.prepare import ensure_prepared
from cdm_ray.data.stream import LaneStream
from cdm_ray.objectives.cp import forward_units
from cdm_ray.objectives.image import ImageObjective
from cdm_ray.training.engine import Engine
from cdm_ray.training.image_worker import image_batch, random_network, step_passes
from cdm_ray.training.lanes import deal_lanes, micro_steps
from cdm_ray.training.launch import train
from cdm_ray.training.loop import run_loop
from cdm_ray.training.rates import image_rates

RESULTS = Path(__file__).parent / "results" / "stack.json"
REPEATS = 15
REPEATS_CP = 5
"""Fewer, since the released setting takes six times as long."""
RELEASED = load_config(ImageConfig, "cifar10-cond-faithful").cp
RATIOS = {
    "stack_speed_ratio": "speed of the whole stack / bare PyTorch, DSM",
    "cp_recommended_time_ratio": "time of DSM + CP as recommended / DSM",
    "cp_released_time_ratio": "time of DSM + CP as in the released code / DSM",
    "wall_ratio": "speed of lane streaming / plain WebDataset, elapsed time",
    "cpu_ratio": "speed of lane streaming / plain WebDataset, CPU time",
}
NETWORKS = {
    "32x32": (
        4,  # steps in a timed block
        [
            "data.resolution=32",
            "data.channels=3",
            "eval.extractor=inception",
            "eval.extractor_file=unused",
            "network.model_channels=32",
            "network.channel_mult=[1,2]",
            "network.attn_resolutions=[16]",
            "train.batch=32",
        ],
    ),
    "digits recipe": (20, []),
}


class SilentHooks:
    def record(self, record: Any) -> None: ...

    def after_step(self, state: Any) -> None: ...


def stack_variant(config: ImageConfig, manifest: Manifest, cp: CPConfig) -> Callable[[int], None]:
    """The project's own step: lane stream, objective, DeepSpeed engine, loop."""
    lanes = list(range(config.data.lanes))
    schedule = micro_steps(deal_lanes(len(lanes), 1), 0, None)
    engine = Engine(
        random_network(config, manifest),
        config.optimizer,
        zero_stage=config.train.zero_stage,
        precision="fp32",
        micro_steps=1,
    )
    stream = LaneStream(
        config.data, manifest, seed=0, lanes=lanes, lane_batch=config.lane_batch, start_step=0
    )
    passes = step_passes(config, stream, schedule, lanes, manifest, engine.device, 0)
    objective = ImageObjective(config.dsm, cp, config.network.sigma_data)
    state = TrainingState(0, 0, 0)

    def advance(steps: int) -> None:
        nonlocal state
        state = run_loop(
            engine,
            objective,
            passes,
            state,
            last_step=state.step + steps,
            batch=config.train.batch,
            train=config.train,
            rates=lambda state: image_rates(config, state.samples_seen),
            hooks=SilentHooks(),
        )

    return advance


def bare_variant(config: ImageConfig, manifest: Manifest) -> Callable[[int], None]:
    """The shortest DSM loop in plain PyTorch: data in memory, fused Adam, foreach average."""
    network = random_network(config, manifest)
    weights = list(network.parameters())
    averages = [w.detach().clone() for w in weights]
    optimizer = torch.optim.Adam(weights, lr=config.optimizer.lr, fused=True)
    batches = cycle(_batches_in_memory(config, manifest, 8))
    seen, batch = 0, config.train.batch

    def advance(steps: int) -> None:
        nonlocal seen
        for _ in range(steps):
            data = next(batches)
            sigma = (torch.randn(batch) * config.dsm.p_std + config.dsm.p_mean).exp()
            noisy = data.images + sigma.view(-1, 1, 1, 1) * torch.randn_like(data.images)
            error = network(noisy, sigma, data.class_labels) - data.images
            weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
            loss = (weight.view(-1, 1, 1, 1) * error**2).sum() / batch
            optimizer.zero_grad()
            loss.backward()
            rates = image_rates(config, seen)
            optimizer.param_groups[0]["lr"] = rates.lr
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - rates.ema_beta)
            seen += batch

    return advance


def _batches_in_memory(config: ImageConfig, manifest: Manifest, count: int) -> list[Any]:
    lanes = list(range(config.data.lanes))
    with LaneStream(
        config.data, manifest, seed=0, lanes=lanes, lane_batch=config.lane_batch
    ) as stream:
        raws = [next(iter(stream)) for _ in range(count)]
    rows = slice(0, config.train.batch)
    return [image_batch(raw, rows, manifest.num_classes, torch.device("cpu")) for raw in raws]


def measuring_worker(options: dict[str, Any]) -> dict[str, Any]:
    """Measures every variant, and writes images per second, one entry for each repeat."""
    config = build_config(ImageConfig, options["assignment"].config)
    block = json.loads(config.run.name.split("_", 1)[1])
    manifest = Manifest.load(config.data.path)
    bare = bare_variant(config, manifest)
    dsm = stack_variant(config, manifest, CPConfig(weight=0))
    recommended = stack_variant(config, manifest, config.cp)
    slow = stack_variant(config, manifest, RELEASED)
    speeds = {
        "stack": alternate({"bare": bare, "dsm": dsm}, REPEATS, block, config.train.batch),
        "cp": alternate(
            {"dsm": dsm, "recommended": recommended, "released": slow},
            REPEATS_CP,
            block,
            config.train.batch,
        ),
    }
    path = config.run_folder / "speeds.json"
    path.write_text(json.dumps(speeds))
    return {"pace": None}


def alternate(
    variants: dict[str, Callable[[int], None]], repeats: int, block: int, batch: int
) -> dict[str, list[float]]:
    """Images per second of blocks of steps, the variants in turn and in alternating order."""
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(-1, repeats):  # the first is warm-up
        for name in list(variants) if repeat % 2 else reversed(variants):
            start = time.perf_counter()
            variants[name](block)
            if repeat >= 0:
                speeds[name].append(batch * block / (time.perf_counter() - start))
    return speeds


def ratios(top: list[float], bottom: list[float]) -> dict[str, float]:
    """Median and range of the ratios within the repeats."""
    values = [a / b for a, b in zip(top, bottom, strict=True)]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure_steps(name: str, block: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    config = load_config(
        ImageConfig,
        "digits",
        [
            *overrides,
            f"data.path={folder / name.replace(' ', '-')}",
            f"run.storage={folder}",
            f"run.name=block_{block}",
            "ray.workers=1",
            "train.log_every=1000000",
        ],
    ).resolved()
    manifest = ensure_prepared(config.data, cluster.map_tasks)
    config.run_folder.mkdir(parents=True, exist_ok=True)
    train(config, measuring_worker, None)
    speeds = json.loads((config.run_folder / "speeds.json").read_text())
    stack, cp = speeds["stack"], speeds["cp"]
    parameters = sum(p.numel() for p in random_network(config, manifest).parameters())
    return {
        "parameters": parameters,
        "batch": config.train.batch,
        "images_per_second": {
            part: {name: statistics.median(values) for name, values in group.items()}
            for part, group in speeds.items()
        },
        "stack_speed_ratio": ratios(stack["dsm"], stack["bare"]),
        "cp_recommended_time_ratio": ratios(cp["dsm"], cp["recommended"])
        | {"operations": forward_units(config.cp) / 3},
        "cp_released_time_ratio": ratios(cp["dsm"], cp["released"])
        | {"operations": forward_units(RELEASED) / 3},
    }


def main() -> None:
    measured: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/stack.py",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads seen by torch",
        "versions": {n: version(n) for n in ("torch", "ray", "deepspeed", "webdataset")},
        "repeats": f"{REPEATS} (CP: {REPEATS_CP})",
    }
    with tempfile.TemporaryDirectory(prefix="stack") as folder:
        with cluster.connected(load_config(ImageConfig, "digits", ["ray.workers=1"]).ray):
            for name, (block, overrides) in NETWORKS.items():
                measured[name] = measure_steps(name, block, overrides, Path(folder))
        measured["streaming"] = measure_streaming()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(measured, indent=1))
    text = table(measured)
    put_into_readme("stack table", text)
    print(text)


def table(measured: dict[str, Any]) -> str:
    """Markdown: median and range of every ratio, beside what the operations say."""
    versions = ", ".join(f"{name} {number}" for name, number in measured["versions"].items())
    lines = [
        f"Medians (ranges) of {measured['repeats']} repeats side by side on {measured['machine']}; "
        f"{versions}; {measured['date']}. By `{measured['command']}`.",
        "",
        "| network | what | measured | by operations |",
        "|---|---|---|---|",
    ]
    for name in (*NETWORKS, "streaming"):
        for what, value in measured[name].items():
            if what in RATIOS:
                spread = f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
                operations = f"{value['operations']:.2f}" if "operations" in value else ""
                lines.append(f"| {name} | {RATIOS[what]} | {spread} | {operations} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
