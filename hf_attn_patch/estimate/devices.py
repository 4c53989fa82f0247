"""Peak rates and memory of devices, from their makers' data sheets; a CPU is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True, kw_only=True)
class Device:
    """`tflops` of dense bfloat16 matrix products with float32 sums, without sparsity."""

    name: str
    title: str
    tflops: float
    float32_tflops: float  # outside of tensor cores' reduced formats
    gbytes_s: float  # memory bandwidth, 10⁹ bytes
    gbytes: float  # memory, 10⁹ bytes
    source: str

    def flops_s(self, element_size: int) -> float:
        """Peak rate for a dtype: float32's own, else bfloat16's, narrower ones too."""
        return 1e12 * (self.float32_tflops if element_size >= 4 else self.tflops)


# fmt: off
DEVICES = {
    device.name: device
    for device in (
        Device(name="a100-40", title="NVIDIA A100 40 GB", tflops=312, float32_tflops=19.5,
               gbytes_s=1555, gbytes=40, source="NVIDIA A100 data sheet"),
        Device(name="a100", title="NVIDIA A100 80 GB SXM", tflops=312, float32_tflops=19.5,
               gbytes_s=2039, gbytes=80, source="NVIDIA A100 data sheet"),
        Device(name="h100", title="NVIDIA H100 SXM", tflops=989.4, float32_tflops=67,
               gbytes_s=3350, gbytes=80, source="NVIDIA H100 data sheet"),
        Device(name="h200", title="NVIDIA H200 SXM", tflops=989.4, float32_tflops=67,
               gbytes_s=4800, gbytes=141, source="NVIDIA H200 data sheet"),
        Device(name="l4", title="NVIDIA L4", tflops=121, float32_tflops=30.3,
               gbytes_s=300, gbytes=24, source="NVIDIA L4 data sheet, half of its sparse rate"),
        Device(name="l40s", title="NVIDIA L40S", tflops=362, float32_tflops=91.6,
               gbytes_s=864, gbytes=48, source="NVIDIA L40S data sheet"),
        Device(name="rtx4090", title="NVIDIA GeForce RTX 4090", tflops=165.2, float32_tflops=82.6,
               gbytes_s=1008, gbytes=24, source="NVIDIA Ada architecture white paper"),
        Device(name="mi250x", title="AMD Instinct MI250X (both)", tflops=383, float32_tflops=47.9,
               gbytes_s=3277, gbytes=128, source="AMD MI250X data sheet"),
        Device(name="mi300x", title="AMD Instinct MI300X", tflops=1307.4, float32_tflops=163.4,
               gbytes_s=5300, gbytes=192, source="AMD MI300X data sheet"),
    )
}
# fmt: on
CPU = "cpu"


def find_device(name: str) -> Device:
    """A device by its name; "cpu" measures this machine's, about a second.

    Raises ValueError for an unknown name.
    """
    if name == CPU:
        return measure_cpu()
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is unknown; possible: {', '.join([*DEVICES, CPU])}")
    return DEVICES[name]


def measure_cpu() -> Device:
    """This machine: the best of a few matrix products and of a few copies."""
    wide = torch.randn(1024, 1024)
    # a processor without bfloat16 products takes a hundred times as long for them
    narrow = torch.randn(256, 256, dtype=torch.bfloat16)
    big = torch.zeros(32 << 20)  # 128 MiB, beyond any cache
    to = torch.empty_like(big)
    float32, bfloat16 = (
        2 * len(a) ** 3 / _best(partial(torch.mm, a, a)) / 1e12 for a in (wide, narrow)
    )
    # a copy reads and writes
    gbytes_s = 2 * big.nbytes / _best(lambda: to.copy_(big)) / 1e9
    return Device(
        name=CPU,
        title=f"this CPU, {torch.get_num_threads()} threads",
        tflops=bfloat16,
        float32_tflops=float32,
        gbytes_s=gbytes_s,
        gbytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        source="measured now",
    )


def _best(work: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of the quickest of a few calls, after one that is not counted."""
    work()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)
