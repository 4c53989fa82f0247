"""Many queries through the compiled extension, where there is one and it is faster.

A call comes cut into pieces (:mod:`.segments`), so padding, packed sequences and a cache's rows are
all the same to it. What it does not serve goes to torch's operators by the table below.

Shape letters as in :mod:`..problem`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch_invariance import batch_invariant
from ..problem import UNBOUNDED, Pattern
from .blockwise import Call
from .extension import PREFILL, library
from .extension_decode import DTYPES, LANES, address
from .pages import PagedKeys
from .segments import NO_SEQUENCE

_POINTERS = ("q", "k", "v", "out", "lse", "pieces", "keep", "s_aux", "table")
_NUMBERS = (
    "dtype", "count", "q_length", "k_length", "heads", "heads_kv", "dim", "dim_v",
    "q_row", "q_token", "q_head", "k_row", "k_token", "k_head", "v_row", "v_token", "v_head",
    "page_size", "window_left", "window_right", "sink_tokens", "threads",
)  # fmt: skip
_PIECE = 7  # numbers of a piece

# how torch's name of the processor's instructions begins where this is the faster way: with AVX2
# torch's matmuls are as fast, without it they are faster
CAPABILITY = "AVX512"
# queries x keys x heads x head size from which on it is the faster way
LEAST_PRODUCTS = {torch.float32: 2**20, torch.bfloat16: 2**14, torch.float16: 0}


class _Prefill(ctypes.Structure):
    """``struct Prefill`` of csrc/prefill.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scaling", ctypes.c_double),
        ("softcap", ctypes.c_double),
    ]


@dataclass(frozen=True)
class Refusal:
    """Why a call is left to torch's operators, and when."""

    why: str
    holds: Callable[[Call], bool]


def _small(call: Call) -> bool:
    pairs = sum(work.row_count * work.query_count * work.key_count for work in call.works)
    return pairs * call.q.shape[2] * call.q.shape[3] < LEAST_PRODUCTS[call.q.dtype]


