"""Hold every pinned package to the database of known vulnerabilities (osv.dev): `make audit`.

    python scripts/audit.py [FILE ...]

Asks pip-audit for each file of constraints/, installing nothing. Exit code 0: asked, and clean;
1: a pinned version is vulnerable; 2: nothing is known, as the service or pip-audit did not answer.
pip-audit's own default service skips what it cannot find and ends with 0, so a machine without a
network would look clean.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="by default all of constraints/")
    parser.add_argument("--osv-url", help="another service with the interface of osv.dev")
    args = parser.parse_args(argv)
    options = ["--osv-url", args.osv_url] if args.osv_url else []
    worst = CLEAN
    for pins in args.files or sorted((ROOT / "constraints").glob("*.txt")):
        try:
            found = ask(pins, options)
        except RuntimeError as error:
            print(f"{pins.name}: NOT AUDITED: {error}", file=sys.stderr)
            return UNKNOWN
        vulnerable = [entry for entry in found if entry["vulns"]]
        print(f"{pins.name}: {len(found)} packages, {len(vulnerable)} with known vulnerabilities")
        for entry in vulnerable:
            for vulnerability in entry["vulns"]:
                fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
                print(
                    f"  {entry['name']} {entry['version']}: {vulnerability['id']}, fixed in {fixed}"
                )
            worst = VULNERABLE
    return worst


def ask(pins: Path, options: Sequence[str] = ()) -> list[dict[str, Any]]:
    """pip-audit's entry of each package that `pins` holds for this Python.

    Raises RuntimeError where there is no answer for every one of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv", *options]
        command += ["--no-deps", "--disable-pip", "--progress-spinner", "off"]
        command += ["--format", "json", "--output", str(answer), "--requirement", str(pins)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not answer.exists():  # exit code 1 alone may also mean that something was found
            said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
            raise RuntimeError(f"pip-audit gave no answer: {said}")
        entries: list[dict[str, Any]] = json.loads(answer.read_text())["dependencies"]
    if skipped := [entry["name"] for entry in entries if "skip_reason" in entry]:
        raise RuntimeError(f"pip-audit skipped {', '.join(skipped)}")
    return entries


if __name__ == "__main__":
    sys.exit(main())
