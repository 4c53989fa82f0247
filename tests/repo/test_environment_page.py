"""docs/environment.md names every environment variable that the sources do, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from hf_attn_kernels.triton.options import WAYS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "environment.md"
FOLDERS = ("hf_attn_patch", "kernels", "converters", "scripts", "tests", "examples", ".github")
FILES = ("Makefile", ".ci/run", "pyproject.toml")
SUFFIXES = {".py", ".h", ".cpp", ".yml", ".yaml", ".ipynb", ".md", ".sh"}
OURS = re.compile(r"\bHF_ATTN_[A-Z0-9_]*[A-Z0-9]\b")
READ = re.compile(r'\benviron(?:ment)?(?:\.get\(|\[)"([A-Z][A-Z0-9_]*)"|\bgetenv\("(\w+)"')


def sources() -> list[Path]:
    found = [ROOT / file for file in FILES]
    for folder in FOLDERS:
        found += (path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    return sorted(path for path in found if path != Path(__file__).resolve())


def names(paths: Iterable[Path]) -> set[str]:
    """Every name of ours that one of the files writes."""
    return {name for path in paths for name in OURS.findall(path.read_text())}


def read(source: str) -> set[str]:
    """The variables that a source asks for by a literal name."""
    return {python or c for python, c in READ.findall(source)}


def test_the_page_and_the_sources_name_the_same_variables() -> None:
    first_columns = re.findall(r"^\| `(HF_ATTN_\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert len(first_columns) == len(set(first_columns)), "one row for each"
    assert set(first_columns) == names(sources())
    assert names([PAGE, *sorted((ROOT / "docs").rglob("*.md"))]) == set(first_columns)


def test_what_the_packages_read_is_on_the_page() -> None:
    """Those of other programs too, where the packages ask for them by name."""
    text = PAGE.read_text()
    packages = [path for path in sources() if "tests" not in path.relative_to(ROOT).parts]
    asked = set().union(*(read(path.read_text()) for path in packages))
    assert {"CXX", "TRITON_INTERPRET", "HF_ATTN_DEBUG"} <= asked
    assert [name for name in sorted(asked) if f"`{name}`" not in text] == []


def test_the_page_names_every_code_path() -> None:
    [row] = [line for line in PAGE.read_text().splitlines() if "| `HF_ATTN_TRITON_WITHOUT`" in line]
    assert set(re.findall(r"`(\w+)`", row.split(" | ")[1])) == set(WAYS)


def test_a_new_variable_is_seen(tmp_path: Path) -> None:
    """Control: in code, in C++ and in a name that is a constant."""
    new = "_".join(["HF", "ATTN", "NEW"])
    for line in (f'os.environ.get("{new}")', f'getenv("{new}")', f'SWITCH = "{new}"', f"{new}=1 x"):
        (tmp_path / "a.py").write_text(line)
        assert names([tmp_path / "a.py"]) == {new}
    assert read('os.environ["A_B"] + os.environ.get("C", "") + getenv("D1")') == {"A_B", "C", "D1"}
