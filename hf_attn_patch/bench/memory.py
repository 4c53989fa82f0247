"""What a process holds now, held at most since it was asked to forget, and what is left."""

from __future__ import annotations

import ctypes
from pathlib import Path


class Memory:
    """Of the process on a CPU, of its tensors on a GPU; bytes."""

    def __init__(self, device: str) -> None:
        self.on_cpu = device == "cpu"

    def now(self) -> int:
        import torch

        return _read("/proc/self/status", "VmRSS") if self.on_cpu else torch.cuda.memory_allocated()

    def peak(self) -> int:
        import torch

        if self.on_cpu:
            return _read("/proc/self/status", "VmHWM")
        return torch.cuda.max_memory_allocated()

    def forget_peak(self) -> None:
        import torch

        if self.on_cpu:
            # glibc keeps what earlier work freed: pages that the next would take without growing
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew at VmRSS
        else:
            torch.cuda.reset_peak_memory_stats()

    def free(self) -> int:
        """Of the machine's, or the device's."""
        import torch

        if self.on_cpu:
            return _read("/proc/meminfo", "MemAvailable")
        return torch.cuda.mem_get_info()[0]


def _read(path: str, field: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{path} has no {field}")
