"""The decode calls that are compiled ahead of time: every tile of the table, every feature."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn_kernels.fp8 import E4M3
from hf_attn_kernels.problem import NewKeys, Pattern, Rotary
from hf_attn_kernels.triton.append import append_launch
from hf_attn_kernels.triton.decode_launch import Cache, launches, new_outputs
from hf_attn_kernels.triton.launch import Launch

from .aot import AotCase, case_of

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BATCH, KEYS, UNITS = 4, 16384, 128  # sizes only matter in being multiples of 16


@dataclass(frozen=True, kw_only=True)
class DecodeCall:
    """A kind of call over a cache."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    head_dim_v: int | None = None
    tokens: int = 1
    groups: int = 4
    heads_kv: int = 8
    page_size: int = 0  # 0: contiguous
    window: int = -1
    sink_tokens: int = 0
    softcap: float = 0.0
    splits: int = 8
    s_aux: bool = False
    alibi: bool = False
    padded: bool = False  # a mask over keys given whole, no lengths
    indexed: bool = False  # batch_idx and leftpad
    packed: bool = False
    float8: bool = False
    new_keys: int = 0  # to append
    rotary: bool = False


def _tiles(
    dtype: torch.dtype,
    dims: tuple[int, ...],
    pages: tuple[int, ...],
    tokens: tuple[int, ...],
    *,
    packed: bool = False,
    float8: bool = False,
) -> list[DecodeCall]:
    """One token, and more of them for the larger tiles of the table."""
    kind = "-float8" * float8 + "-packed" * packed
    return [
        DecodeCall(
            name=f"{NAMES[dtype]}-D{dim}{kind}-Q{count}-page{page}",
            dtype=dtype, head_dim=dim, tokens=count, page_size=page, packed=packed, float8=float8,
            splits=8 if count == 1 else 1,
        )
        for dim in dims
        for count in tokens
        for page in pages
    ]  # fmt: skip


CALLS: tuple[DecodeCall, ...] = (
    # with G = 4: tiles of 16, 32, 64 and 128 rows
    *_tiles(torch.bfloat16, (64, 128, 256, 512), (0, 16), (1, 8, 16, 256)),
    *_tiles(torch.bfloat16, (128,), (64,), (1, 256)),
    *_tiles(torch.bfloat16, (80,), (16,), (1, 256)),
    *_tiles(torch.float16, (64, 128), (16,), (1, 256)),
    *_tiles(torch.float32, (64, 128, 256, 512), (16,), (1, 8)),
    *_tiles(torch.float32, (128,), (0,), (1, 8)),
    *_tiles(torch.bfloat16, (64, 128, 256, 512), (16,), (1, 256), packed=True),
    *_tiles(torch.bfloat16, (64, 128, 256, 512), (16,), (1, 8, 16, 256), float8=True),
    *_tiles(torch.bfloat16, (128,), (0, 64), (1, 256), float8=True),
    *_tiles(torch.float32, (64, 128, 256, 512), (16,), (1, 8), float8=True),
    *_tiles(torch.bfloat16, (128,), (16,), (1, 256), packed=True, float8=True),
    DecodeCall(name="bf16-D128-mha", groups=1),
    DecodeCall(name="bf16-D128-mqa", groups=32, heads_kv=1),
    DecodeCall(name="bf16-D128-one-split", splits=1),
    DecodeCall(name="bf16-D192-DV128-page64", head_dim=192, head_dim_v=128, page_size=64),
    DecodeCall(name="bf16-D72-mqa", head_dim=72, heads_kv=1),
    DecodeCall(name="bf16-D128-padded", padded=True),
    DecodeCall(name="bf16-D128-padded-window-sinks", padded=True, window=511, sink_tokens=4),
    DecodeCall(name="bf16-D128-indexed", indexed=True),
    DecodeCall(name="bf16-D128-page16-window", page_size=16, window=511),
    DecodeCall(name="bf16-D128-page16-window-sinks", page_size=16, window=511, sink_tokens=4),
    DecodeCall(name="bf16-D128-page16-window-sinks-Q256", page_size=16, window=511, sink_tokens=4,
               tokens=256, splits=1),
    DecodeCall(name="bf16-D128-page16-alibi", page_size=16, alibi=True),
    DecodeCall(name="bf16-D64-page16-s_aux-window", head_dim=64, groups=8, page_size=16, window=127,
               s_aux=True),
    DecodeCall(name="bf16-D64-page16-s_aux-window-Q256", head_dim=64, groups=8, page_size=16,
               window=127, s_aux=True, tokens=256, splits=1),
    DecodeCall(name="bf16-D256-page16-softcap-window", head_dim=256, page_size=16, window=4095,
               softcap=50.0),
    DecodeCall(name="bf16-D256-page16-softcap-Q256", head_dim=256, page_size=16, softcap=50.0,
               tokens=256, splits=1),
    DecodeCall(name="bf16-D128-page16-append", page_size=16, new_keys=1),
    DecodeCall(name="bf16-D128-append", new_keys=1, indexed=True),
    DecodeCall(name="bf16-D128-page16-append-rotary", page_size=16, new_keys=1, rotary=True),
    DecodeCall(name="bf16-D256-page16-append-rotary-Q256", head_dim=256, page_size=16,
               tokens=256, new_keys=256, rotary=True, splits=1),
    DecodeCall(name="bf16-D128-page16-append-rotary-float8", page_size=16, new_keys=1, rotary=True,
               float8=True),
    DecodeCall(name="fp32-D128-page16-append-float8", dtype=torch.float32, page_size=16,
               new_keys=4, tokens=4, float8=True, splits=1),
)  # fmt: skip


