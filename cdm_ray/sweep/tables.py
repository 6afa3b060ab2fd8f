"""A sweep's summary as text: CSV of all trials, Markdown of all settings."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from cdm_ray.sweep.importance import Importance
from cdm_ray.sweep.settings import show_setting, show_value
from cdm_ray.sweep.summary import Row, Summary


def csv_text(summary: Summary) -> str:
    """All trials, a line each: axes, metric, seed, status, cost, other metrics."""
    known = {name for trial in summary.trials for name in trial.metrics}
    others = sorted(known - {summary.metric})
    cost = ["device_seconds", "held_seconds"]
    own = ["seed", "status", summary.metric, "optimizer_steps", *cost, "run", "failure"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*summary.fields, *own, *others])
    for t in summary.trials:
        setting = [t.setting.get(name) for name in summary.fields]
        facts = [t.seed, t.status, t.metric, t.steps, t.device_seconds, t.held_seconds]
        own_metrics = (t.metrics.get(name) for name in others)
        writer.writerow([*setting, *facts, t.run, t.failure, *own_metrics])
    return out.getvalue()


def markdown(summary: Summary) -> str:
    """The verdict, the rows in the order of the ranking, importance of axes, failures."""
    columns = ["rank", *summary.fields, summary.metric, "seeds", "device-seconds", "marks"]
    lines = [_line(columns), "|---" * len(columns) + "|"]
    lines += [_line(_cells(summary, row)) for row in summary.rows]
    total = sum(t.held_seconds for t in summary.trials)
    parts = [
        f"**{summary.verdict}**",
        f"{summary.label}: mean and 95 % interval over seeds; device-seconds: those of the "
        "training steps alone; Pareto: no other setting is as good and as cheap. All "
        f"{len(summary.trials)} trials together held their devices for {total:,.0f} seconds.",
        "\n".join(lines),
    ]
    if any(part.value is not None for part in summary.importance):
        parts.append("\n".join(["Importance:", "", *map(_importance_line, summary.importance)]))
    failed = [t for t in summary.trials if t.status == "failed"]
    if failed:
        items = [
            f"- {show_setting(t.setting)}, seed {t.seed} ({t.run}): "
            f"{' '.join((t.failure or 'no reason known').split())}"
            for t in failed
        ]
        parts.append("\n".join(["Failed:", "", *items]))
    return "\n\n".join(parts) + "\n"


def _cells(summary: Summary, row: Row) -> list[str]:
    marks = [
        "baseline" if row.is_baseline else "",
        "best" if row is summary.best else "",
        "Pareto" if row.on_front else "",
        f"{row.pruned} pruned" if row.pruned else "",
        f"{row.failed} failed" if row.failed else "",
    ]
    return [
        str(row.rank or "–"),
        *(show_value(row.setting[a]) if a in row.setting else "–" for a in summary.fields),
        str(row.interval or "–"),
        str(len(row.values)),
        "–" if row.device_seconds is None else f"{row.device_seconds:,.1f}",
        ", ".join(mark for mark in marks if mark),
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"


def _importance_line(part: Importance) -> str:
    kind = "rank correlation" if part.numeric else "share of the variance"
    if part.value is None or part.share is None or part.chance is None:
        return f"- {part.axis}: not known from {part.trials} trials"
    chance = "above" if part.share > part.chance else "not above"
    return (
        f"- {part.axis}: {kind} {part.value:.2f} over {part.trials} trials, "
        f"{chance} what chance gives in 95 % of cases"
    )
