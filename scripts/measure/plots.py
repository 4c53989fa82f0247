"""What the plots of the experiments share."""

from __future__ import annotations

from typing import Any


def plain_log(axis: Any) -> None:
    """A logarithmic y axis with plain numbers at 1, 2, 3, 4 and 6 of each decade."""
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "12346" else "")
