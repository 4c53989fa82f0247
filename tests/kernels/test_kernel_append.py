"""New keys into a cache by one kernel before the attention: what torch's own operators write.

Also as parts of a compiled graph and, on a GPU, of a captured one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_calls import DEVICE
from torch import Tensor

from hf_attn_kernels import flash_attn_with_kvcache, use_backend
from hf_attn_kernels.append import appended
from hf_attn_kernels.fp8 import E4M3
from hf_attn_kernels.kvcache import cache_problem
from hf_attn_kernels.problem import Pattern

pytest.importorskip("triton")

B, HQ, HKV, D, DV = 3, 4, 2, 24, 16
TABLE = ((5, 2, 8, -1), (0, 7, 1, -1), (3, 4, 6, -1))


def append_call(new: int = 3, q_len: int | None = None, **changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE)

    call: dict[str, Any] = {
        "q": normal(B, q_len or new, HQ, D),
        "k_cache": normal(9, 16, HKV, D),
        "v_cache": normal(9, 16, HKV, DV),
        "k": normal(B, new, HKV, D),
        "v": normal(B, new, HKV, DV),
        "cache_seqlens": torch.tensor([15, 0, 29], dtype=torch.int32, device=DEVICE),
        "block_table": torch.tensor(TABLE, dtype=torch.int32, device=DEVICE),
        "pattern": Pattern(scaling=0.2, window_right=0),
    }
    return call | changes


def turning(columns: int, **others: Any) -> dict[str, Any]:
    angle = torch.rand(80, columns, generator=torch.Generator().manual_seed(1)) * 6
    return {"rotary_cos": angle.cos().to(DEVICE), "rotary_sin": angle.sin().to(DEVICE), **others}


def float8_cache(**descale: Tensor) -> dict[str, Any]:
    call = append_call()
    caches = {n: call[n].to(E4M3) for n in ("k_cache", "v_cache")}
    return {**caches, **{n: t.to(DEVICE) for n, t in descale.items()}}


APPENDS: dict[str, dict[str, Any]] = {
    "pages": append_call(),
    "many-tokens": append_call(new=18),
    "one-token": append_call(new=1),
    "contiguous": append_call(
        k_cache=torch.zeros(B, 40, HKV, D, device=DEVICE),
        v_cache=torch.zeros(B, 40, HKV, DV, device=DEVICE), block_table=None,
    ),
    "indexed": append_call(
        k_cache=torch.zeros(5, 40, HKV, D, device=DEVICE),
        v_cache=torch.zeros(5, 40, HKV, DV, device=DEVICE), block_table=None,
        cache_batch_idx=torch.tensor([4, 0, 2], dtype=torch.int32, device=DEVICE),
    ),
    "rotary-pairs": append_call(**turning(12)),
    "rotary-halves-partial": append_call(**turning(7, rotary_interleaved=False)),
    "rotary-all-queries-at-one-position": append_call(**turning(5), pattern=Pattern(scaling=1.0)),
    "rotary-more-queries-than-keys": append_call(new=2, q_len=19, **turning(12)),
    "float8": append_call(**float8_cache()),
    "float8-scales": append_call(
        **float8_cache(k_descale=torch.tensor([0.001, 0.3]), v_descale=torch.rand(B, HKV) + 0.01),
        **turning(12),
    ),
}  # fmt: skip


def copied(call: dict[str, Any]) -> dict[str, Any]:
    return {n: t.clone() if isinstance(t, Tensor) else t for n, t in call.items()}


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == E4M3 else x


@pytest.mark.parametrize("name", APPENDS)
def test_the_append_kernel_writes_what_torch_writes(name: str) -> None:
    from hf_attn_kernels.triton.decode import attention_with_cache

    call, mine = copied(APPENDS[name]), copied(APPENDS[name])
    want = appended(cache_problem(**call))
    problem = cache_problem(**mine)
    got = attention_with_cache(problem)
    for cache in ("k_cache", "v_cache"):
        torch.testing.assert_close(bits(mine[cache]), bits(call[cache]), rtol=0, atol=1e-6)
        assert not torch.equal(bits(mine[cache]), bits(APPENDS[name][cache]))
    # lengths and q as the attention saw them
    torch.testing.assert_close(got, attention_with_cache(want), rtol=0, atol=1e-6)


def test_the_append_kernel_keeps_within_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without a page, with a page beyond the pool, full or with a negative length."""
    from hf_attn_kernels.triton.decode import attention_with_cache

    call = append_call()
    call["cache_seqlens"] = torch.tensor([15, -4, 63], dtype=torch.int32, device=DEVICE)
    call["block_table"] = torch.tensor(
        [[5, 99, 8, -1], [0, 7, 1, -1], [3, 4, 6, 2]], dtype=torch.int32, device=DEVICE
    )
    before = {n: call[n].clone() for n in ("k_cache", "v_cache")}
    monkeypatch.setattr("hf_attn_kernels.kvcache.check_values", lambda *a: None)  # as on a GPU
    out, lse = attention_with_cache(cache_problem(**call))
    for name, new in (("k_cache", call["k"]), ("v_cache", call["v"])):
        want = before[name]
        want[5, 15] = new[0, 0]  # the next would lie in page 99
        want[2, 15] = new[2, 0]  # the next would lie behind the row
        assert torch.equal(call[name], want)
    assert torch.equal(out[1], torch.zeros_like(out[1])) and bool(torch.isneginf(lse[1]).all())


