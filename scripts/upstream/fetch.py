"""The tests that transformers' source distribution carries, in a folder of their own.

Pip fetches the archive under a pinned hash; only the Python files directly in its `tests/` are
taken out, each under its bare name, so that nothing in it can land anywhere else. The models' own
test files (`tests/models/`) are not in the distribution: :mod:`.families` stands in for them.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

PINNED = Path(__file__).resolve().parents[2] / "constraints" / "their_tests.txt"
LARGEST = 16 << 20  # bytes of one test file


def fetch(folder: Path) -> tuple[Path, Path]:
    """The folder with their tests, and the wheel of `parameterized`, which they import.

    Raises:
        RuntimeError: not there, and pip could not fetch it.
        ValueError: an archive that does not hold what it should.
    """
    archive, wheel = (_download(name, folder) for name in ("transformers", "parameterized"))
    tests = folder / archive.name.removesuffix(".tar.gz") / "tests"
    if not tests.exists():
        unpack(archive, tests)
    return tests, wheel


def pinned_version() -> str:
    """The release of transformers whose tests are pinned."""
    return _pin("transformers")[0].split("==")[1]


def unpack(archive: Path, target: Path) -> None:
    """The Python files directly in the archive's `tests/`; `target` appears only when complete.

    Raises:
        ValueError: there are none, or one is larger than a test file can be.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stem = archive.name.removesuffix(".tar.gz")
    with tempfile.TemporaryDirectory(dir=target.parent) as name, tarfile.open(archive) as tar:
        partial = Path(name) / "tests"
        partial.mkdir()
        for member in tar:
            parts = PurePosixPath(member.name).parts
            direct = parts[:-1] == (stem, "tests") and parts[-1].endswith(".py")
            if not (direct and member.isreg()):  # links and devices are left out with the rest
                continue
            if member.size > LARGEST:
                raise ValueError(f"{archive.name}: {member.name} has {member.size} bytes")
            source = tar.extractfile(member)
            assert source is not None  # it is a regular file
            (partial / parts[-1]).write_bytes(source.read())
        if not any(partial.iterdir()):
            raise ValueError(f"{archive.name} has no Python files in its tests/")
        partial.rename(target)


def _pin(project: str) -> tuple[str, str]:
    """(`project==version`, sha256) as the constraints pin it."""
    found = re.search(rf"^({project}==\S+) --hash=sha256:(\w{{64}})$", PINNED.read_text(), re.M)
    assert found, f"{PINNED} does not pin {project}"
    return found[1], found[2]


def _download(project: str, folder: Path) -> Path:
    wanted, sha256 = _pin(project)
    there = _whole(folder, wanted, sha256)
    if there is None:
        print(f"downloading {wanted}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as name:
            requirements = Path(name) / "requirements.txt"
            requirements.write_text(f"{wanted} --hash=sha256:{sha256}\n")
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
            # the archive and not the wheel; pip reads its name and version with what is installed
            command += ["--no-binary", "transformers", "--no-build-isolation"]
            command += ["--no-deps", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
            subprocess.run(command, check=False)
        there = _whole(folder, wanted, sha256)
    if there is None:
        raise RuntimeError(
            f"{wanted} could not be fetched. Missing: a network with a Python package index, or "
            f"its file (sha256 {sha256}) put into {folder}"
        )
    return there


def _whole(folder: Path, wanted: str, sha256: str) -> Path | None:
    for path in folder.glob(wanted.replace("==", "-") + "*"):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
    return None
