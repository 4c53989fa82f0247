"""Where transformers' tests fail with ours in the place of sdpa, and why that is no fault.

An entry is used up only by a test that fails with ours and passes with stock sdpa. One that has
come to pass is reported too, so that this table never says more than it must.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Tests of some families, and what they ask that is no fault not to give."""

    test: str  # a test's name
    families: tuple[str, ...]
    reason: str


DIFFERENCES: tuple[Difference, ...] = ()


def reason_for(family: str, test: str) -> str | None:
    """Why this test may fail, None if it may not."""
    for known in DIFFERENCES:
        if family in known.families and known.test == test:
            return known.reason
    return None
