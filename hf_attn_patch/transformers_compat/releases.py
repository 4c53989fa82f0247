"""Which releases of the packages below us were tested. Imports nothing heavy."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as metadata_version

NEWEST_TRANSFORMERS = (5, 24)


@dataclass(frozen=True, kw_only=True)
class Tested:
    """The releases of a package that the tests ran on, oldest first."""

    package: str
    releases: tuple[tuple[int, int], ...]
    where: str = ""  # if not everywhere

    @property
    def oldest(self) -> tuple[int, int]:
        return self.releases[0]

    @property
    def newest(self) -> tuple[int, int]:
        return self.releases[-1]


# The pins of constraints/ are the ends; a test holds them together.
TESTED: tuple[Tested, ...] = (
    Tested(
        package="transformers",
        releases=((5, 17), (5, 23), NEWEST_TRANSFORMERS),
    ),
    Tested(package="torch", releases=((2, 13),), where=" on a CPU"),
    Tested(package="triton", releases=((3, 6), (3, 7)), where=" in its interpreter, on a CPU"),
)


@dataclass(frozen=True)
class Release:
    """What is installed of a package, and whether it was tested."""

    package: str
    version: str | None  # None: not installed
    tested: bool
    remark: str


def short(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


def installed(package: str) -> tuple[int, int] | None:
    """(major, minor) of what is imported, or else installed; None if that cannot be told."""
    text = _version(package)
    numbers = [part for part in (text or "").split("+")[0].split(".")[:2] if part.isdigit()]
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 else None


def releases() -> list[Release]:
    """Of every package of the table."""
    return [_release(tested) for tested in TESTED]


def _release(tested: Tested) -> Release:
    text, found = _version(tested.package), installed(tested.package)
    span = ", ".join(short(release) for release in tested.releases)
    if text is None:
        return Release(tested.package, None, False, f"not installed; tested: {span}")
    if found is None:
        return Release(tested.package, text, False, f"of unknown release; tested: {span}")
    if found > tested.newest:
        return Release(tested.package, text, False, f"newer than tested ({span})")
    if found < tested.oldest:
        return Release(tested.package, text, False, f"older than tested ({span})")
    if found not in tested.releases:
        return Release(tested.package, text, False, f"between releases that were tested ({span})")
    return Release(tested.package, text, True, f"tested{tested.where} ({span})")


def _version(package: str) -> str | None:
    # what is imported counts: another copy may come first on the path
    module = sys.modules.get(package)
    if module is not None and hasattr(module, "__version__"):
        return str(module.__version__)
    try:
        return metadata_version(package)
    except PackageNotFoundError:
        return None
