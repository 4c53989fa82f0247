"""What we touch of transformers, and what happens on a release that lacks some of it.

Also run on transformers 5.17.
"""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

import hf_attn_patch
from hf_attn_patch.transformers_compat import continuous_cache as batching_cache
from hf_attn_patch.transformers_compat import private_names, releases
from hf_attn_patch.transformers_compat.private_names import (
    ANY,
    ATTRIBUTE,
    CLASS,
    DICT,
    EVERY,
    FUNCTION,
    INNER,
    PRIVATE_NAMES,
    Missing,
    PrivateName,
)

ROOT = Path(__file__).parents[2]


def outer() -> Any:
    window = 3

    def inner(x: int) -> int:
        return x + window

    return inner


class Owner:
    def __init__(self) -> None:
        self.pages = 1


def fake(**names: Any) -> types.ModuleType:
    module = types.ModuleType("fake_transformers")
    vars(module).update(names)
    return module


GOOD: tuple[tuple[str, dict[str, Any], Any], ...] = (
    ("f", {"looks": FUNCTION, "takes": ("a",)}, lambda a, b: a),
    ("T", {"looks": CLASS}, Owner),
    ("d", {"looks": DICT}, {}),
    ("x", {"looks": ANY}, None),
    ("outer.inner", {"looks": INNER, "takes": ("window",)}, outer),
    ("Owner.pages", {"looks": ATTRIBUTE}, Owner),
)


@pytest.mark.parametrize(("name", "options", "value"), GOOD, ids=[g[0] for g in GOOD])
def test_what_a_row_accepts_and_what_not(name: str, options: Any, value: Any) -> None:
    row = PrivateName(module="fake_transformers", name=name, **options)
    top = name.split(".")[0]
    assert row.wrong(fake(**{top: value}), thorough=True) is None
    assert row.wrong(fake(), thorough=True) == "is gone"
    if options["looks"] != ANY:
        assert row.wrong(fake(**{top: 7}), thorough=options["looks"] != ATTRIBUTE) or (
            options["looks"] == ATTRIBUTE
        )


def test_what_is_there_and_different() -> None:
    def row(name: str, **options: Any) -> PrivateName:
        return PrivateName(module="fake_transformers", name=name, **options)

    module = fake(f=lambda b: b, d=[], outer=outer, Owner=Owner)
    assert row("f", looks=FUNCTION, takes=("a", "b")).wrong(module) == "takes no a"
    assert row("d", looks=DICT).wrong(module) == "is a list and no dict"
    assert row("d", looks=FUNCTION).wrong(module) == "is no function"
    assert row("outer.other", looks=INNER).wrong(module) == "is gone"
    gone = row("outer.inner", looks=INNER, takes=("sliding_window",)).wrong(module)
    assert gone == "does not close over sliding_window"
    assert row("Owner.blocks", looks=ATTRIBUTE).wrong(module, thorough=True) == "is not set"
    assert row("Owner.blocks", looks=ATTRIBUTE).wrong(module) is None  # no source read on import


def test_every_name_is_there_in_this_release() -> None:
    number, missing = private_names.look_at_all()
    assert missing == []
    assert number == len(list(private_names.rows())) > 25


def test_rows_of_releases() -> None:
    release = releases.installed("transformers")
    assert release is not None
    assert releases.short(release) == ".".join(transformers.__version__.split(".")[:2])
    for row in PRIVATE_NAMES:
        assert row.without and row.since >= (5, 17) and set(row.needed_by) <= set(EVERY)
        assert row.of_release(row.since)
        assert row.until is None or not row.of_release((row.until[0], row.until[1] + 1))
    assert {i.name for i in hf_attn_patch.list_implementations()} == set(EVERY)


