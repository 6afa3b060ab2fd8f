"""Where the time of a step goes: its largest kernels, and what kinds of work cost most."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LARGEST = 10
STEPS = 3
GROUP_NORM = "GroupNorm and what is fused into it"
CONVOLUTION = "convolution and matmul"
OTHER = "elementwise and the rest"
KINDS = (
    (GROUP_NORM, r"triton_(red|per)|group_?norm|rowwisemoments"),
    (GROUP_NORM, r"internalgradients|fusedparams|gammabeta"),
    (OTHER, r"triton_poi"),
    ("change of layout", r"nchwtonhwc|nhwctonchw|transpose"),
    ("attention", r"flash|fmha|sdpa|attention|softmax"),
    ("optimizer and average", r"multi_tensor|adam|foreach"),
    (CONVOLUTION, r"xmma|cutlass|gemm|nvjet|[dw]grad|fprop|cudnn|winograd|triton_tem"),
    (CONVOLUTION, r"conv(?!ert)|addmm|bmm|::mm\b"),
    ("random numbers", r"distribution|philox|normal_|uniform"),
    ("copies, joins and fills", r"memcpy|memset|copy|fill|::cat\b"),
)
"""Kinds of work by what the names of their kernels contain, the first that fits."""


@dataclass(frozen=True)
class Kernel:
    name: str
    calls: float
    """Per step."""
    seconds: float
    """Per step, all calls."""
    share: float
    """Of the time of all kernels."""
    kind: str


def kind_of(kernel: str) -> str:
    return next((kind for kind, names in KINDS if re.search(names, kernel.lower())), OTHER)


def profile_step(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """Kernels of a step on a CUDA device, operations on the CPU, the largest first."""
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
    return kernels_of(profiler.key_averages(), DeviceType.CUDA if cuda else DeviceType.CPU)


def kernels_of(events: Any, where: DeviceType) -> list[Kernel]:
    field = "self_cpu_time_total" if where == DeviceType.CPU else "self_device_time_total"
    # Annotations span kernels that are counted already.
    own = [e for e in events if e.device_type == where and not _is_annotation(e)]
    total = sum(getattr(e, field) for e in own)
    kernels = [
        Kernel(
            e.key,
            e.count / STEPS,
            getattr(e, field) / 1e6 / STEPS,
            getattr(e, field) / total,
            kind_of(e.key),
        )
        for e in own
    ]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def _is_annotation(event: Any) -> bool:
    return bool(getattr(event, "is_user_annotation", False))


def shares(kernels: list[Kernel]) -> dict[str, float]:
    """Share of each kind of work, the largest first."""
    sums: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        sums[kernel.kind] += kernel.share
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