def _tensors(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as they are stored: ``[B, S, H, D]``, or pages ``[pages, page_size, H, D]``."""
    k, v = (x.cache if isinstance(x, PagedKeys) else x for x in (call.k, call.v))
    return call.q, k, v


REFUSALS = (
    Refusal("torch.compile or a fake mode traces it", lambda c: type(c.q) is not Tensor),
    Refusal("there is nothing to compute", lambda c: 0 in (*c.q.shape, c.v.shape[-1])),
    Refusal("float64 has no vectors there", lambda c: c.q.dtype not in DTYPES),
    Refusal("a cache of another dtype", lambda c: any(x.dtype != c.q.dtype for x in _tensors(c))),
    Refusal(
        f"head sizes are multiples of {LANES}",
        lambda c: c.q.shape[-1] % LANES != 0 or c.v.shape[-1] % LANES != 0,
    ),
    Refusal("elements of a head are apart", lambda c: any(x.stride(-1) != 1 for x in _tensors(c))),
    Refusal("a bias or ALiBi is added", lambda c: c.scoring.adds),
    Refusal("dropout", lambda c: c.scoring.pattern.dropout_p > 0),
    Refusal("torch is done sooner", lambda c: not batch_invariant() and _small(c)),
)


def refusal(call: Call) -> str | None:
    """Why the extension does not serve the call, or None."""
    return next((rule.why for rule in REFUSALS if rule.holds(call)), None)


def _there() -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    return library(PREFILL) is not None and capability.startswith(CAPABILITY)


def takes(queries: int) -> bool:
    """Whether the extension is there for calls of so many queries, packed ones counted together.

    One query is decoding, which has ways of its own. With batch invariance it comes here as well: a
    row must not be computed otherwise for being alone.
    """
    return (queries > 1 or batch_invariant()) and _there() and not torch.compiler.is_compiling()


def serves(call: Call) -> bool:
    """Whether the extension computes the call."""
    return takes(call.q.shape[1]) and refusal(call) is None


def attention(call: Call) -> tuple[Tensor, Tensor] | None:
    """out ``[B, Q, Hq, Dv]`` and lse ``[B, Hq, Q]`` as :func:`.blockwise.forward`, both contiguous.
    None: nothing is done."""
    if not serves(call):
        return None
    q, k, v = _tensors(call)
    first = call.k.first if isinstance(call.k, PagedKeys) else 0
    pieces: list[int] = []
    for work in call.works:
        if work.number == NO_SEQUENCE:
            continue
        for row in range(work.row_count):
            pieces += [
                work.rows.start + row, work.key_rows.start + row, work.queries.start,
                work.query_count, first + work.keys.start, work.keys.stop - work.keys.start,
                work.offset,
            ]  # fmt: skip
    found = _run(
        q, k, v, pieces, call.scoring.pattern, call.s_aux, _keep(call, k), _table(call)
    )  # fmt: skip
    if found is None:  # torch's path says which page is missing
        return None
    out, lse = found
    for work in call.works:
        if work.number == NO_SEQUENCE:
            out[work.rows, work.queries] = 0.0
            lse[work.rows, :, work.queries] = float("-inf")
    return out, lse


def _run(
    q: Tensor, k: Tensor, v: Tensor, pieces: list[int], p: Pattern, s_aux: Tensor | None = None,
    keep: Tensor | None = None, table: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """`pieces`: the numbers of each one after the other. None: a page is missing."""
    batch, length, heads, dim = q.shape
    out = q.new_empty(batch, length, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    numbers = (ctypes.c_int64 * len(pieces))(*pieces)
    if s_aux is not None:
        s_aux = s_aux.float().contiguous()
    run = library(PREFILL)
    assert run is not None  # the caller looked
    description = _Prefill(
        *map(address, (q, k, v, out, lse)),
        ctypes.addressof(numbers),
        *map(address, (keep, s_aux, table)),
        DTYPES[q.dtype], len(pieces) // _PIECE, length, k.shape[1], heads, k.shape[2], dim,
        v.shape[-1], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], k.shape[1], p.window_left,
        p.window_right, p.sink_tokens, torch.get_num_threads(), p.scaling, p.softcap,
    )  # fmt: skip
    failed = run(ctypes.byref(description))
    if failed >= 0:
        return None
    if failed == -2:
        raise MemoryError(f"no memory to compute attention of {batch} x {length} queries")
    return out, lse


def plain(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, *, causal: bool, window_left: int
) -> Tensor | None:
    """As :func:`.direct.plain`, which has checked the call: ``[B, Hq, Q, D]`` -> ``[B, Q, Hq, D]``
    for calls that are worth the way into the extension."""
    batch, heads, length, dim = q.shape
    keys = k.shape[2]
    if not _there() or dim % LANES or batch * length * keys * heads * dim < LEAST_PRODUCTS[q.dtype]:
        return None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return None
    pieces: list[int] = []
    for row in range(batch):
        pieces += row, row, 0, length, 0, keys, keys - length
    right = 0 if causal else UNBOUNDED
    pattern = Pattern(scaling=scaling, window_left=window_left, window_right=right)
    found = _run(q, k, v, pieces, pattern)
    assert found is not None  # there are no pages
    return found[0]


def _table(call: Call) -> Tensor | None:
    if not isinstance(call.k, PagedKeys):
        return None
    assert call.k.pages.dtype == torch.int32
    return call.k.pages.contiguous()


def _keep(call: Call, k: Tensor) -> Tensor | None:
    """``[B, K]`` bool, which keys count, where the padding has holes."""
    if all(work.positions is None for work in call.works):
        return None
    keep = torch.ones(k.shape[:2], dtype=torch.bool)
    for work in call.works:
        if work.positions is not None:
            part = keep[work.key_rows, work.keys]
            part.fill_(False)
            part[:, work.positions] = True
    return keep
