"""What the plots of the experiments share."""

from __future__ import annotations

from typing import Any


def plain_log(axis: Any, at: str = "12346") -> None:
    """A logarithmic y axis with plain numbers where their first digit is one of `at`."""
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in at else "")