# --- a release that lacks something ---------------------------------------------------------------


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let names of transformers be missing, and register anew."""
    monkeypatch.setattr(private_names, "_missing", {})
    monkeypatch.setattr(private_names, "_said", set())

    def lack(*full_names: str) -> None:
        rows = {row.full_name: row for row in PRIVATE_NAMES}
        hf_attn_patch.unregister()
        private_names._missing.update({rows[name]: "is gone" for name in full_names})
        hf_attn_patch.register()

    yield lack
    private_names._missing.clear()
    hf_attn_patch.register()


LAZY = "transformers.modeling_flash_attention_utils._lazy_imports"


def test_what_is_missing_is_refused_and_the_rest_works(without: Any) -> None:
    without(LAZY)
    assert hf_attn_patch.is_registered("triton_fa2")
    assert not hf_attn_patch.is_registered("triton_paged_flash2")
    with pytest.raises(ValueError, match=rf"{re.escape(LAZY)} is gone.*continuous batching.*<="):
        hf_attn_patch.register(["triton_paged_flash2"])
    config = transformers.LlamaConfig()
    refused = hf_attn_patch.check(config, "cpu", "triton_paged_flash2")
    assert not refused.ok and LAZY in refused.reason and "pip install" in refused.fix
    assert hf_attn_patch.check(config, "cpu", "triton_fa2").ok


def test_without_the_registry_nothing_is_registered(without: Any) -> None:
    without("transformers.modeling_utils.AttentionInterface._global_mapping")
    assert not any(hf_attn_patch.is_registered(name) for name in EVERY)
    with pytest.raises(ValueError, match="no implementation can be registered"):
        hf_attn_patch.register(["triton_fa2"])


def test_falcon_without_its_table(without: Any) -> None:
    from transformers.models.falcon import modeling_falcon  # looked at now, not in between

    without(f"{modeling_falcon.__name__}.FALCON_ATTENTION_CLASSES")
    config = transformers.FalconConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="Falcon is refused"):
        transformers.FalconForCausalLM._from_config(config, attn_implementation="triton_fa2")
    private_names._missing.clear()  # negative control
    transformers.FalconForCausalLM._from_config(config, attn_implementation="triton_fa2")


def test_pages_that_lie_elsewhere() -> None:
    from transformers.generation.continuous_batching import PagedAttentionCache

    cache = PagedAttentionCache.__new__(PagedAttentionCache)
    cache.layer_to_allocator = {0: types.SimpleNamespace(index=0)}
    with pytest.raises(ValueError, match=r"_kv_page_views.*hf-attn check.*generate\(\)"):
        batching_cache.layer_pages(cache, 0)


def test_one_warning(without: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_attn_patch.register()  # what that imports has been looked at
    said: list[str] = []
    monkeypatch.setattr(private_names.logger, "warning", said.append)
    private_names.warn()
    assert said == []  # a tested release with everything in place
    monkeypatch.setattr(private_names, "NEWEST_TRANSFORMERS", (5, 16))
    without(LAZY)
    private_names.warn()
    private_names.warn()
    (warning,) = said
    assert "newer than" in warning and LAZY in warning
    assert "names with 'flash' cannot be served" in warning


IMPORT = """
import sys
import transformers
transformers.__version__ = "5.99.0"
import hf_attn_patch
assert "torch" not in sys.modules, "importing must stay cheap"
from hf_attn_patch.transformers_compat import private_names
private_names.PRIVATE_NAMES += (private_names.PrivateName(
    module="transformers.masking_utils", name="_dropped", looks=private_names.FUNCTION,
    without="nothing expands latents", needed_by=("triton_mla",)),)
import transformers.modeling_utils
import transformers.models.falcon.modeling_falcon
print(hf_attn_patch.is_registered("triton_fa2"), hf_attn_patch.is_registered("triton_mla"))
"""


def test_a_newer_release_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "True False"
    assert done.stderr.count("newer than what hf-attn-patch was tested with") == 1
    assert "masking_utils._dropped is gone: nothing expands latents" in done.stderr


# --- releases -------------------------------------------------------------------------------------


def pin(file: str, package: str) -> tuple[int, int]:
    if (file, package) == ("oldest.txt", "triton"):
        file = "oldest-triton.txt"  # against the pin of torch: see there
    text = (ROOT / "constraints" / file).read_text()
    found = re.search(rf"^{package}==(\d+)\.(\d+)", text, re.MULTILINE)
    assert found
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("tested", releases.TESTED, ids=lambda t: t.package)
def test_the_constraints_are_the_ends_of_what_is_tested(tested: releases.Tested) -> None:
    assert pin("oldest.txt", tested.package) == tested.oldest
    assert pin("cpu.txt", tested.package) <= tested.newest


@pytest.mark.parametrize(
    ("version", "tested", "remark"),
    [
        ("5.99.0", False, "newer than tested"),
        ("5.16.2", False, "older than tested"),
        ("5.24.0.dev0", True, "tested (5.17, "),
        ("5.20.1", False, "between releases"),
        ("nonsense", False, "of unknown release"),
        (None, False, "not installed"),
    ],
)
def test_releases(
    version: str | None, tested: bool, remark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "_version", lambda package: version)
    found = releases.releases()[0]
    assert (found.version, found.tested) == (version, tested) and remark in found.remark


def test_missing_says_what_does_not_work() -> None:
    row = PrivateName(module="m", name="n", looks=ANY, without="nothing works")
    assert str(Missing(row, "is gone")) == "m.n is gone: nothing works"
