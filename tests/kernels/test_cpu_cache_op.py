"""Calls over a cache on the CPU inside torch.compile, and in a fake mode outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hf_attn_kernels import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    mla_decode,
    use_backend,
)
from hf_attn_kernels.cpu.cache_op import OPS

Call = dict[str, Any]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Tests compile the same functions: together they would reach dynamo's limit of recompiling."""
    torch._dynamo.reset()


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cache_call(**changes: Any) -> Call:
    call: Call = {
        "q": torch.randn(2, 2, 4, 16), "k_cache": torch.randn(2, 40, 2, 16),
        "v_cache": torch.randn(2, 40, 2, 32), "cache_seqlens": ints(5, 17), "causal": True,
        "return_softmax_lse": True,
    }  # fmt: skip
    return call | changes


def new_keys(count: int = 2) -> Call:
    return {"k": torch.randn(2, count, 2, 16), "v": torch.randn(2, count, 2, 32)}


def in_pages() -> Call:
    return {
        "k_cache": torch.randn(6, 16, 2, 16), "v_cache": torch.randn(6, 16, 2, 32),
        "block_table": ints([4, 1, -1], [0, 5, -1]),
    }  # fmt: skip


def turning() -> Call:
    angle = torch.rand(64, 8)
    return {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}


def packed_call(**changes: Any) -> Call:
    pages = {n.removesuffix("_cache"): t for n, t in in_pages().items()}
    call: Call = {
        "q": torch.randn(6, 4, 16), **pages, "cu_seqlens_q": ints(0, 2, 5),
        "cu_seqlens_k": ints(0, 20, 50), "max_seqlen_q": 3, "max_seqlen_k": 30, "causal": True,
        "return_attn_probs": True,
    }  # fmt: skip
    return call | changes


CALLS: dict[str, tuple[Callable[..., Any], Call]] = {
    "cache": (flash_attn_with_kvcache, cache_call()),
    "cache-length": (flash_attn_with_kvcache, cache_call(cache_seqlens=9)),
    "cache-window": (
        flash_attn_with_kvcache, cache_call(window_size=(4, 0), sink_tokens=1, softcap=3.0)
    ),
    "cache-new": (flash_attn_with_kvcache, cache_call(**new_keys())),
    "cache-new-turned": (flash_attn_with_kvcache, cache_call(**new_keys(), **turning())),
    "cache-leftpad": (flash_attn_with_kvcache, cache_call(cache_leftpad=ints(2, 3))),
    "cache-indexed": (
        flash_attn_with_kvcache,
        cache_call(
            **new_keys(1), cache_batch_idx=ints(3, 0), k_cache=torch.randn(4, 40, 2, 16),
            v_cache=torch.randn(4, 40, 2, 32),
        ),
    ),
    "pages": (flash_attn_with_kvcache, cache_call(**in_pages())),
    "pages-new": (flash_attn_with_kvcache, cache_call(**in_pages(), **new_keys())),
    "float8": (
        flash_attn_with_kvcache,
        cache_call(
            **new_keys(), k_descale=torch.rand(2) + 0.5, v_descale=torch.rand(2, 2) + 0.5,
            k_cache=torch.randn(2, 40, 2, 16).to(torch.float8_e4m3fn),
            v_cache=torch.randn(2, 40, 2, 32).to(torch.float8_e4m3fn),
        ),
    ),
    "bf16-sink-alibi": (
        flash_attn_with_kvcache,
        cache_call(
            q=torch.randn(2, 2, 4, 16).bfloat16(), k_cache=torch.randn(2, 40, 2, 16).bfloat16(),
            v_cache=torch.randn(2, 40, 2, 32).bfloat16(), s_aux=torch.randn(4),
            alibi_slopes=torch.rand(4),
        ),
    ),
    "packed": (flash_attn_varlen_func, packed_call()),
    "packed-window": (flash_attn_varlen_func, packed_call(window_size=(5, 0))),
}  # fmt: skip
CACHES = ("k_cache", "v_cache")


def tensors(call: Call) -> dict[str, Tensor]:
    return {n: t for n, t in call.items() if isinstance(t, Tensor)}


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


