"""New keys that the CPU extension writes by itself: the caches that torch's operators would leave.
And calls that it runs again as it ran one of their kind before.

Where a page is missing nothing is written: tests/kernels/test_kvcache.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_kernels import api, flash_attn_with_kvcache, launch_cache
from hf_attn_kernels.cpu import extension

PAGE, BLOCKS = 16, 5


@dataclass(frozen=True)
class Case:
    """Rows of `lengths` keys get `new` keys and `queries` queries."""

    lengths: tuple[int, ...]
    queries: int = 1
    new: int = 1
    dtype: torch.dtype = torch.float32
    dims: tuple[int, int] = (32, 32)
    paged: bool = True
    moved: bool = False
    leftpad: tuple[int, ...] = ()
    window: int = -1
    extras: bool = False  # ALiBi and sink logits
    rotary: bool = False


CASES = {
    "one": Case((20,)),
    "empty-row": Case((0, 7)),
    "bfloat16": Case((40, 3), dtype=torch.bfloat16),
    "float16": Case((16, 31), dtype=torch.float16, dims=(64, 16)),
    "over-a-page-border": Case((15, 30, 62), queries=4, new=4),
    "more-keys-than-queries": Case((5, 20), queries=2, new=35),
    "more-queries-than-keys": Case((9, 20), queries=4, new=1),
    "window": Case((50, 20), window=17),
    "contiguous": Case((50, 20), paged=False, dims=(16, 48)),
    "other-rows": Case((50, 20, 1), paged=False, moved=True, queries=2, new=2),
    "left-padding": Case((50, 20), paged=False, leftpad=(7, 20)),
    "extras": Case((50, 20), extras=True),
    "rotary": Case((50, 20), rotary=True, queries=2, new=2),
}


def arguments(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    batch, (dim, dim_v) = len(case.lengths), case.dims
    shape = (batch * BLOCKS + 1, PAGE) if case.paged else (batch + 1, PAGE * BLOCKS)

    def heads_first(count: int, tokens: int, size: int) -> Tensor:
        """As a model's layer has them: heads before tokens, seen the other way round."""
        return torch.randn(batch, count, tokens, size).to(case.dtype).transpose(1, 2)

    def integers(numbers: Any) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    found: dict[str, Any] = {
        "q": heads_first(4, case.queries, dim),
        "k_cache": torch.randn(*shape, 2, dim).to(case.dtype),
        "v_cache": torch.randn(*shape, 2, dim_v).to(case.dtype),
        "k": heads_first(2, case.new, dim),
        "v": heads_first(2, case.new, dim_v),
        "cache_seqlens": integers(case.lengths),
        "causal": True,
        "window_size": (case.window, 0),
    }
    if case.paged:
        pages = torch.randperm(batch * BLOCKS).int() + 1
        found["block_table"] = pages.view(batch, BLOCKS)
        if case.window >= 0:  # hidden by it
            found["block_table"][0, : (case.lengths[0] - case.window) // PAGE] = -1
    else:
        rows = range(batch, 0, -1) if case.moved else range(batch)
        found["cache_batch_idx"] = integers(list(rows))
    if case.leftpad:
        found["cache_leftpad"] = integers(case.leftpad)
    if case.extras:
        found |= {"alibi_slopes": torch.rand(batch, 4), "s_aux": torch.randn(4)}
    if case.rotary:
        angle = torch.rand(PAGE * BLOCKS, dim // 2)
        found |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
    return found


def caches_after(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What the call leaves in copies of its caches, and its answer."""
    k_cache, v_cache = call["k_cache"].clone(), call["v_cache"].clone()
    out = flash_attn_with_kvcache(**call | {"k_cache": k_cache, "v_cache": v_cache})
    assert isinstance(out, Tensor)
    return k_cache, v_cache, out


@pytest.mark.parametrize("name", CASES)
def test_the_extension_writes_what_torch_writes(name: str, with_extension: list[object]) -> None:
    call = arguments(CASES[name])
    *ours, out = caches_after(call)
    assert len(with_extension) == 1
    with extension.left_out():
        *theirs, expected = caches_after(call)
    assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(ours[0], call["k_cache"]) and not torch.equal(ours[1], call["v_cache"])
    tolerance = 1e-5 if out.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_control_elsewhere(with_extension: list[object]) -> None:
    """One place further is seen, in the caches and in the answer."""
    call = arguments(CASES["over-a-page-border"])
    further = call | {"cache_seqlens": call["cache_seqlens"] + 1}
    *ours, out = caches_after(call)
    with extension.left_out():
        *theirs, other = caches_after(further)
    assert not any(map(torch.equal, ours, theirs))
    assert not torch.allclose(out, other, atol=1e-2) and len(with_extension) == 1


# -- calls of a kind that ran before -------------------------------------------------------------


@pytest.fixture
def looked_at(with_extension: list[object], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows by each call whose arguments are looked at; no kind is known yet."""
    found: list[str] = []
    problem = api.cache_problem

    def noting(*args: Any, **options: Any) -> Any:
        found.append("looked at")
        return problem(*args, **options)

    monkeypatch.setattr(api, "cache_problem", noting)
    monkeypatch.setattr(launch_cache, "_PLANS", {})
    yield found


def other_values(call: dict[str, Any]) -> dict[str, Any]:
    """Tensors of the same shapes elsewhere: other keys, queries, pages and lengths."""
    other = {n: t.flip(0).clone() if isinstance(t, Tensor) else t for n, t in call.items()}
    for name in ("q", "k", "v"):  # heads lie before tokens
        other[name] = call[name].flip(0).transpose(1, 2).contiguous().transpose(1, 2)
    other["cache_seqlens"] += 3
    return other


@pytest.mark.parametrize("name", [name for name in CASES if name != "rotary"])
def test_a_known_call_gives_what_it_would_give_anew(name: str, looked_at: list[str]) -> None:
    first = arguments(CASES[name])
    second = other_values(first)
    before = caches_after(first)
    again = caches_after(second)
    assert len(looked_at) == 1
    launch_cache._PLANS.clear()
    anew = caches_after(second)
    assert len(looked_at) == 2
    assert all(map(torch.equal, again, anew))
    assert not torch.equal(again[2], before[2])


WRONG = {
    "full": ("cache_seqlens", 0, 80, "room for 80 keys"),
    "negative": ("cache_seqlens", 0, -1, "got -1 to"),
    "page-high": ("block_table", 4, 99, "names page 99"),
    "page-missing": ("block_table", 1, -1, "no page"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_known_call_is_refused_for_its_values(name: str, looked_at: list[str]) -> None:
    field, at, value, message = WRONG[name]
    call = arguments(CASES["one"])
    caches_after(call)
    call[field].view(-1)[at] = value
    call["k_cache"].fill_(0.0)
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(**call)
    assert len(looked_at) == 2 and not bool(call["k_cache"].any())


def test_what_is_looked_at_each_time(looked_at: list[str]) -> None:
    """Where something is made first, or the extension is left out."""
    rotary, strange = arguments(CASES["rotary"]), arguments(CASES["one"])
    strange["q"] = strange["q"].mT.contiguous().mT
    sinks = arguments(CASES["one"]) | {"s_aux": torch.randn(4).double()}
    for call in (rotary, strange, sinks):
        caches_after(call)
        caches_after(call)
    assert len(looked_at) == 6 and not launch_cache._PLANS
    plain = arguments(CASES["one"])
    caches_after(plain)
    with extension.left_out():
        caches_after(plain)
    assert len(looked_at) == 8
    caches_after(plain)
    assert len(looked_at) == 8
