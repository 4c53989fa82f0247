"""Keys in pages, both backends against the float64 oracle: packed sequences, float8, appending.

On the CPU Triton's kernels are interpreted. What no query may see is NaN, and pages that a window
hides are missing from the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_calls import DEVICE
from packed_calls import Packed, check_packed, make_packed, run_packed
from torch import Tensor

from hf_attn_kernels import (
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    launch_cache,
    use_backend,
)
from hf_attn_kernels.fp8 import E4M3, quantise, widened
from hf_attn_kernels.kvcache import packed_cache_problem
from hf_attn_kernels.problem import Pattern

BACKENDS = ("triton",) if DEVICE == "cuda" else ("cpu", "triton")
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton":
        pytest.importorskip("triton")
    with use_backend(request.param):
        yield request.param


CASES = (
    Packed(name="mixed"),
    Packed(name="mixed-full", causal=False),
    Packed(name="one-query-each", lengths=((1, 111), (1, 63), (1, 1), (0, 0), (1, 257))),
    Packed(name="nothing", lengths=((0, 0), (0, 5)), spare_tokens=0),
    Packed(name="more-queries-than-keys", lengths=((17, 5), (3, 0), (40, 41))),
    Packed(name="mha", heads_q=3, heads_kv=3),
    Packed(name="mqa", heads_q=5, heads_kv=1),
    Packed(name="D72-DV48", dim=72, dim_v=48),
    Packed(name="window-1", left=0),
    Packed(name="window", left=20),
    Packed(name="window-sinks", left=20, sinks=5),
    Packed(name="window-sinks-s_aux-softcap", left=9, sinks=2, s_aux=True, softcap=3.0),
    Packed(name="s_aux", s_aux=True),
    Packed(name="alibi-by-row", alibi=True, left=33),
    Packed(name="page64", page=64),
    Packed(name="page256-window", page=256, left=30, lengths=((3, 300), (1, 513), (40, 40))),
    Packed(name="page48", page=48, left=20, sinks=3),
    Packed(name="bf16", dtype=BF16),
    Packed(name="fp16-window", dtype=FP16, left=33),
    Packed(name="float8", float8="one"),
    Packed(name="float8-heads-bf16", float8="heads", dtype=BF16, heads_q=8),
    Packed(name="float8-rows-window-page64", float8="rows", left=20, sinks=4, page=64),
    Packed(name="float8-rows-softcap-fp16", float8="rows", softcap=3.0, dtype=FP16),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packed_matches_the_oracle(case: Packed, backend: str, poison_memory: None) -> None:
    x = make_packed(case)
    check_packed(case, x, run_packed(case, x))


@pytest.mark.parametrize("shift", [-1, 1])
def test_negative_control_a_shifted_window_is_noticed(shift: int, backend: str) -> None:
    case = Packed(name="", left=20, sinks=5, dtype=BF16)
    x = make_packed(replace(case, left=21))  # so that no page is missing
    check_packed(case, x, run_packed(case, x))
    with pytest.raises(AssertionError, match=r"out: error .* exceeds"):
        check_packed(case, x, run_packed(replace(case, left=20 + shift), x))


def test_negative_control_a_wrong_page_and_a_wrong_scale_are_noticed(backend: str) -> None:
    case = Packed(name="", float8="heads")
    x = make_packed(case)
    assert x.k_descale is not None
    table = x.table.clone()
    table[6, 3:5] = table[6, 3:5].flip(0)
    for wrong in (replace(x, table=table), replace(x, v_descale=x.v_descale.flip(0))):
        with pytest.raises(AssertionError, match=r"out: error .* exceeds"):
            check_packed(case, x, run_packed(case, wrong))


def test_rows_share_pages(backend: str) -> None:
    """A prompt's pages stand in two tables: the second continues another way behind them."""
    case = Packed(name="", lengths=((3, 40), (1, 45)))
    x = make_packed(case)
    table, k, v = x.table.clone(), x.k.clone(), x.v.clone()
    table[1, :2] = table[0, :2]
    k[40:72], v[40:72] = k[:32], v[:32]
    shared = replace(x, table=table, k=k, v=v)
    check_packed(case, shared, run_packed(case, shared))


