"""The Triton decode kernel against the float64 oracle: interpreted on the CPU, native on a GPU.

Everything that no query may see is NaN: behind a row's length, before its left padding, unused
pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from decode_calls import (
    DEVICE,
    NAN,
    Case,
    check,
    ints,
    make_inputs,
    paged_cache,
    run,
)
from kernel_cases import assert_within_budget
from torch import Tensor

from hf_attn_kernels import use_backend
from hf_attn_kernels.problem import CacheProblem, Pattern, Problem
from hf_attn_kernels.reference import attention_reference

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


BF16, FP16 = torch.bfloat16, torch.float16
CASES = (
    Case(name="K1", lengths=(1, 1)),
    Case(name="K63-K111-full", lengths=(63, 111), causal=False),
    Case(name="K257-one-split", lengths=(257,), splits=1),
    Case(name="K257-more-splits-than-tiles", lengths=(257, 1), splits=16),
    Case(name="splits-chosen", lengths=(257, 40), splits=0),
    Case(name="mha", heads_q=3, heads_kv=3),
    Case(name="mqa", heads_q=5, heads_kv=1),
    Case(name="Q3", tokens=3),
    Case(name="Q16", tokens=16),
    Case(name="Q40-many-row-tiles", tokens=40, splits=1),
    Case(name="Q40-K7-more-queries-than-keys", tokens=40, lengths=(7, 41)),
    Case(name="D16", dim=16),
    Case(name="D72", dim=72),
    Case(name="D80-DV48", dim=80, dim_v=48),
    Case(name="D192-DV128", dim=192, dim_v=128, lengths=(33,), heads_q=2, heads_kv=1),
    Case(name="D512", dim=512, lengths=(33,), heads_q=2, heads_kv=1),
    Case(name="window-1", window=(0, 0), tokens=3),
    Case(name="window-is-K", window=(110, 0), tokens=3),
    Case(name="window-beyond-K", window=(500, 0), tokens=3),
    Case(name="window-20", window=(20, 0), tokens=3),
    Case(name="window-two-sided", window=(9, 5), causal=False, tokens=16),
    Case(name="window-right-only", window=(-1, 3), causal=False, tokens=16),
    Case(name="window-sinks", window=(20, 0), sink_tokens=4, tokens=3),
    Case(name="window-sinks-across-a-tile", window=(8, 0), sink_tokens=37, tokens=3),
    Case(name="window-sinks-meet-window", window=(70, 0), sink_tokens=40, tokens=3),
    Case(name="sinks-beyond-causal", window=(2, 0), sink_tokens=20, tokens=16, lengths=(17, 12)),
    Case(name="softcap", softcap=3.0),
    Case(name="s_aux", s_aux=True),
    Case(name="s_aux-one-split", s_aux=True, splits=1),
    Case(name="alibi", alibi=True, tokens=3),
    Case(name="alibi-softcap-s_aux-window", alibi=True, softcap=5.0, s_aux=True, window=(33, 0)),
    Case(name="leftpad", leftpad=(40, 3), tokens=3),
    Case(name="leftpad-window-sinks", leftpad=(40, 3), window=(16, 0), sink_tokens=5, tokens=3),
    Case(name="empty-row", lengths=(0, 33)),
    Case(name="empty-row-s_aux", lengths=(0, 33), s_aux=True),
    Case(name="leftpad-hides-row", lengths=(20, 33), leftpad=(20, 0)),
    Case(name="bf16", dtype=BF16, lengths=(257, 63)),
    Case(name="bf16-one-split-Q16", dtype=BF16, splits=1, tokens=16),
    Case(name="fp16-window", dtype=FP16, window=(33, 0)),
)
PAGED = tuple(
    replace(case, name=f"{case.name}-page{size}", page_size=size)
    for size in (16, 64)
    for case in (
        Case(name="Q1"),
        Case(name="Q3-softcap-alibi", tokens=3, softcap=4.0, alibi=True),
        Case(name="Q16-s_aux", tokens=16, s_aux=True),
        Case(name="Q40-prefill", tokens=40, splits=1),
        Case(name="K257-splits", lengths=(257, 1), splits=4),
        Case(name="window", window=(20, 0), tokens=3),
        Case(name="window-freed", window=(20, 0), tokens=3, free_hidden=True, lengths=(200, 63)),
        Case(name="window-sinks-freed", window=(20, 0), sink_tokens=5, tokens=3, free_hidden=True,
             lengths=(200, 63)),
        Case(name="empty-row", lengths=(0, 33)),
        Case(name="bf16-D72-mqa", dtype=BF16, dim=72, heads_q=8, heads_kv=1),
    )
)  # fmt: skip
PAGED += (Case(name="page48-window-sinks", page_size=48, window=(30, 0), sink_tokens=3, tokens=3),)


@pytest.mark.parametrize("case", CASES + PAGED, ids=lambda case: case.name)
def test_matches_oracle(case: Case) -> None:
    x = make_inputs(case)
    check(case, x, run(case, x))


@pytest.mark.parametrize("shift", [-1, 1])
def test_negative_control_a_shifted_window_is_noticed(shift: int) -> None:
    case = Case(name="window", window=(20, 0), dtype=BF16, tokens=3)
    x = make_inputs(case)
    wrong = replace(case, window=(20 + shift, 0))
    check(case, x, run(case, x))
    with pytest.raises(AssertionError, match=r"out: error .* exceeds"):
        check(case, x, run(wrong, x))


def test_rows_that_see_nothing_are_zero() -> None:
    case = Case(name="empty", lengths=(0, 33))
    out, lse = run(case, make_inputs(case))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert bool(torch.isneginf(lse[0]).all())


def test_cache_rows_are_chosen_by_index() -> None:
    from hf_attn_kernels.triton.decode import attention_with_cache

    case = Case(name="indexed")
    x = make_inputs(case)
    order = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    caches = []
    for rows in (x.k, x.v):
        cache = torch.full((5, 120, *rows[0].shape[1:]), NAN, device=DEVICE)
        cache[3, :111], cache[1, :63] = rows[0], rows[1]
        caches.append(cache)
    lengths = ints(case.lengths)
    assert lengths is not None
    got = attention_with_cache(
        CacheProblem(
            q=x.q, k_cache=caches[0], v_cache=caches[1], seqlens_k=lengths, batch_idx=order,
            pattern=case.pattern,
        )
    )  # fmt: skip
    check(case, x, got)


def test_strided_tensors() -> None:
    """q transposed, K and V in one tensor: strides count, contents are not copied."""
    from hf_attn_kernels.triton.decode import attention_with_cache

    case = Case(name="strided", tokens=3, lengths=(63, 63))
    x = make_inputs(case)
    both = torch.stack([torch.stack(x.k), torch.stack(x.v)], dim=2)  # [B, K, 2, Hkv, D]
    lengths = ints(case.lengths)
    assert lengths is not None
    q = x.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert not q.is_contiguous()
    got = attention_with_cache(
        CacheProblem(
            q=q, k_cache=both[:, :, 0], v_cache=both[:, :, 1], seqlens_k=lengths,
            pattern=case.pattern, num_splits=2,
        )
    )  # fmt: skip
    check(case, x, got)


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """Rows 2**31 elements apart, of which only a few are ever touched."""
    from hf_attn_kernels.triton.decode import attention_with_cache

    case = Case(name="far", lengths=(63, 63), dim=16, heads_q=2, heads_kv=1, dtype=FP16)
    x = make_inputs(case)
    step = 2**31 + 64
    try:
        pools = [torch.empty(step + 2**12, dtype=FP16, device=DEVICE) for _ in range(2)]
    except RuntimeError:
        pytest.skip("8 GiB of address space are not to be had")
    views = [pool.as_strided((2, 63, 1, 16), (step, 16, 16, 1)) for pool in pools]
    for view, rows in zip(views, (x.k, x.v), strict=True):
        view.copy_(torch.stack(rows))
    lengths = ints(case.lengths)
    assert lengths is not None
    got = attention_with_cache(
        CacheProblem(
            q=x.q, k_cache=views[0], v_cache=views[1], seqlens_k=lengths, pattern=case.pattern
        )
    )
    check(case, x, got)


# -- keys given whole, with a mask ----------------------------------------------------------------

MASKS = {
    "left": lambda mask: mask[0, :30].fill_(False),
    "right": lambda mask: mask[0, 60:].fill_(False),
    "holes": lambda mask: mask[:, ::3].fill_(False),
    "all-of-a-row": lambda mask: mask[1].fill_(False),
    "none": lambda mask: mask,
}


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("window", [(-1, -1), (40, 0)], ids=["full", "window-sinks"])
def test_dense_with_padding_mask(pattern: str, window: tuple[int, int]) -> None:
    from hf_attn_kernels.triton.decode import decode_dense, serves_dense

    case = Case(name=pattern, lengths=(97, 97), tokens=2, window=window)
    if window[0] >= 0 and pattern != "holes":
        case = replace(case, sink_tokens=3)
    x = make_inputs(case)
    k, v = torch.stack(x.k), torch.stack(x.v)
    keep = torch.ones(2, 97, dtype=torch.bool, device=DEVICE)
    MASKS[pattern](keep)
    truth = [
        attention_reference(
            x.q, k, v, causal=True, window_size=window, sink_tokens=case.sink_tokens,
            key_padding_mask=keep, dtype=dtype,
        )
        for dtype in (torch.float64, torch.float32)
    ]  # fmt: skip
    k[~keep], v[~keep] = NAN, NAN
    problem = Problem(q=x.q, k=k, v=v, pattern=case.pattern, key_padding_mask=keep)
    assert serves_dense(problem)
    got = decode_dense(problem)
    for name, have, eager, exact in zip(("out", "lse"), got, truth[1], truth[0], strict=True):
        assert_within_budget(name, have, eager, exact)


@pytest.mark.parametrize(
    "change",
    [
        {"bias": torch.zeros(1, 1, 1, 8)},
        {"q": torch.zeros(1, 40, 4, 16)},
        {"q": torch.zeros(1, 1, 4, 16, requires_grad=True)},
        {"pattern": Pattern(scaling=1.0, dropout_p=0.5)},
    ],
    ids=["bias", "many-rows", "gradient", "dropout"],
)
def test_dense_leaves_to_the_forward_what_it_lacks(change: dict[str, object]) -> None:
    from hf_attn_kernels.triton.decode import serves_dense

    q, kv = torch.zeros(1, 1, 4, 16), torch.zeros(1, 8, 2, 16)
    problem = Problem(q=q, k=kv, v=kv, pattern=Pattern(scaling=1.0))
    assert serves_dense(problem)
    assert not serves_dense(replace(problem, **change))  # type: ignore[arg-type]


# -- operator, tables -----------------------------------------------------------------------------


def op_arguments() -> tuple[object, ...]:
    case = Case(name="op", lengths=(33, 20), tokens=2)
    x = make_inputs(case)
    k, v, table = paged_cache(replace(case, page_size=16), x.k, x.v)
    absent = (None,) * 7
    numbers = (0, 0, 0, 0.2, -1, 0, 0.0, 0, 2)
    return (x.q, k, v, ints(case.lengths), None, table, *absent, *numbers)


def append_arguments() -> tuple[object, ...]:
    q, k, v, lengths, _, table, *_ = op_arguments()
    assert isinstance(k, Tensor) and isinstance(v, Tensor)
    new = torch.ones(2, 2, *k.shape[2:], device=DEVICE)
    angle = torch.rand(200, 8, device=DEVICE)
    return (q, new, new, k, v, lengths, table, None, None, None, angle, angle, True, True)


@pytest.mark.parametrize(("name", "make"), [("decode", op_arguments), ("append", append_arguments)])
def test_opcheck(name: str, make: Callable[[], tuple[object, ...]]) -> None:
    import hf_attn_kernels.triton.decode  # noqa: F401  (defines the operators)

    torch.library.opcheck(
        getattr(torch.ops.hf_attn_kernels, name).default,
        make(),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_compiles_without_graph_break() -> None:
    import hf_attn_kernels.triton.decode  # noqa: F401

    args = op_arguments()

    def twice(q: Tensor) -> Tensor:
        out: Tensor = torch.ops.hf_attn_kernels.decode(q, *args[1:])[0]
        return out * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert isinstance(args[0], Tensor)
    torch.testing.assert_close(compiled(args[0]), twice(args[0]))


def test_a_dtype_without_kernel_is_refused() -> None:
    case = Case(name="fp64", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float64.*possible: float16, bfloat16, float32"):
        run(case, make_inputs(case))


def test_every_chip_has_a_tile_for_every_shape() -> None:
    from hf_attn_kernels.triton.decode_config import TABLES, config_for

    for chip in TABLES:
        for itemsize, stored in ((2, 2), (4, 4), (2, 1), (4, 1)):
            for dim in (1, 16, 72, 128, 192, 256, 300, 512):
                for rows in (1, 16, 17, 100, 10_000):
                    config = config_for(chip, itemsize, dim, rows, stored)
                    assert config.block_m >= 16 and config.block_n >= 16


@pytest.mark.parametrize(
    ("programs", "keys", "least", "most"),
    [(1, 32, 1, 1), (8, 16384, 16, 64), (132 * 8, 4096, 1, 1), (1, 1 << 20, 64, 128)],
    ids=["short", "few-programs", "machine-is-full", "one-long-row"],
)
def test_splits_fill_the_machine(programs: int, keys: int, least: int, most: int) -> None:
    from hf_attn_kernels.triton.decode_config import choose_splits

    assert least <= choose_splits(programs, keys, 64, 132) <= most
