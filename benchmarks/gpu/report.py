"""The rows that are measured, and the table made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.gpu.kernels import LARGEST, Kernel, shares
from benchmarks.gpu.measure import Spread

ROLLOUTS = " + graph of rollouts"
"""End of the name of a variant whose network calls without gradient alone are graphs."""
HEAD = (
    "what",
    "variant",
    "batch",
    "images/s (quartiles; repeats)",
    "ms",
    "of matmul rate",
    "peak GiB",
    "time / DSM",
    "error of loss",
    "error of gradient",
    "first call s",
    "graph breaks",
)


@dataclass
class Row:
    """One measurement, or why there is none."""

    what: str
    variant: str
    batch: int
    seconds: Spread | None = None
    """Of a call."""
    flops: float = 0.0
    """Of a call; 0: not counted."""
    peak_bytes: int | None = None
    first_call_seconds: float | None = None
    """Compiling and capturing included."""
    graph_breaks: int = 0
    """In what was compiled for it."""
    loss_error: float | None = None
    """Relative, against float32 eager; of sampling: the images' error."""
    gradient_error: float | None = None
    missing: str | None = None
    """Why it was not measured, or not to its end."""

    def images_per_second(self) -> Spread | None:
        return None if self.seconds is None else self.seconds.per(self.batch)


@dataclass
class Report:
    header: dict[str, Any]
    network_flops: float
    """Per training image."""
    ceilings: dict[str, Spread] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    profiled: str = "nothing"
    """What `kernels` are those of."""
    kernels: list[Kernel] = field(default_factory=list)

    def utilisation(self, row: Row) -> float | None:
        """Counted FLOPs per second as a share of the measured matmul rate."""
        if row.seconds is None or row.flops == 0 or "matmul" not in self.ceilings:
            return None
        return row.flops / row.seconds.median / self.ceilings["matmul"].median

    def time_over_dsm(self, row: Row) -> float | None:
        """Time of a CP step over that of the DSM step of the same variant; graphs of the rollouts
        alone compare with a step without graphs, since DSM has no rollouts."""
        key = ("dsm", row.variant.removesuffix(ROLLOUTS), row.batch)
        for dsm in self._measured():
            if row.what.startswith("cp") and (dsm.what, dsm.variant, dsm.batch) == key:
                return None if row.seconds is None else _median(row) / _median(dsm)
        return None

    def best(self, *, original: bool = False) -> Row | None:
        """Fastest denoising step per image, of the original loop or of the other variants."""
        rows = [
            row
            for row in self._measured()
            if row.what == "dsm" and row.variant.startswith("original") == original
        ]
        return max(rows, key=lambda row: row.batch / _median(row), default=None)

    def aims(self) -> dict[str, str]:
        """What was aimed at, and what was reached."""
        best, original = self.best(), self.best(original=True)
        reached = {}
        share = None if best is None else self.utilisation(best)
        if best is not None and share is not None:
            reached["DSM at 50 % of the matmul rate or more"] = (
                f"{share:.0%}, {best.variant}, batch {best.batch}"
            )
        if best is not None and original is not None:
            ratio = (best.batch / _median(best)) / (original.batch / _median(original))
            reached["DSM at twice the original loop or more"] = f"{ratio:.2f}, each at its best"
        ratios = {
            f"{row.variant}, batch {row.batch}": over
            for row in self._measured()
            if row.what == "cp recommended" and (over := self.time_over_dsm(row)) is not None
        }
        if ratios:
            text = "; ".join(f"{over:.2f} ({name})" for name, over in ratios.items())
            reached["recommended CP at 1.5 times DSM or less"] = text
        return reached

    def as_dict(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            rate = row.images_per_second()
            rows.append(
                asdict(row)
                | {
                    "images_per_second": None if rate is None else asdict(rate),
                    "utilisation": self.utilisation(row),
                    "time_over_dsm": self.time_over_dsm(row),
                }
            )
        return self.header | {
            "network_flops_per_training_image": self.network_flops,
            "ceilings": {name: asdict(rate) for name, rate in self.ceilings.items()},
            "aims": self.aims(),
            "rows": rows,
            "profiled": self.profiled,
            "largest_kernels": [asdict(kernel) for kernel in self.kernels[:LARGEST]],
            "shares": shares(self.kernels),
        }

    def table(self) -> str:
        """Markdown."""
        head = [f"- {name}: {value}" for name, value in self.header.items()]
        head += [f"- {name}: {ceiling_text(name, rate)}" for name, rate in self.ceilings.items()]
        head.append(f"- FLOPs per training image, counted: {self.network_flops / 1e9:.4g} G")
        rows = [_line(HEAD), _line(["---"] * len(HEAD)), *map(self.line, self.rows)]
        aims = [f"- {aim}: {reached}" for aim, reached in self.aims().items()]
        return "\n".join([*head, "", *rows, "", *self._profile(), "", *aims])

    def line(self, row: Row) -> str:
        """The row as a line of the table."""
        rate = row.images_per_second()
        if row.seconds is None or rate is None:
            return _line([row.what, row.variant, row.batch, row.missing or "", *[""] * 8])
        note = "" if row.missing is None else f", then {row.missing}"
        peak = None if row.peak_bytes is None else row.peak_bytes / 2**30
        return _line(
            [
                row.what,
                row.variant,
                row.batch,
                f"{rate.median:,.1f} ({rate.low:,.1f} to {rate.high:,.1f}; {rate.count}){note}",
                f"{row.seconds.median * 1000:.2f}",
                _text(self.utilisation(row), ".1%"),
                _text(peak, ".1f"),
                _text(self.time_over_dsm(row), ".2f"),
                _text(row.loss_error, ".1e"),
                _text(row.gradient_error, ".1e"),
                _text(row.first_call_seconds, ".1f"),
                row.graph_breaks or "",
            ]
        )

    def _measured(self) -> list[Row]:
        return [row for row in self.rows if row.seconds is not None]

    def _profile(self) -> list[str]:
        calls = sum(kernel.calls for kernel in self.kernels)
        three = list(shares(self.kernels).items())[:3]
        return [
            f"Profile of {self.profiled}: {calls:,.0f} kernels per step. Largest costs: "
            + ", ".join(f"{kind} {share:.0%}" for kind, share in three),
            "",
            _line(["share", "ms per step", "calls per step", "kernel"]),
            _line(["---"] * 4),
            *(
                _line([f"{k.share:.1%}", f"{k.seconds * 1000:.2f}", f"{k.calls:g}", k.name[:90]])
                for k in self.kernels[:LARGEST]
            ),
        ]


def ceiling_text(name: str, rate: Spread) -> str:
    unit = "TFLOP/s" if name == "matmul" else "TB/s"
    return f"{rate.median / 1e12:,.3f} {unit} ({rate.low / 1e12:,.3f} to {rate.high / 1e12:,.3f})"


def _median(row: Row) -> float:
    assert row.seconds is not None
    return row.seconds.median


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"
