"""scripts/audit.py: clean only where every pinned package was asked about."""

from __future__ import annotations

from pathlib import Path

import audit
import pytest

# A pip-audit that finds what ANSWER says, or fails as the real one does without a network.
PIP_AUDIT = """
import json, os, pathlib, sys
assert sys.argv[sys.argv.index("--vulnerability-service") + 1] == "osv", sys.argv
pins = pathlib.Path(sys.argv[sys.argv.index("--requirement") + 1])
if os.environ["ANSWER"] == "no network":
    sys.exit("ConnectionError: cannot reach the service")
found = {name: {"name": name, "version": version, "vulns": []}
         for name, version in (line.split("==") for line in pins.read_text().split())}
if os.environ["ANSWER"] == "vulnerable":
    found["beta"]["vulns"] = [{"id": "PYSEC-1", "fix_versions": ["2.1", "3.0"]}]
if os.environ["ANSWER"] == "skipped":
    found["beta"] = {"name": "beta", "skip_reason": "not found"}
answer = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
answer.write_text(json.dumps({"dependencies": list(found.values()), "fixes": []}))
sys.exit(os.environ["ANSWER"] == "vulnerable")
"""

CASES = {
    "clean": (audit.CLEAN, "2 packages, 0 with known vulnerabilities"),
    "vulnerable": (audit.VULNERABLE, "beta 2.0: PYSEC-1, fixed in 2.1, 3.0"),
    "skipped": (audit.UNKNOWN, "NOT AUDITED: pip-audit skipped beta"),
    "no network": (audit.UNKNOWN, "NOT AUDITED: pip-audit gave no answer: ConnectionError"),
}


@pytest.mark.parametrize("answer", CASES)
def test_the_exit_code_says_what_is_known(
    answer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "pip_audit.py").write_text(PIP_AUDIT)
    pins = tmp_path / "pins.txt"
    pins.write_text("alpha==1.0\nbeta==2.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ANSWER", answer)
    code, said = CASES[answer]
    assert audit.main([str(pins)]) == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_every_file_of_pins_is_asked_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "ask", lambda pins, options: [])
    assert audit.main([]) == audit.CLEAN
    files = sorted(file.name for file in (audit.ROOT / "constraints").iterdir())
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == files
