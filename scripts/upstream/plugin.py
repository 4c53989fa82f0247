"""Inside pytest (`-p upstream.plugin`): ours in the place of sdpa, outcomes written down.

Touches transformers' two tables under the name of somebody else, which `hf_attn_patch.register`
refuses to do: for this process only.
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# Not in the distribution. Their tests of export and generation are left out with them.
ABSENT = {
    "tests.exporters.test_export": "ExportTesterMixin",
    "tests.generation.test_utils": "GenerationTesterMixin",
}
PLACE = "sdpa"


@dataclass
class Chosen:
    """What this run was asked for, and what came of it."""

    family: str = ""
    in_place: str = ""  # implementation in the place of sdpa; "": transformers' own
    tests: Path = Path()
    wheel: Path = Path()
    calls: int = 0  # of our attention function
    outcomes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


chosen = Chosen()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("their tests")
    group.addoption("--family", required=True)
    group.addoption("--in-place", default="", help="implementation to put in the place of sdpa")
    group.addoption("--maskless", action="store_true", help="negative control: no mask is made")
    group.addoption("--their-tests", type=Path, required=True)
    group.addoption("--their-wheel", type=Path, required=True)
    group.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    chosen.family = config.getoption("--family")
    chosen.tests = config.getoption("--their-tests")
    chosen.wheel = config.getoption("--their-wheel")
    chosen.in_place = config.getoption("--in-place")
    if chosen.in_place:
        put_in_place(chosen.in_place, maskless=config.getoption("--maskless"))


def make_importable() -> None:
    """Their `tests` as a package, whatever else is called so, and empty classes for the absent."""
    package = types.ModuleType("tests")
    package.__path__ = [str(chosen.tests)]
    sys.modules["tests"] = package
    for name, mixin in ABSENT.items():
        parent = types.ModuleType(name.rpartition(".")[0])
        parent.__path__ = []
        module = types.ModuleType(name)
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules |= {parent.__name__: parent, name: module}
    sys.path.append(str(chosen.wheel))  # last: whatever is installed goes before


class Strict:
    """numpy for their module, where a mean of matches becomes the least of them.

    Their comparison with eager lets one row in five differ, and has padding in one row of seven: a
    lost padding mask passes it. Here every row must match.
    """

    def __getattr__(self, name: str) -> Any:
        import numpy

        return numpy.min if name == "mean" else getattr(numpy, name)


def put_in_place(name: str, *, maskless: bool = False) -> None:
    """Whoever asks transformers for sdpa gets the implementation `name` of this package.

    `maskless`: without its mask function, so that padding is attended to.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    from hf_attn_patch.models import ADAPTERS
    from hf_attn_patch.registry import find

    impl = find(name)
    AttentionInterface.register(PLACE, _counted(impl.forward))
    AttentionMaskInterface.register(PLACE, _no_mask if maskless else impl.mask)
    if chosen.family in ADAPTERS:
        assert chosen.family == "falcon"  # which takes its attention from a table of classes
        from transformers.models.falcon import modeling_falcon

        ADAPTERS["falcon"].install(name)
        classes: dict[str, Any] = modeling_falcon.FALCON_ATTENTION_CLASSES
        ours = classes[name]
        classes[PLACE] = type(ours.__name__, (ours,), {"forward": _counted(ours.forward)})


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _counted(forward: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def counting(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            chosen.calls += 1
        return forward(*args, **kwargs)

    return counting


def pytest_runtest_setup(item: pytest.Item) -> None:
    from transformers import set_seed

    set_seed(0)  # their inputs are random: the same for each implementation, whatever ran before


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.rpartition("::")[2]
    if report.when == "call" or report.outcome != "passed":
        chosen.outcomes[name] = report.outcome
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            chosen.reasons[name] = crash.message if crash else str(report.longrepr)


def pytest_sessionfinish(session: pytest.Session) -> None:
    found = {"calls": chosen.calls, "outcomes": chosen.outcomes, "reasons": chosen.reasons}
    partial = session.config.getoption("--outcomes").with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.rename(session.config.getoption("--outcomes"))