@pytest.mark.parametrize("splits", [1, 4])
def test_splits_of_packed_sequences(splits: int) -> None:
    pytest.importorskip("triton")
    from hf_attn_kernels.triton.decode import attention_with_cache

    case = Packed(name="", s_aux=True, left=60, sinks=3, lengths=((1, 111), (0, 0), (5, 63)))
    x = make_packed(case)
    cu_q, cu_k = case.cu
    problem = packed_cache_problem(
        x.q, x.k_pages, x.v_pages, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=5,
        max_seqlen_k=111, block_table=x.table, s_aux=x.s_aux,
        pattern=Pattern(scaling=case.dim**-0.5, window_left=60, window_right=0, sink_tokens=3),
    )  # fmt: skip
    with use_backend("triton"):
        check_packed(case, x, attention_with_cache(replace(problem, num_splits=splits)))


def test_32768_pages_beyond_32_bits(backend: str, tmp_path: Path) -> None:
    """The last page begins behind 2**31 elements; a sparse file lends the addresses."""
    if DEVICE != "cpu":
        pytest.skip("a GPU's pool would be real memory")
    case = Packed(name="", dtype=FP16, lengths=((3, 40), (1, 33)), heads_kv=1, heads_q=2, dim=16,
                  dim_v=16)  # fmt: skip
    x = make_packed(case)
    pages, step = 32768, 65600
    whole = torch.from_file(
        str(tmp_path / "pool"), shared=True, size=pages * step, dtype=FP16, device="cpu"
    )
    shape, strides = (pages, 16, 1, 16), (step, 16, 16, 1)
    pools = [whole.as_strided(shape, strides, at) for at in (0, 512)]
    used = x.table[x.table >= 0].tolist()
    place = dict(zip(used, range(pages - len(used), pages), strict=True))
    for old, new in place.items():
        for pool, small in zip(pools, (x.k_pages, x.v_pages), strict=True):
            pool[new] = small[old]
    table = torch.tensor([[place.get(p, -1) for p in row] for row in x.table.tolist()])
    far = replace(x, k_pages=pools[0], v_pages=pools[1], table=table.to(torch.int32))
    check_packed(case, far, run_packed(case, far))


# -- float8 ---------------------------------------------------------------------------------------


def test_float8_saturates_and_rounds_to_even() -> None:
    x = torch.tensor([1e9, -1e9, 448.0, 464.0, 1.0625, 1.1875, 2**-10, 3 * 2**-10, 0.0])
    want = torch.tensor([448.0, -448.0, 448.0, 448.0, 1.0, 1.25, 0.0, 2**-8, 0.0])
    assert torch.equal(quantise(x[None, :, None, None], None).flatten().float(), want)
    descale = torch.tensor([[2.0]])
    assert quantise(torch.tensor(6.0).view(1, 1, 1, 1), descale).float().item() == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float8_is_widened_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(E4M3)
    finite = every[~every.float().isnan()]
    assert len(finite) == 254
    assert torch.equal(widened(finite[None, :], None, dtype), finite[None, :].to(dtype))
    scaled = widened(every[None, :, None].mT, torch.tensor([0.5]), dtype)
    want = every.to(dtype)[None, None, :] * 0.5
    assert torch.equal(scaled.nan_to_num(1e9), want.nan_to_num(1e9))


