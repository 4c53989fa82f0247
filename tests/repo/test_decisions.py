"""The decisions of docs/adr/: each page is whole and listed; those that no other test holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from tiny_models import MODELS, build, tokens

from hf_attn_patch import PagedCache

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))
SECTIONS = ["Context", "Decision", "Consequences", "Held by"]
KERNELS = ROOT / "kernels" / "hf_attn_kernels"
STANDARD = re.compile(r'#include (<[a-z_]+>|<(immintrin|omp)\.h>|"\w+\.h")')


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_why_and_what_holds_it(page: Path) -> None:
    text = page.read_text()
    assert re.match(rf"# {int(page.stem[:4])}\. .+\n\n\*\*Status\*\*: (accepted|replaced)", text)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    named = re.findall(r"`(tests/[\w/]+\.py)`", text.partition("## Held by")[2])
    assert named and all((ROOT / file).is_file() for file in named)


def test_every_page_is_listed() -> None:
    listed = re.findall(r"^\| \[\d\]\((.+?)\)", (ROOT / "docs/adr/index.md").read_text(), re.M)
    menu = re.findall(r"adr/(\d.+\.md)", (ROOT / "mkdocs.yml").read_text())
    assert listed == menu == [page.name for page in PAGES] != []


def requirements(listed: str) -> list[Requirement]:
    return [Requirement(quoted) for quoted in re.findall(r'"([^"]+)"', listed)]


def foreign_includes(source: str) -> list[str]:
    """The `#include` lines that are neither the standard library's nor the extension's own."""
    lines = re.findall(r"^\s*#\s*include.*$", source, re.MULTILINE)
    return [line for line in lines if not STANDARD.fullmatch(line.strip())]


def test_the_extension_includes_no_header_of_torch() -> None:
    sources = sorted((KERNELS / "cpu" / "csrc").iterdir())
    assert sources
    for source in sources:
        assert foreign_includes(source.read_text()) == [], source.name
        assert source.suffix in (".cpp", ".h"), source.name
    for wrong in ("<torch/extension.h>", "<ATen/ATen.h>", "<Python.h>", '"ATen/cpu/vec/vec.h"'):
        assert foreign_includes(f"#include <vector>\n#include {wrong}") == [f"#include {wrong}"]


def test_nothing_is_tuned_at_run_time() -> None:
    tuned = re.compile(r"\bautotune\b|\bheuristics\b")
    sources = sorted(KERNELS.rglob("*.py"))
    assert len(sources) > 30
    assert [path.name for path in sources if tuned.search(path.read_text())] == []
    assert tuned.search("@triton.autotune(configs=[], key=[])")


def test_transformers_is_bounded_by_its_next_major_release_and_torch_by_none() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    [listed] = re.findall(r"^dependencies = \[(.+?)^\]", text, re.MULTILINE | re.DOTALL)
    bounds = {r.name: {s.operator: s.version for s in r.specifier} for r in requirements(listed)}
    assert bounds["transformers"].pop("<") == "6"
    for name, bound in bounds.items():
        assert set(bound) == {">="}, name


def test_update_of_a_paged_cache_writes_nothing() -> None:
    model = build(next(spec for spec in MODELS if spec.id == "llama"), "triton_fa2")
    cache = PagedCache(model)
    keys = torch.randn(1, 2, 40, 16)
    given = (keys, keys + 1)
    layer = cache.layers[0]
    marked, values = layer.update(*given)
    assert torch.equal(marked, keys) and values is given[1]
    assert marked.data_ptr() == keys.data_ptr()  # not a copy out of pages
    assert layer.k_pages is None and cache.stats().used == 0
    cache = PagedCache(model)
    with torch.no_grad():  # control: the attention call writes
        model(tokens(1, 40), past_key_values=cache)
    assert cache.layers[0].k_pages is not None and cache.stats().used == 3
