"""What a person sees while a sweep runs: on a terminal a table, in a log a line for each report."""

from __future__ import annotations

import atexit
import math
from collections.abc import Sequence
from typing import Any

from ray.tune import Callback
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cdm_ray.sweep.summary import Mode
from cdm_ray.sweep.trials import RUNG, shown_of

MOST_ROWS = 24
"""Of the table: the running trials and the best of the others."""


class LiveTable(Callback):
    """Shows the trials and the best so far. Tune gives it all trials with their last results every
    time, those of a sweep that is continued too."""

    def __init__(self, metric: str, mode: Mode, rungs: int) -> None:
        self._metric, self._rungs = metric, rungs
        self._sign = 1.0 if mode == "min" else -1.0
        self._total = 0
        self._live: Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_live": None}  # Tune keeps a copy, of which a screen is no part

    def setup(self, *args: Any, **info: Any) -> None:
        del args
        self._total = info["total_num_samples"]
        console = Console()
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
            atexit.register(self._live.stop)  # after Ctrl-C too: it hides the cursor

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        del iteration, info
        self._show(trials, f"{shown_of(trial.config)}: started")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        del iteration, info
        value = result[self._metric]
        told = f"rung {result[RUNG]}/{self._rungs}, {self._metric} {value:.4g}"
        self._show(
            trials, f"{shown_of(trial.config)}: {told if math.isfinite(value) else 'failed'}"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        del iteration, info
        rung = trial.last_result.get(RUNG, 0)
        how = "ended" if rung == self._rungs else f"pruned at rung {rung}/{self._rungs}"
        self._show(trials, f"{shown_of(trial.config)}: {how}", trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        del iteration, info
        self._show(trials, f"{shown_of(trial.config)}: failed", trial)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        del trials, info
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, trials: Sequence[Any], line: str, ending: Any = None) -> None:
        # Tune tells of the end of a trial before it gives it the status.
        ended = sum(trial.is_finished() or trial is ending for trial in trials)
        head = f"{ended}/{self._total} trials"
        if (best := self._best(trials)) is not None:
            head += f", best so far {self._value(best):.4g}: {shown_of(best.config)}"
        if self._live is None:
            print(f"[{head}] {line}", flush=True)
        else:
            self._live.update(self._table(trials, head), refresh=True)

    def _table(self, trials: Sequence[Any], title: str) -> Table:
        table = Table(title=title)
        for column in ("trial", "state", "rung", self._metric):
            table.add_column(column, justify="left" if column == "trial" else "right")
        shown = sorted(trials, key=lambda t: (t.status != "RUNNING", self._rank(t)))
        for trial in shown[:MOST_ROWS]:
            value = self._value(trial)
            table.add_row(
                shown_of(trial.config),
                trial.status.lower(),
                f"{trial.last_result.get(RUNG, 0)}/{self._rungs}",
                "–" if math.isnan(value) else f"{value:.4g}",
            )
        if len(shown) > MOST_ROWS:
            table.caption = f"and {len(shown) - MOST_ROWS} more"
        return table

    def _best(self, trials: Sequence[Any]) -> Any | None:
        """Of the trials that were run to their end."""
        whole = [t for t in trials if t.last_result.get(RUNG) == self._rungs]
        finite = [t for t in whole if math.isfinite(self._value(t))]
        return min(finite, key=self._rank, default=None)

    def _rank(self, trial: Any) -> float:
        value = self._value(trial)
        return self._sign * value if math.isfinite(value) else math.inf

    def _value(self, trial: Any) -> float:
        return float(trial.last_result.get(self._metric, math.nan))