def test_append_and_decode_compile_without_graph_break() -> None:
    """Also that the compiled call writes the caches it was given."""
    call = append_call(new=1, **turning(12))
    numbers = {n: call[n] for n in ("rotary_cos", "rotary_sin", "block_table", "cache_seqlens")}

    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, causal=True, **numbers)
        assert isinstance(out, Tensor)
        return out * 2

    def run(function: Any) -> tuple[Tensor, Tensor]:
        cache = call["k_cache"].clone()
        return function(call["q"], cache, call["v_cache"].clone(), call["k"], call["v"]), cache

    with use_backend("triton"), torch.no_grad():
        want = run(step)
        got = run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not torch.equal(got[1], call["k_cache"])


@pytest.mark.gpu
def test_a_cuda_graph_captures_append_and_decode() -> None:
    """Captured once, replayed for steps that cross a page border: as the same calls one by one."""
    steps = 5
    call = append_call(new=1, **turning(12))
    numbers = {n: call[n] for n in ("rotary_cos", "rotary_sin", "block_table")}
    tokens = [{n: torch.randn_like(call[n]) for n in "qkv"} for _ in range(steps)]

    def step(token: dict[str, Tensor], caches: tuple[Tensor, Tensor], lengths: Tensor) -> Tensor:
        out = flash_attn_with_kvcache(
            token["q"], *caches, token["k"], token["v"], cache_seqlens=lengths, causal=True,
            num_splits=4, **numbers,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    caches = (call["k_cache"].clone(), call["v_cache"].clone())
    lengths = call["cache_seqlens"].clone()
    want = []
    for token in tokens:
        want.append(step(token, caches, lengths).clone())
        lengths += 1
    assert not torch.equal(want[0], want[1])

    static = {n: t.clone() for n, t in tokens[0].items()}
    caches = (call["k_cache"].clone(), call["v_cache"].clone())
    lengths = call["cache_seqlens"].clone()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles; writes what the first replay writes again
        step(static, caches, lengths)
        step(static, caches, lengths)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(static, caches, lengths)
    for token, right in zip(tokens, want, strict=True):
        for name, tensor in static.items():
            tensor.copy_(token[name])
        graph.replay()
        torch.testing.assert_close(out, right, rtol=0, atol=1e-6)
        lengths += 1
