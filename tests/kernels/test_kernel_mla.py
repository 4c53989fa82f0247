"""Absorbed MLA decode against the float64 oracle that expands keys and values, on each backend.

Everything that no query may see is NaN: behind a row's length, before its padding, masked keys,
unused pages.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from mla_calls import DEVICE, Case, absorbed, check, expected, make_inputs, place, run
from torch import Tensor

from hf_attn_kernels import mla_decode, use_backend

BACKENDS = ["triton"] if DEVICE == "cuda" else ["cpu", "triton"]
if importlib.util.find_spec("triton") is None:
    BACKENDS.remove("triton")


BF16, FP16 = torch.bfloat16, torch.float16
CASES = (
    Case(name="K1", lengths=(1, 1)),
    Case(name="K63-K111-full", lengths=(63, 111), causal=False),
    Case(name="K257-one-split", lengths=(257,), splits=1),
    Case(name="K257-K1-more-splits-than-tiles", lengths=(257, 1), splits=16),
    Case(name="K1023-splits-chosen", lengths=(1023,), splits=0),
    Case(name="empty-row", lengths=(63, 0)),
    Case(name="Q3", tokens=3),
    Case(name="Q16-H5", tokens=16, heads=5),
    Case(name="Q20-K7-more-queries-than-keys", tokens=20, lengths=(7, 41), splits=1),
    Case(name="H1", heads=1),
    Case(name="H40-several-row-tiles", heads=40, lengths=(65,)),
    Case(name="R24-P8", rank=24, rope=8),
    Case(name="R512-P64", rank=512, rope=64, nope=128, dim_v=128, lengths=(33,)),
    Case(name="window-1", window=(0, 0), tokens=3),
    Case(name="window-7-Q3", window=(6, 0), tokens=3),
    Case(name="window-is-K", window=(110, 0), tokens=3),
    Case(name="window-beyond-K", window=(500, 0), tokens=3),
    Case(name="window-both-sides", window=(9, 1), causal=False, tokens=4),
    Case(name="leftpad", leftpad=(7, 63)),
    Case(name="leftpad-Q3-window", leftpad=(7, 20), tokens=3, window=(30, 0)),
    Case(name="masked", lengths=(111, 111), masked=True),
    Case(name="masked-Q3", lengths=(65, 65), masked=True, tokens=3),
    Case(name="page16", page_size=16),
    Case(name="page16-Q3-window-freed", page_size=16, tokens=3, window=(20, 0), free_hidden=True),
    Case(name="page64-K257", page_size=64, lengths=(257, 1)),
    Case(name="bf16", dtype=BF16),
    Case(name="bf16-page16-Q3", dtype=BF16, page_size=16, tokens=3),
    Case(name="fp16-masked", dtype=FP16, lengths=(65, 65), masked=True),
    Case(name="float8", float8=True),
    Case(name="float8-bf16-page16", float8=True, dtype=BF16, page_size=16),
)
RUNS = [pytest.param(b, c, id=f"{b}-{c.name}") for b in BACKENDS for c in CASES]


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize(("backend", "case"), RUNS)
def test_against_the_expanded_oracle(backend: str, case: Case) -> None:
    x = make_inputs(case)
    with use_backend(backend):
        check(case, x, run(case, x))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="float64 is for the CPU")
def test_float64_on_the_cpu() -> None:
    case = Case(name="fp64", dtype=torch.float64, tokens=3)
    x = make_inputs(case)
    out, _ = run(case, x)
    values = torch.einsum("bqhr,hvr->bqhv", out, x.w_uv)
    torch.testing.assert_close(values, expected(case, x, torch.float64)[0], rtol=0, atol=1e-13)


WRONG: dict[str, dict[str, Any]] = {
    "scale": {"softmax_scale": 0.2},
    "not-causal": {"causal": False},
    "window": {"window_size": (30, 0)},
    "shifted": {"cache_seqlens": torch.tensor([110, 62], dtype=torch.int32, device=DEVICE)},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_negative_control_a_wrong_call_is_seen(backend: str, change: dict[str, Any]) -> None:
    case = Case(name="control", tokens=3)
    x = make_inputs(case)
    with use_backend(backend), pytest.raises(AssertionError):
        check(case, x, run(case, x, **change))


def test_negative_control_swapped_heads_are_seen() -> None:
    case = Case(name="control")
    x = make_inputs(case)
    out, lse = run(case, x)
    with pytest.raises(AssertionError, match="out"):
        check(case, x, (out.flip(2), lse))


# -- the door -------------------------------------------------------------------------------------

GOOD = {
    "q_latent": torch.zeros(2, 1, 4, 32),
    "q_rope": torch.zeros(2, 1, 4, 16),
    "latent": torch.zeros(2, 9, 32),
    "k_rope": torch.zeros(2, 9, 16),
    "softmax_scale": 0.1,
}
PAGES = {"block_table": torch.zeros(2, 1, dtype=torch.int32)}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "heads-in-the-cache": ({"latent": torch.zeros(2, 9, 1, 32)}, r"\[batch, keys, rank\]"),
    "other-rank": ({"latent": torch.zeros(2, 9, 16)}, "q_latent has 32 columns and latent 16"),
    "fewer-ropes": ({"k_rope": torch.zeros(2, 8, 16)}, "k_rope must agree with latent"),
    "dtypes": ({"q_latent": torch.zeros(2, 1, 4, 32, dtype=BF16)}, "q_rope must agree"),
    "strides": ({"latent": torch.zeros(2, 32, 9).mT}, "contiguous in its last dimension"),
    "batch": ({"latent": torch.zeros(3, 9, 32), "k_rope": torch.zeros(3, 9, 16)}, "batch 2"),
    "too-long": ({"cache_seqlens": 10}, "must be 0 to 9"),
    "int64": ({"cache_seqlens": torch.tensor([1, 2])}, "int32"),
    "page-size": (PAGES, "page_size 9"),
    "mask-shape": ({"key_mask": torch.ones(2, 8, dtype=torch.bool)}, r"bool \[2, 9\]"),
    "mask-dtype": ({"key_mask": torch.ones(2, 9)}, r"bool \[2, 9\]"),
    "descale": ({"latent_descale": torch.ones(1)}, "is for caches of torch.float8_e4m3fn"),
    "scale": ({"softmax_scale": float("nan")}, "positive and finite"),
    "gradient": ({"q_rope": torch.zeros(2, 1, 4, 16, requires_grad=True)}, "no backward"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_calls_are_refused(change: dict[str, Any], message: str) -> None:
    mla_decode(**GOOD)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        mla_decode(**(GOOD | change))


def test_pages_and_a_mask_do_not_go_together() -> None:
    paged = {k: torch.zeros(3, 16, GOOD[k].shape[-1]) for k in ("latent", "k_rope")}  # type: ignore[attr-defined]
    mask = {"key_mask": torch.ones(3, 16, dtype=torch.bool)}
    with pytest.raises(ValueError, match="got a block_table beside it"):
        mla_decode(**(GOOD | paged | PAGES | mask))


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64 is not supported"),
        ({"rank": 600}, "600 columns beside a rotated key of 16"),
    ],
)
def test_triton_refuses_what_it_has_no_tiles_for(change: dict[str, Any], message: str) -> None:
    case = replace(Case(name="refused"), **change)
    with use_backend("triton"), pytest.raises(ValueError, match=message):
        run(case, make_inputs(case))


def test_operator_and_compile() -> None:
    case = Case(name="op", tokens=2)
    x = make_inputs(case)
    latent, table = place(replace(case, page_size=16), x.latent, x.keep, None)
    k_rope, _ = place(replace(case, page_size=16), x.k_rope, x.keep, None)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE)
    call = (absorbed(case, x), x.q_rope, latent, k_rope)
    numbers = (0.2, -1, 0, 2)
    torch.library.opcheck(
        torch.ops.hf_attn_kernels.mla_decode.default,
        (*call, lengths, table, None, None, None, None, *numbers),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )

    def twice(*given: Tensor) -> Tensor:
        out = mla_decode(*given, softmax_scale=0.2, cache_seqlens=lengths, block_table=table)
        assert isinstance(out, Tensor)
        return out * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*call), twice(*call))


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
def test_every_chip_has_a_tile_for_every_shape() -> None:
    from hf_attn_kernels.triton.mla_config import MAX_RANK, TABLES, config_for

    for chip in TABLES:
        for itemsize, stored in ((2, 2), (4, 4), (2, 1), (4, 1)):
            for rank in (1, 16, 72, 256, 384, MAX_RANK):
                for rows in (1, 16, 17, 128, 10_000):
                    config = config_for(chip, itemsize, rank, rows, stored)
                    assert config.block_m >= 16 and config.block_n >= 16
