"""From the outcomes of two runs to a verdict on one family."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .differences import reason_for


@dataclass(frozen=True)
class Run:
    """One pytest process: the outcome of each test by its name."""

    outcomes: dict[str, str]
    reasons: dict[str, str] = field(default_factory=dict)
    calls: int = 0

    def not_passed(self) -> list[str]:
        return sorted(test for test, outcome in self.outcomes.items() if outcome != "passed")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a family's run comes to."""

    family: str
    passed: int
    failed: int
    skipped: int
    calls: int
    stock_too: list[str]  # failed with stock sdpa as well
    known: dict[str, str]  # test: reason
    unexplained: dict[str, str]  # test: what it said
    outdated: list[str]  # listed as a difference, but passes

    @property
    def good(self) -> bool:
        return not self.unexplained and not self.outdated and self.calls > 0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "good": self.good}


def judge(family: str, ours: Run, stock: Run) -> Verdict:
    """`stock` needs the tests alone that did not pass with ours.

    A test that ours skips and stock does not counts as failed: nothing may hide behind a skip.
    """
    stock_too: list[str] = []
    known: dict[str, str] = {}
    unexplained: dict[str, str] = {}
    for test in ours.not_passed():
        outcome, theirs = ours.outcomes[test], stock.outcomes.get(test, "missing")
        if outcome == "skipped" == theirs:
            continue
        if outcome == "failed" == theirs:
            stock_too.append(test)
        elif (reason := reason_for(family, test)) is not None:
            known[test] = reason
        else:
            said = ours.reasons.get(test, "skipped, and not with stock sdpa")
            unexplained[test] = said
    passed = {test for test, outcome in ours.outcomes.items() if outcome == "passed"}
    counts = Counter(ours.outcomes.values())
    return Verdict(
        family=family,
        passed=counts["passed"],
        failed=counts["failed"],
        skipped=counts["skipped"],
        calls=ours.calls,
        stock_too=stock_too,
        known=known,
        unexplained=unexplained,
        outdated=sorted(test for test in passed if reason_for(family, test) is not None),
    )
