"""The verdict over transformers' own tests (scripts/upstream_tests.py), on outcomes made up
here."""

from __future__ import annotations

import json

import pytest
import upstream_tests
from upstream import differences, judge
from upstream.differences import Difference
from upstream.families import FAMILIES, inputs
from upstream.judge import Run

PASS, FAIL, SKIP = "passed", "failed", "skipped"


def run(calls: int = 9, **outcomes: str) -> Run:
    reasons = {test: "AssertionError: 1 != 2" for test, said in outcomes.items() if said == FAIL}
    return Run(outcomes, reasons, calls)


def test_all_passed() -> None:
    verdict = judge.judge("llama", run(test_a=PASS, test_b=SKIP), run(test_b=SKIP))
    assert verdict.good
    assert (verdict.passed, verdict.failed, verdict.skipped) == (1, 0, 1)


@pytest.mark.parametrize(
    ("ours", "stock", "good"),
    [
        (FAIL, PASS, False),
        (FAIL, SKIP, False),
        (FAIL, FAIL, True),
        (SKIP, PASS, False),
        (SKIP, FAIL, False),
        (SKIP, SKIP, True),
    ],
)
def test_what_did_not_pass(ours: str, stock: str, good: bool) -> None:
    """Only what stock sdpa does too is excused; nothing hides behind a skip."""
    verdict = judge.judge("llama", run(test_a=PASS, test_b=ours), run(test_b=stock))
    assert verdict.good is good
    assert ("UNEXPLAINED: test_b" in upstream_tests.line(verdict)) is not good
    assert verdict.stock_too == (["test_b"] if ours == stock == FAIL else [])


def test_a_run_without_ours_is_none() -> None:
    """Whatever passes, if our attention was never called it says nothing."""
    assert not judge.judge("llama", run(calls=0, test_a=PASS), run()).good


def test_known_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Difference(test="test_a", families=("llama",), reason="asks for sdpa's own error")
    monkeypatch.setattr(differences, "DIFFERENCES", (known,))
    excused = judge.judge("llama", run(test_a=FAIL), run(test_a=PASS))
    assert excused.good and excused.known == {"test_a": known.reason}
    assert not judge.judge("bert", run(test_a=FAIL), run(test_a=PASS)).good
    outdated = judge.judge("llama", run(test_a=PASS), run())
    assert not outdated.good and "OUTDATED: test_a" in upstream_tests.line(outdated)


def test_the_table_names_what_there_is() -> None:
    for known in differences.DIFFERENCES:
        assert known.reason and set(known.families) <= set(FAMILIES)
        assert known.test.startswith("test_")


@pytest.mark.parametrize("name", FAMILIES)
def test_families_fit_their_tests(name: str) -> None:
    """Less than a million parameters, rows of several lengths, every class there."""
    family = FAMILIES[name]
    largest = max(
        sum(p.numel() for p in made(family.get_config()).parameters())
        for made in family.model_classes()
    )
    assert largest < 1_000_000
    assert len(set(inputs(family)["attention_mask"].sum(1).tolist())) > 1


def test_misuse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        upstream_tests.main(["--families", "llama,nothing"])
    assert ended.value.code == 2
    assert "possible: llama, mistral" in capsys.readouterr().err
    monkeypatch.setattr(upstream_tests, "pinned_version", lambda: "4.0.0")
    assert upstream_tests.main([]) == 2
    assert "the tests are those of 4.0.0" in capsys.readouterr().err


def test_verdicts_are_json() -> None:
    verdict = judge.judge("llama", run(test_a=PASS), run())
    assert json.loads(json.dumps(verdict.to_dict()))["good"] is True