@pytest.mark.parametrize("reading", ["by bits", "by an instruction"])
def test_kernels_read_every_float8_number_as_torch_does(
    backend: str, reading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 256, in the columns of 16 sequences of one key each: the value itself comes out."""
    if backend == "triton":
        read_float8(reading, monkeypatch)
    elif reading != "by bits":
        pytest.skip("one way on the CPU")
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(E4M3)
    pages = torch.zeros(16, 16, 1, 16, dtype=torch.uint8, device=DEVICE).view(E4M3)
    values = pages.clone()
    values[:, 0, 0] = every.view(16, 16)
    table = torch.arange(16, dtype=torch.int32, device=DEVICE)[:, None]
    out = flash_attn_with_kvcache(
        torch.zeros(16, 1, 1, 16, device=DEVICE), pages, values, cache_seqlens=1, block_table=table
    )
    assert isinstance(out, Tensor)
    found, want = out.flatten(), every.float()
    if reading == "by an instruction" and DEVICE == "cpu":
        found, want = found[~want.isnan()], want[~want.isnan()]  # the interpreter's NaN is 480
    assert torch.equal(found.nan_to_num(1e9), want.nan_to_num(1e9))


def read_float8(reading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chip, the interpreter too, widens float8 in one way for the rest of a test."""
    from hf_attn_kernels.triton import decode_config, decode_launch

    chips = () if reading == "by bits" else tuple(decode_config.TABLES)
    if chips and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9 or more")
    monkeypatch.setattr(decode_launch, "WIDENS_FLOAT8", chips)
    read = decode_launch.readable(torch.zeros(1).to(E4M3), "interpreter")
    assert read.dtype == (E4M3 if chips else torch.uint8)
    monkeypatch.setattr(launch_cache, "_PLANS", {})  # which remember how a call was launched


@pytest.mark.parametrize("name", ["float8", "float8-rows-window-page64"])
def test_float8_by_an_instruction_is_as_by_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    case = next(case for case in CASES if case.name == name)
    read_float8("by an instruction", monkeypatch)
    with use_backend("triton"):
        x = make_packed(case)
        check_packed(case, x, run_packed(case, x))


# -- the door -------------------------------------------------------------------------------------


def door(**changes: Any) -> dict[str, Any]:
    def ints(*values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    call: dict[str, Any] = {
        "q": torch.zeros(6, 4, 16), "k": torch.zeros(5, 16, 2, 16), "v": torch.zeros(5, 16, 2, 16),
        "cu_seqlens_q": ints(0, 2, 6), "cu_seqlens_k": ints(0, 20, 30), "max_seqlen_q": 4,
        "max_seqlen_k": 20, "block_table": ints([0, 1], [2, -1]),
    }  # fmt: skip
    return call | {n: ints(*v) if isinstance(v, list) else v for n, v in changes.items()}


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "q-4d": (door(q=torch.zeros(1, 6, 4, 16)), r"q must be \[total, heads, head_dim\], got"),
    "not-pages": (door(k=torch.zeros(30, 2, 16)), r"k must be \[pages, page_size, heads, head_d"),
    "pages-differ": (door(v=torch.zeros(4, 16, 2, 16)), "k and v must agree in all but head_dim"),
    "dtype": (door(k=torch.zeros(5, 16, 2, 16).half()), "share one dtype"),
    "float8-and-not": (door(k=torch.zeros(5, 16, 2, 16).to(E4M3)), "share one dtype"),
    "table-rows": (door(block_table=[[0, 1]]), r"block_table must be \[2, max_blocks\]"),
    "table-dtype": (door(block_table=torch.zeros(2, 2).long()), "block_table must be an int32"),
    "table-short": (door(block_table=[[0], [2]]), r"room for 16 keys.*got 10 to 20.*more pages"),
    "page-beyond": (door(block_table=[[0, 1], [5, -1]]), "names page 5.*pages 0 to 4"),
    "page-missing": (door(block_table=[[0, -1], [2, -1]]), "no page .*that a query sees: keys"),
    "page-size": (
        door(k=torch.zeros(5, 24, 2, 16), v=torch.zeros(5, 24, 2, 16)), "page_size 24 .*of 16"
    ),
    "offsets-dtype": (
        door(cu_seqlens_q=torch.tensor([0, 2, 6])), "cu_seqlens_q must be an int32 tensor"
    ),
    "offsets-rank": (door(cu_seqlens_k=[[0, 20, 30]]), "cu_seqlens_k must be a 1-D int32"),
    "offsets-fall": (door(cu_seqlens_k=[0, 20, 10]), "cu_seqlens_k must start at 0, never fall"),
    "offsets-beyond": (door(cu_seqlens_q=[0, 2, 7]), "cu_seqlens_q must .*before the 6 tokens"),
    "offsets-differ": (door(cu_seqlens_k=[0, 20]), "describes 2 sequences and cu_seqlens_k 1"),
    "max-q": (door(max_seqlen_q=3), "max_seqlen_q is 3 and a sequence of cu_seqlens_q has 4"),
    "max-k": (door(max_seqlen_k=19), "max_seqlen_k is 19 and a sequence of cu_seqlens_k has 20"),
    "gradient": (door(q=torch.zeros(6, 4, 16, requires_grad=True)), "no backward.*no_grad"),
    "dropout": (door(dropout_p=0.1), "block_table and dropout_p, .*belongs to training"),
    "bias": (door(bias=torch.zeros(1, 1, 1, 20)), "block_table and bias, .*leave bias out"),
    "descale-unpaged": (
        door(block_table=None, k=torch.zeros(30, 2, 16), v=torch.zeros(30, 2, 16),
             k_descale=torch.ones(2)), "for float8 pages; give a block_table"
    ),
    "descale-no-float8": (door(k_descale=torch.ones(2)), "k_descale is for caches of torch.float8"),
    "descale-shape": (
        door(k=torch.zeros(5, 16, 2, 16).to(E4M3), v=torch.zeros(5, 16, 2, 16).to(E4M3),
             v_descale=torch.ones(3)), r"v_descale must be float32 \[2\] or \[2, 2\]"
    ),
}  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on the CPU")
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_says_what_is_wrong(name: str) -> None:
    call, message = BAD_INPUT[name]
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(**call)
