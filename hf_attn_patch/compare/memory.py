"""The most memory that a piece of work needs beside what was there before it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory(device) as memory: work()`, then `memory.peak_bytes`.

    On an accelerator what torch's allocator handed out; on a CPU under Linux the process's
    resident memory, to a few pages; elsewhere None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cpu":
            self._before = _resident("VmRSS") if _reset_peak() else None
        elif backend := self._backend():
            backend.reset_peak_memory_stats(self.device)
            self._before = backend.memory_allocated(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            return
        if self.device.type == "cpu":
            peak = _resident("VmHWM")
        else:
            peak = self._backend().max_memory_allocated(self.device)
        self.peak_bytes = None if peak is None else max(0, peak - self._before)

    def _backend(self) -> Any:
        backend = getattr(torch, self.device.type, None)
        return backend if hasattr(backend, "max_memory_allocated") else None


def _reset_peak() -> bool:
    """Let the kernel count the peak of resident memory anew; False where it cannot."""
    if not _RESET.exists():
        return False
    # glibc keeps what earlier runs freed: pages that this run would take without growing
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(found[0][1]) if found else None
