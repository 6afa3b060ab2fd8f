"""Time, memory, ceilings of the card, operations of the network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.settings import Sizes, new_network

MIN_STEPS = 5


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `count` repeats."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def per(self, amount: float) -> Spread:
        """Of `amount` / value: a rate from a time."""
        return Spread(amount / self.median, amount / self.high, amount / self.low, self.count)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class Device(Protocol):
    """What measuring needs of a device; one implementation for each kind."""

    device: torch.device

    def times(self, call: Callable[[], object], count: int) -> list[float]:
        """Seconds of each of `count` calls in a row."""

    def reset_peak(self) -> None: ...

    def peak_bytes(self) -> int | None:
        """Most memory allocated since `reset_peak`; None where it is not known."""

    def describe(self) -> str: ...


class Cuda:
    """Times by events between the calls: the host does not wait for the card in between."""

    device = torch.device("cuda")

    def times(self, call: Callable[[], object], count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        pairs = zip(events[:-1], events[1:], strict=True)
        return [start.elapsed_time(end) / 1000 for start, end in pairs]

    def reset_peak(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated()

    def describe(self) -> str:
        card = torch.cuda.get_device_properties(0)
        return (
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} SMs, "
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )


class Cpu:
    device = torch.device("cpu")

    def times(self, call: Callable[[], object], count: int) -> list[float]:
        values = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            values.append(time.perf_counter() - start)
        return values

    def reset_peak(self) -> None: ...

    def peak_bytes(self) -> int | None:
        return None

    def describe(self) -> str:
        return f"CPU, {torch.get_num_threads()} threads"


def time_call(call: Callable[[], object], device: Device, sizes: Sizes) -> Spread:
    """After a warm-up; fewer repeats than sizes.steps where they would take too long."""
    warm = device.times(call, 2)
    if min(warm) < sizes.seconds / sizes.steps:
        warm += device.times(call, sizes.warmup)
    fitting = int(sizes.seconds / max(min(warm), 1e-9))
    return Spread.of(device.times(call, max(MIN_STEPS, min(sizes.steps, fitting))))


def ceilings(device: Device, sizes: Sizes) -> dict[str, Spread]:
    """Rates that nothing on this card exceeds by much: bf16 matmul of random matrices in FLOP/s
    (zeros would be faster), and device-to-device copy in bytes/s, read and written."""
    n = sizes.matmul
    a, b = (torch.randn(n, n, device=device.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    matmul = time_call(lambda: torch.mm(a, b, out=out), device, sizes)
    source = torch.randint(0, 255, (sizes.copy_bytes,), device=device.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device, sizes)
    return {"matmul": matmul.per(2.0 * n**3), "copy": copy.per(2.0 * sizes.copy_bytes)}


def count_operations(sizes: Sizes, batch: int = 2) -> tuple[float, int]:
    """FLOPs of a forward and a backward pass per image (matmuls and convolutions), and parameters;
    on the meta device, where nothing is computed."""
    with torch.device("meta"):
        network = new_network(sizes)
        x = torch.empty(batch, sizes.channels, sizes.resolution, sizes.resolution)
        with FlopCounterMode(display=False) as counter:
            network(x, torch.empty(batch)).sum().backward()
    parameters = sum(p.numel() for p in network.parameters())
    return counter.get_total_flops() / batch, parameters
