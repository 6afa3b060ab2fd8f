"""The GPU benchmark as far as a CPU can show: its script, its settings, its arithmetic."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.gpu import kernels, settings
from benchmarks.gpu.measure import Cpu, Spread, count_operations, time_call
from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.runs import Runner, Task, plan
from benchmarks.gpu.settings import FULL, OBJECTIVES, QUICK
from benchmarks.gpu.variants import (
    EAGER,
)
from benchmarks.gpu_step import OutOfTime, attempt, main, time_limit
from cdm_ray.config import CPConfig, DSMConfig, NetworkConfig

ROOT = Path(__file__).parents[2]


def test_the_dicts_have_the_fields_and_the_defaults_of_the_configuration():
    network = NetworkConfig(**settings.NETWORK)
    assert network.model_dump() == settings.NETWORK
    assert network == NetworkConfig(channel_mult=(1, 2, 2, 2))
    assert DSMConfig().model_dump() == settings.DSM
    assert CPConfig(weight=settings.CP_WEIGHT).model_dump() == OBJECTIVES["cp recommended"]
    for values in OBJECTIVES.values():
        assert CPConfig(**values).model_dump() == values


def test_the_measured_network_is_that_of_the_published_bounds():
    flops, parameters = count_operations(FULL)
    assert parameters / 1e6 == pytest.approx(61.8, abs=0.05)
    # the counter sees attention differently from one torch to the next
    assert flops / 1e9 == pytest.approx(251.2, rel=0.01)


def test_the_plan_covers_every_batch_and_every_objective_with_and_without_graphs():
    tasks = plan(FULL)
    assert len(tasks) == len(set(tasks))
    assert set(FULL.batches) == {32, 64, 128, 256}
    planned = {str(task) for task in tasks}
    for variant in ("eager, bf16", "compiled, bf16"):
        for graph in ("", " + graph"):
            for batch in FULL.batches:
                assert f"dsm, {variant}{graph}, {batch}" in planned
            for what, batch in {
                "cp recommended": FULL.cp_batch,
                "cp released": FULL.cp_batch,
                "sampling": FULL.sample_batch,
            }.items():
                assert f"{what}, {variant}{graph}, {batch}" in planned
    assert {f"dsm, eager, fp32/TF32, {batch}" for batch in FULL.batches} <= planned
    assert f"cp released, compiled, bf16 + graph of rollouts, {FULL.cp_batch}" in planned


class Clock(Cpu):
    """Calls that take a second."""

    def times(self, call, count):
        return [1.0 for _ in range(count) if call() is None]


def test_slow_calls_are_repeated_less_often():
    assert time_call(lambda: None, Clock(), replace(FULL, seconds=100.0)).count == FULL.steps
    assert time_call(lambda: None, Clock(), replace(FULL, seconds=7.0)).count == 7
    assert time_call(lambda: None, Clock(), replace(FULL, seconds=1.0)).count == 5


def test_a_rate_keeps_the_quartiles_of_the_times():
    times = Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert times == Spread(3.0, 2.0, 4.0, 5)
    assert times.per(12) == Spread(4.0, 3.0, 6.0, 5)


def report_of(*rows: Row) -> Report:
    return Report({}, 100.0, {"matmul": Spread(1000.0, 1000.0, 1000.0, 5)}, list(rows))


def row_of(what: str, variant: str, seconds: float, **fields) -> Row:
    return Row(what, variant, 10, Spread(seconds, seconds, seconds, 5), **fields)


def test_ratios_are_those_of_the_same_variant_and_batch():
    report = report_of(
        row_of("dsm", "original", 8.0),
        row_of("dsm", "fast", 2.0, flops=1000.0),
        row_of("dsm", "fast + graph", 1.0),
        recommended := row_of("cp recommended", "fast + graph", 1.5),
        released := row_of("cp released", "fast + graph of rollouts", 12.0),
        alone := row_of("cp released", "slow", 12.0),
    )
    assert report.time_over_dsm(recommended) == 1.5
    assert report.time_over_dsm(released) == 6.0
    assert report.time_over_dsm(alone) is None
    assert report.utilisation(report.rows[1]) == 0.5
    aims = list(report.aims().values())
    assert aims == ["8.00, each at its best", "1.50 (fast + graph, batch 10)"]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", kernels.CONVOLUTION),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad>", kernels.CONVOLUTION),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", kernels.CONVOLUTION),
        ("triton_red_fused_native_group_norm_silu_convolution_3", kernels.GROUP_NORM),
        ("void at::native::(anonymous)::ComputeInternalGradientsCUDAKernel", kernels.GROUP_NORM),
        ("triton_poi_fused_add_convolution_mul_12", kernels.OTHER),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", "change of layout"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer and average"),
        ("distribution_elementwise_grid_stride_kernel<float, 4, normal_>", "random numbers"),
        ("Memcpy DtoD (Device -> Device)", "copies, joins and fills"),
        ("void at::native::vectorized_elementwise_kernel<4, silu_backward>", kernels.OTHER),
    ],
)
def test_kernels_are_told_apart_by_name(kernel, kind):
    assert kernels.kind_of(kernel) == kind


def test_a_profile_counts_each_kernel_once():
    def event(key, microseconds, device=DeviceType.CUDA, annotation=False):
        return SimpleNamespace(
            key=key,
            count=2 * kernels.STEPS,
            self_device_time_total=microseconds * kernels.STEPS,
            device_type=device,
            is_user_annotation=annotation,
        )

    found = kernels.kernels_of(
        [
            event("gemm", 300),
            event("nchwToNhwc", 700),
            event("## Call CompiledFxGraph", 1000, annotation=True),
            event("aten::conv2d", 1000, device=DeviceType.CPU),
        ],
        DeviceType.CUDA,
    )
    assert [(k.name, k.calls, k.share) for k in found] == [("nchwToNhwc", 2, 0.7), ("gemm", 2, 0.3)]
    assert found[0].seconds == pytest.approx(700e-6)
    assert kernels.shares(found) == {"change of layout": 0.7, kernels.CONVOLUTION: 0.3}


def test_the_time_limit_interrupts():
    with pytest.raises(OutOfTime), time_limit(0.05):
        time.sleep(5)


class Broken(Runner):
    """Measures nothing."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.report, self.what = report_of(), run

    def missing(self, task):
        return None

    def run(self, task, row):
        self.what()

    def drop(self): ...


