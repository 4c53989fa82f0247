"""The CSV schema that every benchmark shares, and the clock that fills it.

A benchmark times its contenders *interleaved* (one call of each per round, so that a busy moment
hits all of them), keeps the 20th, 50th and 80th percentile, and appends one `BenchRow` per
contender. Rows say on what they were measured. A row whose `key()` is already in the file was
measured before: that is how a run in slices resumes.
"""

from __future__ import annotations

import csv
import functools
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Contender = Callable[[], object]
Clock = Callable[[Contender], float]

# This package's contenders are called this, or this with a variant: "hf_attn_patch:page16". The
# README's tables divide every peer by it.
OURS = "hf_attn_patch"

REPO_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """On what a row was measured."""

    device: str
    threads: int
    torch: str
    triton: str
    transformers: str
    commit: str
    date: str


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Percentiles of one contender's calls, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One measured contender on one shape; `pass_` is the column `pass`.

    `seq_q`/`seq_k` are tokens; `window` counts visible tokens including the query's own (None: no
    window); `extra` names whatever else tells rows apart (`"padded"`, `"page=16"`). `tflops` and
    `gbytes_s` are rates at the median, `peak_bytes` the memory on top of the inputs; None where not
    measured. A row without `timing` is a plan: it has a `key()`, so a resumed run can skip it.
    """

    impl: str
    pass_: str
    dtype: str
    batch: int
    heads_q: int
    heads_kv: int
    head_dim: int
    seq_q: int
    seq_k: int
    env: Environment
    timing: Timing | None = None
    window: int | None = None
    causal: bool = True
    extra: str = ""
    tflops: float | None = None
    gbytes_s: float | None = None
    peak_bytes: int | None = None

    def cells(self) -> dict[str, str]:
        """The row as CSV text, in the order of `COLUMNS`."""
        merged = {f.name.rstrip("_"): getattr(self, f.name) for f in fields(self)}
        for nested in (merged.pop("timing"), merged.pop("env")):
            merged |= {} if nested is None else asdict(nested)
        return {name: _text(merged.get(name)) for name in COLUMNS}

    def key(self) -> tuple[str, ...]:
        """What makes rows the same measurement: contender, shape and device, not the result."""
        cells = self.cells()
        return tuple(cells[name] for name in KEY_COLUMNS)


# fmt: off
COLUMNS = [
    "impl", "pass", "dtype", "batch", "heads_q", "heads_kv", "head_dim", "seq_q", "seq_k", "window",
    "causal", "extra", "p20_ms", "p50_ms", "p80_ms", "tflops", "gbytes_s", "peak_bytes", "device",
    "threads", "torch", "triton", "transformers", "commit", "date",
]
# fmt: on
KEY_COLUMNS = (*COLUMNS[: COLUMNS.index("extra") + 1], "device", "threads")


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# --- the CSV file ---------------------------------------------------------------------------------


def append_rows(path: Path, rows: Iterable[BenchRow]) -> None:
    """Append `rows` to the CSV at `path`, which gets its header first when it is new.

    Each call flushes, so an interrupted run keeps what it measured. Raises ValueError when `path`
    holds a CSV with other columns.
    """
    rows = list(rows)
    assert all(row.timing is not None for row in rows), "a plan is not a measurement"
    append_table(path, COLUMNS, [row.cells() for row in rows])


def append_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """:func:`append_rows` for rows of any columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        _check_header(path, columns)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Every row of the CSV at `path` as text by column; an absent file has none."""
    return read_table(path, COLUMNS)


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """:func:`read_rows` for rows of any columns."""
    if not path.exists() or path.stat().st_size == 0:
        return []
    _check_header(path, columns)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured_keys(path: Path) -> set[tuple[str, ...]]:
    """The `BenchRow.key()` of every row in the CSV at `path`: what a resumed run may skip."""
    return {tuple(row[name] for name in KEY_COLUMNS) for row in read_rows(path)}


def _check_header(path: Path, columns: Sequence[str]) -> None:
    with path.open(newline="") as file:
        header = next(csv.reader(file))
    if header != list(columns):
        raise ValueError(
            f"{path} has the columns {','.join(header)}; a benchmark appends only to a file with "
            f"{','.join(columns)}. Name another output file."
        )


# --- the environment ------------------------------------------------------------------------------


def environment(device: torch.device | str = "cpu") -> Environment:
    """The stamp for rows measured now on `device`, with torch's present thread count."""
    return Environment(
        device=_device_name(torch.device(device)),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers"),
        commit=_commit(),
        date=datetime.now(timezone.utc).date().isoformat(),
    )


def _version(distribution: str) -> str:
    # Read from metadata: a CPU benchmark must not import triton only to print its version.
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


@functools.cache
def _commit() -> str:
    """The checkout's commit, `-dirty` when it differs; empty for an installed package."""
    if not (REPO_ROOT / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


# --- the clock ------------------------------------------------------------------------------------


def wall_clock_ms(call: Contender) -> float:
    """Milliseconds that one `call` takes on the CPU."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def time_interleaved(
    contenders: Mapping[str, Contender],
    *,
    rounds: int = 15,
    warmup: int = 2,
    budget_s: float | None = None,
    clock: Clock = wall_clock_ms,
) -> dict[str, Timing]:
    """Time every contender once per round and return each one's percentiles.

    The order turns by one each round, so none always runs behind the same neighbour. With
    `budget_s` the rounds end early once that many seconds have gone by, but not before the third.
    """
    assert contenders and rounds >= 1
    names = list(contenders)
    for _ in range(warmup):
        for name in names:
            contenders[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(clock(contenders[name]))
        if budget_s is not None and turn >= 2 and time.perf_counter() - start > budget_s:
            break
    return {name: percentiles(times) for name, times in samples.items()}


def percentiles(times_ms: Iterable[float]) -> Timing:
    """The 20th, 50th and 80th percentile, interpolated linearly between samples."""
    p20, p50, p80 = torch.quantile(
        torch.tensor(list(times_ms), dtype=torch.float64),
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64),
    ).tolist()
    return Timing(p20_ms=p20, p50_ms=p50, p80_ms=p80)