@pytest.mark.parametrize("name", CALLS)
def test_compiles_as_one_graph(name: str) -> None:
    """The right numbers, and the caches written as without."""
    function, call = CALLS[name]
    others = {n: x for n, x in call.items() if not isinstance(x, Tensor)}

    def step(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out, lse, *_ = function(**given, **others)
        return out * 2, lse

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        given = {n: t.clone() for n, t in tensors(call).items()}
        found.append((run(given), [bits(given[n]) for n in CACHES if n in given]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)
    for mine, want, before in zip(found[1][1], found[0][1], map(call.get, CACHES), strict=False):
        assert torch.equal(mine, want) and before is not None
        assert torch.equal(mine, bits(before)) == ("k" not in call or name == "packed")


def test_a_cache_that_is_written_and_read_again_in_one_graph() -> None:
    """Two steps in a graph, and torch's own operator between them: in this order."""
    call = cache_call(**in_pages())
    new = [new_keys(1) for _ in range(2)]

    def steps(q: Tensor, k_cache: Tensor, v_cache: Tensor, held: Tensor) -> Tensor:
        outs = []
        for i, one in enumerate(new):
            out = flash_attn_with_kvcache(
                q, k_cache, v_cache, **one, cache_seqlens=held + i, causal=True,
                block_table=call["block_table"],
            )  # fmt: skip
            v_cache.mul_(0.5)
            outs.append(out)
        return torch.stack(outs)

    found = []
    for run in (steps, torch.compile(steps, fullgraph=True, backend="aot_eager")):
        caches = [call[n].clone() for n in CACHES]
        found.append((run(call["q"][:, :1], *caches, call["cache_seqlens"]), *caches))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
    assert not torch.equal(found[0][0][0], found[0][0][1])


def test_values_are_looked_at_when_it_runs() -> None:
    """What tracing cannot see is refused as ever, and before anything is written."""
    run = torch.compile(
        lambda **call: flash_attn_with_kvcache(**call), fullgraph=True, backend="aot_eager"
    )
    for change, says in (
        ({"cache_seqlens": ints(5, 39)}, "room for 40 keys"),
        ({**in_pages(), "cache_seqlens": ints(31, 5)}, "no page for some of the 2 new keys"),
        ({**in_pages(), "block_table": ints([4, 7], [0, 5])}, "names page 7"),
    ):
        call = cache_call(**new_keys()) | change
        before = call["k_cache"].clone()
        with pytest.raises(ValueError, match=says):
            run(**call)
        assert torch.equal(call["k_cache"], before)
    packed = torch.compile(
        lambda **call: flash_attn_varlen_func(**call), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match="max_seqlen_k is 29"):
        packed(**packed_call(max_seqlen_k=29))


FAKED: dict[str, tuple[Callable[..., Any], Call]] = {
    **CALLS,
    "dense-padded": (
        flash_attn_func,
        {"q": torch.randn(2, 3, 4, 16), "k": torch.randn(2, 5, 2, 16),
         "v": torch.randn(2, 5, 2, 16), "key_padding_mask": torch.ones(2, 5, dtype=torch.bool),
         "return_attn_probs": True},
    ),
    "packed-keys": (
        flash_attn_varlen_func,
        {"q": torch.randn(6, 4, 16), "k": torch.randn(9, 2, 16), "v": torch.randn(9, 2, 16),
         "cu_seqlens_q": ints(0, 2, 5), "cu_seqlens_k": ints(0, 2, 9), "max_seqlen_q": 3,
         "max_seqlen_k": 7, "causal": True, "return_attn_probs": True},
    ),
    "latents": (
        mla_decode,
        {"q_latent": torch.randn(2, 1, 4, 32), "q_rope": torch.randn(2, 1, 4, 16),
         "latent": torch.randn(6, 16, 32), "k_rope": torch.randn(6, 16, 16),
         "softmax_scale": 0.2, "cache_seqlens": ints(9, 20), "block_table": ints([1, 2], [3, 4]),
         "return_softmax_lse": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", FAKED)
def test_fake_tensors_have_the_right_shapes(name: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    function, call = FAKED[name]
    want = function(**{n: x.clone() if isinstance(x, Tensor) else x for n, x in call.items()})
    with use_backend(backend), FakeTensorMode() as mode:
        faked = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in call.items()}
        got = function(**faked)
    for mine, real in zip(got, want, strict=True):
        if real is None:
            assert mine is None
            continue
        assert isinstance(mine, FakeTensor)
        assert (mine.shape, mine.dtype, mine.stride()) == (real.shape, real.dtype, real.stride())


def test_opcheck() -> None:
    call, new = cache_call(**in_pages()), new_keys()
    pages, table, held = (call["k_cache"], call["v_cache"]), call["block_table"], ints(5, 17)
    torch.library.opcheck(
        OPS.cpu_cache.default,
        (call["q"], *pages, held, None, None, table, None, None, None, None, None, None, 0, 0, 0.25,
         -1, 0, 0.0, 0),
    )  # fmt: skip
    turn = turning()
    for cos, sin in ((None, None), (turn["rotary_cos"], turn["rotary_sin"])):
        torch.library.opcheck(
            OPS.cpu_append.default,
            (call["q"], new["k"], new["v"], *pages, held, table, None, None, None, cos, sin, True,
             True),
        )  # fmt: skip