def _cache(call: DecodeCall) -> Cache:
    def tensor(*shape: int, dtype: torch.dtype = call.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def numbers(wanted: bool, *shape: int) -> Tensor | None:
        return tensor(*shape, dtype=torch.int32) if wanted else None

    paged, stored = call.page_size > 0, E4M3 if call.float8 else call.dtype
    rows = (BATCH * KEYS // call.page_size, call.page_size) if paged else (BATCH, KEYS)
    heads_q = call.heads_kv * call.groups
    q_rows = (BATCH * call.tokens,) if call.packed else (BATCH, call.tokens)
    descale = tensor(1, call.heads_kv, dtype=torch.float32) if call.float8 else None
    return Cache(
        q=tensor(*q_rows, heads_q, call.head_dim),
        k=tensor(*rows, call.heads_kv, call.head_dim, dtype=stored),
        v=tensor(*rows, call.heads_kv, call.head_dim_v or call.head_dim, dtype=stored),
        seqlens=numbers(not call.padded, BATCH + call.packed),
        cu_q=numbers(call.packed, BATCH + 1),
        block_table=numbers(paged, BATCH, KEYS // call.page_size if paged else 0),
        batch_idx=numbers(call.indexed, BATCH),
        leftpad=numbers(call.indexed or (call.padded and call.sink_tokens > 0), BATCH),
        key_mask=tensor(BATCH, KEYS, dtype=torch.bool) if call.padded else None,
        s_aux=tensor(heads_q) if call.s_aux else None,
        slopes=tensor(1, heads_q, dtype=torch.float32) if call.alibi else None,
        k_descale=descale,
        v_descale=descale,
        new_keys=call.new_keys,
        max_q=call.tokens,
        max_k=KEYS,
    )


def _launches(call: DecodeCall, arch: str) -> Iterator[Launch]:
    x = _cache(call)
    if call.new_keys:
        k, v = (x.q.new_empty(BATCH, call.new_keys, *c.shape[2:]) for c in (x.k, x.v))
        turn = x.q.new_empty(KEYS, call.head_dim // 2, dtype=torch.float32)
        rotary = Rotary(cos=turn, sin=turn, interleaved=False, ordered=True)
        new = NewKeys(k=k, v=v, rotary=rotary if call.rotary else None)
        yield append_launch(x, new)[0]
    out, lse = new_outputs(x.q, x.v, packed=call.packed)
    pattern = Pattern(
        scaling=call.head_dim**-0.5, window_left=call.window, window_right=0,
        softcap=call.softcap, sink_tokens=call.sink_tokens,
    )  # fmt: skip
    yield from launches(x, pattern, call.splits, out, lse, arch, UNITS)


def aot_cases(arch: str) -> list[AotCase]:
    """Cases of the append, decode and reduce kernels with the tiles of `arch`; equal ones once."""
    cases: list[AotCase] = []
    seen: list[tuple[object, ...]] = []
    for call in CALLS:
        for launch in _launches(call, arch):
            case = case_of(launch, call.name)
            what = (
                case.kernel, dict(case.signature), dict(case.constexprs), case.divisible,
                case.num_warps, case.num_stages,
            )  # fmt: skip
            if what not in seen:
                seen.append(what)
                cases.append(case)
    return cases
