"""Speed of training and sampling on one NVIDIA card: `python benchmarks/gpu_step.py`.

Needs torch, numpy, safetensors and the plain PyTorch part of this package, which it finds beside
itself. It measures what it can within --minutes, the most important first, writes every number to a
JSON file after each row, and prints one table last. What there was no time for is named in it, and
can be measured later, e.g. `--only "compiled, bf16, dropout" "compiled by blocks" --out rest.json`;
CP needs the DSM row of its variant beside it for their ratio. `--quick` runs everything on the CPU
with tiny sizes, to show that the script works; its numbers mean nothing.

Not part of a step here: loading of images, DeepSpeed's bookkeeping, and (but for a row of its own)
augmentation. FLOPs are those of matmuls and convolutions, utilisation is their share of a measured
bf16 matmul rate also for float32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare machine has nothing installed
from benchmarks.gpu.measure import Cpu, Cuda, Device, ceilings, count_operations
from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.runs import Runner, Task, first_line, plan
from benchmarks.gpu.settings import FULL, QUICK, Sizes

RESULTS = Path(__file__).parent / "results" / "gpu_step.json"
PROFILE_SECONDS = 75.0
"""Kept for the profile, which may compile once more."""


class OutOfTime(Exception):
    """The minutes are over."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside once the seconds have passed."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise OutOfTime("the minutes are over")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(runner: Runner, tasks: list[Task], deadline: float, out: Path | None) -> bool:
    """A row for each task, on the terminal and in the file at once; False if anything failed."""
    good = True
    for task in tasks:
        row, failed = attempt(runner, task, deadline)
        good = good and not failed
        print(runner.report.line(row), flush=True)
        save(runner.report, out)
    return good


def attempt(runner: Runner, task: Task, deadline: float) -> tuple[Row, bool]:
    """The row of the task, and whether it failed; out of time or memory is no failure."""
    row = runner.new_row(task)
    left = deadline - time.monotonic()
    if row.missing is None and left <= 0:
        row.missing = "skipped: the minutes are over"
    if row.missing is not None:
        return row, False
    try:
        with time_limit(left):
            runner.run(task, row)
    except Exception as error:  # whatever one variant does, the others are measured
        runner.drop()
        if time.monotonic() >= deadline:  # what is interrupted may hide OutOfTime in its own error
            row.missing = "cut off: the minutes are over"
        elif isinstance(error, torch.OutOfMemoryError):
            row.missing = "out of memory"
        else:
            traceback.print_exc()
            row.missing = f"failed: {first_line(error)}"
            return row, True
    return row, False


def save(report: Report, out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report.as_dict(), indent=1))


def header(device: Device, sizes: Sizes, parameters: int) -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "device": device.describe(),
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "network": f"{sizes.resolution}x{sizes.resolution}, {parameters / 1e6:.3g} M parameters, "
        f"{sizes.network['architecture']}, augmentation labels, no dropout unless named",
        "lanes": f"one for every {sizes.lane_batch} images, each with its own generator",
        "bf16": "weights that compute in bf16, Adam and average on float32 masters; no autocast",
        "compiled": f"by {sizes.compiler}, for each batch on its own",
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="what is left then is skipped")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[""],
        help="rows whose 'what, variant, batch' hold any",
    )
    parser.add_argument("--out", type=Path, help=f"JSON file (default {RESULTS}, none if --quick)")
    parser.add_argument("--quick", action="store_true", help="tiny, on the CPU: does it work?")
    args = parser.parse_args()
    if not args.quick and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; use a machine with one, or --quick")
    return args


def main() -> int:
    start, args = time.monotonic(), arguments()
    out = args.out or (None if args.quick else RESULTS)
    device: Device = Cpu() if args.quick else Cuda()
    sizes = QUICK if args.quick else FULL
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    flops, parameters = count_operations(sizes)
    report = Report(header(device, sizes, parameters), flops)
    report.ceilings = ceilings(device, sizes)
    runner = Runner(device, sizes, report)
    tasks = [task for task in plan(sizes) if any(text in str(task) for text in args.only)]
    end = start + 60 * args.minutes
    good = measure(runner, tasks, end - (0 if args.quick else PROFILE_SECONDS), out)
    try:
        with time_limit(end - time.monotonic()):
            runner.profile()
    except Exception:  # the rows are worth more than the profile
        traceback.print_exc()
        good = False
    save(report, out)
    print(f"\n{report.table()}\n\n{time.monotonic() - start:.0f} s" + (f", {out}" if out else ""))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
