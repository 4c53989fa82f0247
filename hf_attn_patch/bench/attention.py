"""The CPU rows of results/: prefill, window, decode and paged decode beside PyTorch's own ways.

Every contender is compared with the float64 oracle on the shape before it is timed there. One that
cannot run or is wrong is left out with a warning; when it is this package's, the run fails.

Legend: B batch, S tokens, K cached tokens, H heads, G query heads per KV head, D head size.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .baselines import DTYPES, Shape, dense_mask, flex, ours, sdpa, sdpa_packed, transformers_sdpa
from .flops import rate_per_s
from .results import OURS, BenchRow, append_rows, environment, time_interleaved
from .tolerance import Contenders, Trial, worst_error


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a shape for the file, a smaller one for a quick look."""

    full: Shape
    quick: Shape
    extra: str
    make: Callable[[Shape], Trial]


def _tensors(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v ``[B, S, H, D]`` that lie as ``[B, H, S, D]``, as transformers' caches do."""
    dtype = DTYPES[shape.dtype]
    sizes = ((shape.heads_q, shape.seq_q), *[(shape.heads_kv, shape.seq_k)] * 2)
    q, k, v = (
        torch.randn(shape.batch, heads, length, shape.head_dim).to(dtype).transpose(1, 2)
        for heads, length in sizes
    )
    return q, k, v


def both_ways(call: Callable[[], Tensor], *, by: Literal["prefill", "decode"]) -> Contenders:
    """This package by torch's operators and, where it is built, by the CPU extension."""
    from hf_attn_kernels.cpu import extension
    from hf_attn_kernels.cpu import extension_prefill as prefill

    def by_torch() -> Tensor:
        with extension.left_out():
            return call()

    found: Contenders = {OURS: by_torch}
    if prefill.takes(2) if by == "prefill" else extension.library() is not None:
        found[f"{OURS}:extension"] = call
    return found


def prefill(shape: Shape) -> Trial:
    """The last row is padded on the right to twice its length, so SDPA needs no mask for it."""
    from hf_attn_kernels import flash_attn_func

    q, k, v = _tensors(shape)
    lengths = (*[shape.seq_q] * (shape.batch - 1), shape.seq_q // 2)
    keep = torch.arange(shape.seq_q)[None] < torch.tensor(lengths)[:, None]
    triangle = dense_mask(shape, q.device)
    assert triangle is not None  # more than one query, causal
    mask = keep[:, None, None, :] & triangle

    def this_package() -> Tensor:
        out = flash_attn_func(q, k, v, causal=True, key_padding_mask=keep)
        assert isinstance(out, Tensor)  # a tuple only when the LSE is asked for
        return out

    return Trial(
        contenders={
            **both_ways(this_package, by="prefill"),
            "sdpa_is_causal": lambda: sdpa(q, k, v, shape, None),
            "transformers_sdpa": lambda: transformers_sdpa(q, k, v, mask),
        },
        q=q,
        k=k,
        v=v,
        lengths=lengths,
    )


def window(shape: Shape) -> Trial:
    q, k, v = _tensors(shape)
    return Trial(
        contenders={
            **both_ways(lambda: ours(q, k, v, shape), by="prefill"),
            "flex_compiled": lambda: flex(q, k, v, shape),
            "sdpa_masked": lambda: sdpa(q, k, v, shape, None),
        },
        q=q,
        k=k,
        v=v,
        lengths=(shape.seq_k,) * shape.batch,
    )


def decode(shape: Shape, *, tokens_first: bool = False) -> Trial:
    """One query over a cache that lies heads first (transformers) or tokens first (flash-attn)."""
    q, k, v = _tensors(shape)
    if tokens_first:
        k, v = k.contiguous(), v.contiguous()
    return Trial(
        contenders={
            OURS: lambda: ours(q, k, v, shape),
            "sdpa_packed": lambda: sdpa_packed(q, k, v, shape),
            "sdpa_gqa": lambda: sdpa(q, k, v, shape, None),
            "sdpa_repeat_kv": lambda: sdpa_repeat_kv(q, k, v),
        },
        q=q,
        k=k,
        v=v,
        lengths=(shape.seq_k,) * shape.batch,
    )


def sdpa_repeat_kv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on KV heads repeated to the number of query heads."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


PAGE = 16


def paged(shape: Shape) -> Trial:
    """One query over shuffled pages of 16, beside the same keys in a contiguous cache."""
    from hf_attn_kernels import flash_attn_with_kvcache

    q, _, _ = _tensors(shape)
    blocks = shape.seq_k // PAGE
    pool_shape = (shape.batch * blocks, PAGE, shape.heads_kv, shape.head_dim)
    k_pool, v_pool = (torch.randn(pool_shape).to(q.dtype) for _ in range(2))
    table = torch.randperm(len(k_pool)).view(shape.batch, blocks)

    def gathered() -> tuple[Tensor, Tensor]:
        k, v = (x[table].flatten(1, 2) for x in (k_pool, v_pool))
        return k, v

    k, v = gathered()
    lengths = torch.full((shape.batch,), shape.seq_k, dtype=torch.int32)
    pages = table.to(torch.int32)

    def cached(k: Tensor, v: Tensor, **where: Any) -> Tensor:
        out = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True, **where)
        assert isinstance(out, Tensor)  # a tuple only when the LSE is asked for
        return out

    over_pages = both_ways(lambda: cached(k_pool, v_pool, block_table=pages), by="decode")
    contenders: Contenders = {
        **over_pages,
        "contiguous_cache": both_ways(lambda: cached(k, v), by="decode")[OURS],
        "gather_sdpa_packed": lambda: sdpa_packed(q, *gathered(), shape),
    }
    return Trial(
        contenders=contenders,
        q=q,
        k=k,
        v=v,
        lengths=(shape.seq_k,) * shape.batch,
    )


def _shape(pass_: str, batch: int, heads: tuple[int, int], dim: int, q: int, k: int) -> Shape:
    return Shape(
        pass_=pass_,
        batch=batch,
        heads_q=heads[0],
        heads_kv=heads[1],
        head_dim=dim,
        seq_q=q,
        seq_k=k,
    )


ROWS = {
    "prefill": Row(
        full=_shape("forward", 2, (16, 4), 128, 4096, 4096),
        quick=_shape("forward", 2, (8, 2), 32, 256, 256),
        extra="padded row",
        make=prefill,
    ),
    "window": Row(  # a quarter of the heads: SDPA with a mask would take minutes
        full=replace(_shape("forward", 1, (8, 2), 128, 16384, 16384), window=512),
        quick=replace(_shape("forward", 1, (4, 1), 32, 512, 512), window=64),
        extra="",
        make=window,
    ),
    "decode": Row(
        full=_shape("decode", 1, (32, 8), 128, 1, 16384),
        quick=_shape("decode", 1, (8, 2), 32, 1, 1024),
        extra="heads first",
        make=decode,
    ),
    "decode-tokens-first": Row(
        full=_shape("decode", 1, (32, 8), 128, 1, 16384),
        quick=_shape("decode", 1, (8, 2), 32, 1, 1024),
        extra="tokens first",
        make=functools.partial(decode, tokens_first=True),
    ),
    "paged": Row(
        full=_shape("decode", 1, (32, 8), 128, 1, 16384),
        quick=_shape("decode", 1, (8, 2), 32, 1, 1024),
        extra=f"page={PAGE}",
        make=paged,
    ),
    "paged-short-rows": Row(
        full=_shape("decode", 64, (32, 8), 128, 1, 256),
        quick=_shape("decode", 8, (8, 2), 32, 1, 64),
        extra=f"page={PAGE}",
        make=paged,
    ),
}
MEASURED_DTYPES = ("fp32", "bf16")
# seconds after which a row's rounds end, though not before the third
BUDGET_S = 20.0


def run(
    *,
    rows: Sequence[str] | None = None,
    out: Path | None = None,
    threads: int = 2,
    quick: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Check and time the CPU rows; each in float32 and bfloat16.

    Args:
        rows: names from `ROWS`; None for all.
        out: CSV to append to, row by row.
        threads: CPU threads of every contender.
        quick: small shapes and three rounds, to see that it runs; the figures mean little.
        say: told each shape before it starts; a full run takes minutes.

    Returns:
        One dict for each contender and shape, keyed by the CSV's columns; times in milliseconds.

    Raises:
        ValueError: an unknown row, or no thread.
        RuntimeError: this package's own result is wrong or missing.
    """
    names = list(ROWS) if rows is None else list(rows)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise ValueError(f"unknown row {unknown[0]!r}; possible: {', '.join(ROWS)}")
    if threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found: list[dict[str, Any]] = []
    try:
        for name in names:
            for dtype in MEASURED_DTYPES:
                row = ROWS[name]
                shape = replace(row.quick if quick else row.full, dtype=dtype)
                say(f"{name}: {shape}")
                with torch.no_grad():
                    measured = measure(row, shape, rounds=3 if quick else 25)
                if out is not None:
                    append_rows(out, measured)
                found += [{**line.cells(), **_numbers(line)} for line in measured]
    finally:
        torch.set_num_threads(before)
    return found


def measure(row: Row, shape: Shape, *, rounds: int) -> list[BenchRow]:
    """Rows of the contenders that are right on `shape`."""
    torch.manual_seed(0)
    trial = row.make(shape)
    right = {}
    for name, call in trial.contenders.items():
        why = _complaint(trial, call, shape)
        if not why:
            right[name] = call
        elif name == OURS:
            raise RuntimeError(f"{shape}: {name} {why}; nothing was timed")
        else:
            warnings.warn(f"{shape}: {name} {why}; it is left out", stacklevel=2)
    # the check was everyone's warm-up
    timings = time_interleaved(right, rounds=rounds, warmup=0, budget_s=BUDGET_S)
    env = environment()
    lines = []
    for name, timing in timings.items():
        measured: dict[str, Any] = {"timing": timing, "extra": row.extra}
        if shape.pass_ == "decode":
            measured["gbytes_s"] = rate_per_s(shape.kv_bytes, timing.p50_ms, unit=1e9)
        else:
            measured["tflops"] = rate_per_s(shape.flops, timing.p50_ms, unit=1e12)
        lines.append(shape.row(name, env, **measured))
    return lines


def _complaint(trial: Trial, call: Callable[[], Tensor], shape: Shape) -> str:
    """Empty when the result is within the error budget, else what is wrong with it."""
    try:
        got = call()
    except Exception as failure:  # whatever a peer raises, the others go on
        return f"failed with {type(failure).__name__}: {failure}"
    error, allowed = worst_error(got, trial, shape)
    return "" if error <= allowed else f"is off by {error:.2g} where {allowed:.2g} is allowed"


def _numbers(line: BenchRow) -> dict[str, Any]:
    """The measured cells as numbers, for JSON."""
    assert line.timing is not None  # every measured row has one
    return {
        "p20_ms": line.timing.p20_ms,
        "p50_ms": line.timing.p50_ms,
        "p80_ms": line.timing.p80_ms,
        "tflops": line.tflops,
        "gbytes_s": line.gbytes_s,
    }
