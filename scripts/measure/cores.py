"""How many threads this process can run at once."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cores(
    environment: Mapping[str, str] = os.environ, cgroup: Path = CGROUP
) -> tuple[int, str]:
    """(threads, why so many): OMP_NUM_THREADS, else the cores that this process may use.

    The load of the moment is not asked: it lags by minutes, and a thread too few costs half of a
    machine with two cores.
    """
    asked = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked), "OMP_NUM_THREADS"
    cores = _affinity()
    limit = _quota(cgroup)
    if limit is not None and math.ceil(limit) < cores:
        return max(1, math.ceil(limit)), f"the {limit:g} cores that this container may use"
    return cores, "the cores that this process may use"


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return max(1, len(os.sched_getaffinity(0)))
    count = getattr(os, "process_cpu_count", os.cpu_count)()
    return count or 1


def _quota(cgroup: Path) -> float | None:
    """Cores that the control group grants, in version 2's file or version 1's; None: no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdecimal() or not period.isdecimal() or not int(quota) or not int(period):
        return None  # max, or -1
    return int(quota) / int(period)
