"""The rule of the attention grid: whatever is slower than PyTorch's best way has a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_attn_patch.bench.results import read_rows

from .attention import CPU_CSV, GPU_CSV, Problem, describe, grouped, is_ours
from .markdown import Row, table, unmeasured

ALLOWED = 1.10
# measured to know what pages cost; nobody could use it in the place of pages
NO_PEERS = ("contiguous_cache",)


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why rows are slower. A row is meant where every field that is given is the row's own."""

    why: str
    impl: str
    pass_: str | None = None
    extra: str | None = None
    dtype: str | None = None
    head_dim: str | None = None
    causal: str | None = None
    sizes: str | None = None
    window: str | None = None
    threads: str | None = None

    def fits(self, impl: str, problem: Problem) -> bool:
        given = {k: v for k, v in vars(self).items() if k not in ("why", "impl") and v is not None}
        return impl == self.impl and all(getattr(problem, k) == v for k, v in given.items())


REASONS: tuple[Reason, ...] = ()


def slower_table(results: Path, reasons: Sequence[Reason] | None = None) -> str:
    """Rows more than 10% behind their best peer and why; ValueError for one without a reason.

    Both the median and the 20th percentile must be behind: one busy moment is no finding.
    """
    rows = [row for name in (CPU_CSV, GPU_CSV) for row in read_rows(results / name)]
    rows = [row for row in rows if row["pass"] != "ceiling" and row["extra"] != "launch"]
    if not rows:
        return unmeasured("Attention", "make bench")
    lines, unexplained = [], []
    for problem, contenders in grouped(rows).items():
        peers = {n: row for n, row in contenders.items() if not is_ours(n) and n not in NO_PEERS}
        for impl, row in contenders.items():
            if not is_ours(impl) or not peers or (behind := _behind(row, peers)) is None:
                continue
            known = REASONS if reasons is None else reasons
            found = next((reason for reason in known if reason.fits(impl, problem)), None)
            what = f"{describe(problem)} {problem.dtype}"
            if problem.threads == "1":
                what += ", 1 thread"
            if found is None:
                unexplained.append(f"{impl}, {what}, on {problem.device}: {behind}")
            else:
                lines.append([what, f"`{impl}`", behind, found.why])
    if unexplained:
        raise ValueError(
            f"slower than {ALLOWED:.2f} x the best peer's time without a reason (REASONS in "
            f"scripts/tables/slower.py): {'; '.join(unexplained)}"
        )
    if not lines:
        return f"No row takes more than {ALLOWED:.2f} × the time of PyTorch's best way."
    return table(["work", "implementation", "behind", "why"], lines)


def _behind(row: Row, peers: dict[str, Row]) -> str | None:
    """`1.25 × sdpa_packed's time`, None where no peer is that far ahead."""
    best = min(peers, key=lambda name: float(peers[name]["p50_ms"]))
    ratios = [float(row[p]) / float(peers[best][p]) for p in ("p50_ms", "p20_ms")]
    return f"{ratios[0]:.2f} × {best}'s time" if min(ratios) > ALLOWED else None
