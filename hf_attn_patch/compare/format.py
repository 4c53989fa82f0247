"""Numbers for readers."""

from __future__ import annotations


def number(value: float | None) -> str:
    """Three or four significant digits; empty for None."""
    if value is None:
        return ""
    if 0 < abs(value) < 1e-6:
        return "<1e-6" if value > 0 else ">-1e-6"
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e9:
        return f"{value:.1e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 or value == 0 else f"{value:.3f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def size(count: float | None) -> str:
    """Bytes for a reader: 538 MB; empty for None."""
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def times(ratio: float) -> str:
    """A factor: "× 1.25", "× 0.125"."""
    if ratio < 1:
        return f"× {ratio:.3g}"
    return f"× {ratio:.2f}" if ratio < 100 else f"× {number(ratio)}"
