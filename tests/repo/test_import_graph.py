"""No circles among the modules of a package, and a room imports only the rooms below it.

Every import counts, also one inside a function or for types alone: what only works because it runs
late is a circle all the same. A room is a folder or a file directly in a package.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"hf_attn_patch": "", "hf_attn_kernels": "kernels", "hf_attn_converters": "converters"}
SELF = "__init__"  # the package's own file: what its users import

# From the top down. A room imports only those that come after it; rooms of one line know nothing of
# each other.
ROOMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "hf_attn_patch": (
        ("cli",),
        ("bench",),
        ("compare", "estimate"),
        ("loading",),
        (SELF,),
        ("import_hooks", "checks", "swa"),
        ("registry",),
        ("registration",),
        ("models",),
        ("attention",),
        ("cache",),
        ("masking",),
        ("swa_config",),
        ("transformers_compat", "capabilities", "progress"),
    ),
    "hf_attn_kernels": (
        (SELF,),
        ("api", "mla"),
        ("kvcache",),
        ("dispatch",),
        ("cpu", "triton"),
        ("cache_validation",),
        ("validation",),
        ("append", "device"),
        ("reference",),
        ("problem",),
        ("launch_cache", "batch_invariance", "fp8", "namespace"),
    ),
    "hf_attn_converters": (
        (SELF,),
        ("convert",),
        ("uptrain", "writer"),
        ("card",),
        ("verify", "layerwise"),
        ("target_layer",),
        ("mla",),
        ("heads",),
        ("conversion",),
        ("calibration",),
        ("merge",),
        ("families",),
        ("models", "io"),
        ("precision",),
    ),
}


def modules(package: str, root: Path = ROOT) -> dict[str, Path]:
    """The package's modules by their full names."""
    folder = root / SOURCES[package] / package
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[str, str | None, int]]:
    """(module, name or None, line) of each import in `source`; `module` is the importing one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") if node.level else []
            above = node.level - (1 if is_package else 0)
            base = parts[: len(parts) - above] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield target, alias.name, node.lineno


def graph(package: str, root: Path = ROOT) -> dict[str, dict[str, int]]:
    """Which modules of its package each module imports, and in which line first."""
    known = modules(package, root)
    edges: dict[str, dict[str, int]] = {module: {} for module in known}
    for module, path in known.items():
        is_package = path.name == "__init__.py"
        for target, name, line in imported(path.read_text(), module, is_package):
            full = f"{target}.{name}" if name else target
            found = full if full in known else target
            if found in known and found != module:
                edges[module].setdefault(found, line)
    return edges


def circles(edges: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """Sets of modules that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in edges[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            at = stack.index(module)
            members, stack[at:] = stack[at:], []
            if len(members) > 1:
                found.append(sorted(members))

    for module in edges:
        if module not in index:
            visit(module)
    return sorted(found)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else SELF


def arrows_up(package: str, edges: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Imports of a room that is not below the importing one."""
    floors = {room: i for i, floor in enumerate(ROOMS[package]) for room in floor}
    wrong = []
    for module, targets in edges.items():
        for target, line in targets.items():
            here, there = room_of(module), room_of(target)
            if here != there and floors.get(there, -1) <= floors.get(here, len(floors)):
                wrong.append(f"{module}:{line} imports {target}, which is not below it")
    return wrong


@pytest.mark.parametrize("package", SOURCES)
def test_no_circles(package: str) -> None:
    assert circles(graph(package)) == []


@pytest.mark.parametrize("package", SOURCES)
def test_rooms_import_only_rooms_below(package: str) -> None:
    assert arrows_up(package, graph(package)) == []


@pytest.mark.parametrize("package", SOURCES)
def test_every_room_has_its_floor(package: str) -> None:
    listed = [room for floor in ROOMS[package] for room in floor]
    assert len(listed) == len(set(listed))
    assert set(listed) == {room_of(module) for module in modules(package)}


LAZY = "def f():\n    from .b import x"
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import b"


@pytest.mark.parametrize("back", [LAZY, TYPES, "import hf_attn_kernels.b", "from .b import x"])
def test_a_circle_is_found(back: str, tmp_path: Path) -> None:
    folder = tmp_path / "kernels" / "hf_attn_kernels"
    folder.mkdir(parents=True)
    files = {
        "__init__": "from . import a",
        "a": back,
        "b": "from .c import x",
        "c": "from . import a",
    }
    for name, source in files.items():
        (folder / f"{name}.py").write_text(source)
    edges = graph("hf_attn_kernels", tmp_path)
    assert circles(edges) == [[f"hf_attn_kernels.{name}" for name in "abc"]]
    (folder / "c.py").write_text("x = 1")
    assert circles(graph("hf_attn_kernels", tmp_path)) == []


def test_an_arrow_up_is_found() -> None:
    """From a lower room, from one beside it on its floor, and from one without a floor."""
    up = {"hf_attn_kernels.problem": {"hf_attn_kernels.api": 3}}
    beside = {"hf_attn_kernels.cpu.mla": {"hf_attn_kernels.triton.mla": 1}}
    unknown = {"hf_attn_kernels.api": {"hf_attn_kernels.new": 1}}
    for edges in (up, beside, unknown):
        [found] = arrows_up("hf_attn_kernels", edges)
        assert "not below" in found
    down = {"hf_attn_kernels.api": {"hf_attn_kernels.problem": 1}}
    inside = {"hf_attn_kernels.cpu.mla": {"hf_attn_kernels.cpu.pages": 1}}
    assert arrows_up("hf_attn_kernels", {**down, **inside}) == []
