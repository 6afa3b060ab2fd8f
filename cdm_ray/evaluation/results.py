"""What an evaluation found: `results.json` and the figures beside it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from cdm_ray.evaluation.generate import KINDS
from cdm_ray.storage import AnyPath, write_whole

log = logging.getLogger(__name__)

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers by name; figures and sample grids as PNG files by name, in `folder`.

    `ranges` has, by the names of metrics that are means over ranges of seeds, the value of each
    range, in the order of `first_seeds`.
    """

    folder: AnyPath
    metrics: dict[str, float]
    first_seeds: tuple[int, ...]
    ranges: dict[str, list[float]]
    figures: dict[str, AnyPath]
    grids: dict[str, AnyPath]

    def save(self, facts: dict[str, Any]) -> None:
        """Write `results.json`, last of all files, with facts about what was evaluated."""
        content = {
            "metrics": self.metrics,
            "first_seeds": self.first_seeds,
            "ranges": self.ranges,
            "figures": {name: path.name for name, path in self.figures.items()},
            "grids": {name: path.name for name, path in self.grids.items()},
        }
        text = json.dumps(content | facts, indent=1) + "\n"
        write_whole(self.folder / RESULTS_NAME, text.encode())

    @classmethod
    def find(cls, folder: AnyPath) -> EvaluationResult | None:
        """The result in a folder; None, with a warning if it is damaged, when it is not whole."""
        path = folder / RESULTS_NAME
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
            figures, grids = (
                {name: folder / file for name, file in content[kind].items()}
                for kind in ("figures", "grids")
            )
            result = cls(
                folder,
                content["metrics"],
                tuple(content["first_seeds"]),
                content["ranges"],
                figures,
                grids,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is damaged (%s); evaluating again", path, error)
            return None
        missing = [file for file in (*figures.values(), *grids.values()) if not file.is_file()]
        if missing:
            log.warning("%s is missing; evaluating again", missing[0])
            return None
        return result


def print_evaluation(result: EvaluationResult) -> None:
    """Table of the metrics with every range's own values and all counts; where the files are."""
    metrics, images = result.metrics, int(result.metrics["fd_images"])
    console = Console(width=None if Console().is_terminal else 120)
    table = Table(title="averaged weights")
    several = len(result.first_seeds) > 1
    table.add_column("metric")
    for column in ("mean", "min") if several else ("value",):
        table.add_column(column, justify="right")
    for first in result.first_seeds if several else ():
        table.add_column(f"seeds {first:,}-{first + images - 1:,}", justify="right")
    for name, values in result.ranges.items():
        cells = [_number(metrics[name])]
        if several:
            smallest = metrics.get(f"{name}_min")
            cells.append("" if smallest is None else _number(smallest))
            cells += map(_number, values)
        table.add_row(name, *cells)
    table.add_row("cp_residual", f"{metrics['cp_residual']:.2e} ± {metrics['cp_residual_se']:.0e}")
    console.print(table)
    reference = metrics.get("fd_reference_images")
    real = "an unstated number of" if reference is None else f"{int(reference):,}"
    nfe = ", ".join(f"{int(metrics[f'nfe_{kind}'])} ({kind})" for kind in KINDS)
    seeds = " of each range of seeds" if several else ""
    print(f"distances    {images:,} generated images{seeds} against {real} real ones")
    print(f"kernel       mean over subsets of {int(metrics['kid_subset']):,} images")
    print(f"prec/recall  {int(metrics['pr_images']):,} generated and as many real images")
    print(f"drift        {int(metrics['drift_images']):,} images")
    print(f"NFE          network evaluations per image: {nfe}")
    print(f"results      {result.folder / RESULTS_NAME}")
    for name, path in (result.grids | result.figures).items():
        print(f"{name:12} {path}")


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"