def fail() -> None:
    raise ValueError("no such kernel\nand more")


def exhaust() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("run", "seconds", "text", "failure"),
    [
        (fail, 60, "failed: ValueError: no such kernel", True),
        (exhaust, 60, "out of memory", False),
        (lambda: time.sleep(5), 0.05, "cut off: the minutes are over", False),
        (fail, -1, "skipped: the minutes are over", False),
    ],
)
def test_what_one_row_meets_is_said_in_it_and_leaves_the_others(run, seconds, text, failure):
    runner = Broken(run)
    row, failed = attempt(runner, Task("dsm", EAGER, 4), time.monotonic() + seconds)
    assert (row.missing, failed) == (text, failure)
    assert text in runner.report.table()


BARE = """
import runpy, sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None  # an import of it fails
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ABSENT = "pydantic,ray,deepspeed,mlflow,webdataset,yaml,scipy,sklearn,PIL,matplotlib,cdm_ray.config"


def test_it_runs_on_a_machine_that_has_only_torch(tmp_path):
    out = tmp_path / "gpu_step.json"
    script = ROOT / "benchmarks" / "gpu_step.py"
    parts = ["eager", "original", "augmentation", "dsm, compiled, bf16, dropout"]
    command = ["-c", BARE, ABSENT, str(script), "--quick", "--out", str(out), "--only", *parts]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("- date:") :]
    report = json.loads(out.read_text())
    tasks = [task for task in plan(QUICK) if any(part in str(task) for part in parts)]
    assert [(r["what"], r["variant"], r["batch"]) for r in report["rows"]] == [
        (task.what, task.name, task.batch) for task in tasks
    ]
    for row in report["rows"]:
        if row["missing"] is None:
            assert row["images_per_second"]["low"] <= row["images_per_second"]["median"]
            assert row["what"] == "augmentation" or row["loss_error"] < 0.1
        else:
            assert row["missing"] == "CUDA only"
            assert row["variant"].endswith(("graph", "graph of rollouts"))
        assert f"| {row['what']} | {row['variant']} | {row['batch']} |" in table
    assert len(report["largest_kernels"]) == 10
    assert "Largest costs:" in table


def test_without_a_card_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_step.py"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.endswith("use a machine with one, or --quick\n")
