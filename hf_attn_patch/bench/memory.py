"""What a process holds now, and held at most since it was asked to forget."""

from __future__ import annotations

from pathlib import Path


class Memory:
    """Of the process on a CPU, of its tensors on a GPU; bytes."""

    def __init__(self, device: str) -> None:
        self.on_cpu = device == "cpu"

    def now(self) -> int:
        import torch

        return self._status("VmRSS") if self.on_cpu else torch.cuda.memory_allocated()

    def peak(self) -> int:
        import torch

        return self._status("VmHWM") if self.on_cpu else torch.cuda.max_memory_allocated()

    def forget_peak(self) -> None:
        import torch

        if self.on_cpu:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew at VmRSS
        else:
            torch.cuda.reset_peak_memory_stats()

    @staticmethod
    def _status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {field}")
