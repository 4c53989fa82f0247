"""The CSV that every benchmark appends to, and the paper costs behind its rates."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch

from hf_attn_patch.bench import results
from hf_attn_patch.bench.flops import attention_flops, kv_bytes, visible_pairs

ENV = results.Environment(
    device="a chip",
    threads=1,
    torch="2",
    triton="3",
    transformers="5",
    commit="c",
    date="2026-01-01",
)
TIMING = results.Timing(p20_ms=1.0, p50_ms=2.0, p80_ms=3.5)
ROW = results.BenchRow(
    impl="sdpa",
    pass_="forward",
    dtype="bf16",
    batch=1,
    heads_q=8,
    heads_kv=2,
    head_dim=64,
    seq_q=128,
    seq_k=128,
    env=ENV,
    timing=TIMING,
)


def test_rows_come_back_in_the_promised_columns(tmp_path):
    path = tmp_path / "deep" / "bench.csv"
    results.append_rows(path, [ROW])
    results.append_rows(path, [replace(ROW, impl="eager", window=32, tflops=1.25, causal=False)])
    with path.open() as file:
        assert next(csv.reader(file)) == results.COLUMNS
    first, second = results.read_rows(path)
    assert (first["impl"], first["pass"], first["p50_ms"], first["window"]) == (
        "sdpa",
        "forward",
        "2",
        "",
    )
    assert (second["causal"], second["window"], second["tflops"]) == ("0", "32", "1.25")


def test_a_resumed_run_finds_what_was_measured(tmp_path):
    path = tmp_path / "bench.csv"
    results.append_rows(path, [ROW])
    plan = replace(ROW, timing=None, env=replace(ENV, date="2027-01-01", commit="later"))
    assert plan.key() in results.measured_keys(path)
    for other in (replace(plan, seq_q=64), replace(plan, env=replace(ENV, device="another chip"))):
        assert other.key() not in results.measured_keys(path)
    assert results.measured_keys(tmp_path / "absent.csv") == set()


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "bench.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns a,b"):
        results.append_rows(path, [ROW])


def test_every_contender_is_called_once_a_round():
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timed = results.time_interleaved(contenders, rounds=6, warmup=1)
    assert set(timed) == set("abc") and len(calls) == 3 * 7
    assert all(sorted(calls[i : i + 3]) == ["a", "b", "c"] for i in range(0, 21, 3))
    assert len({tuple(calls[i : i + 3]) for i in range(3, 21, 3)}) == 3  # the order turns


def test_percentiles_interpolate():
    timing = results.percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (timing.p20_ms, timing.p50_ms, timing.p80_ms) == (2.0, 3.5, 5.0)


def test_the_environment_names_its_machine():
    env = results.environment("cpu")
    assert env.torch == torch.__version__ and env.threads == torch.get_num_threads() and env.device


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window", [None, 1, 3, 50], ids=lambda w: f"W{w}")
@pytest.mark.parametrize("seq_q,seq_k", [(7, 7), (1, 9), (3, 8), (8, 3)], ids=lambda s: f"S{s}")
def test_visible_pairs_count_the_mask(seq_q, seq_k, window, causal):
    back = torch.arange(seq_q)[:, None] + seq_k - seq_q - torch.arange(seq_k)
    mask = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    if window is not None:
        mask &= back.abs() < window
    assert visible_pairs(seq_q, seq_k, causal=causal, window=window) == int(mask.sum())


def test_costs_on_paper():
    shape = {"batch": 2, "heads_q": 3, "head_dim": 16, "seq_q": 8, "seq_k": 8, "causal": False}
    assert attention_flops(**shape) == 2 * 3 * 64 * 4 * 16
    assert attention_flops(**shape, backward=True) == 2.5 * attention_flops(**shape)
    assert attention_flops(**shape, head_dim_v=8) == 2 * 3 * 64 * 2 * (16 + 8)
    assert kv_bytes(batch=2, heads_kv=4, head_dim=8, seq_k=10, itemsize=2) == 2 * 4 * 10 * 16 * 2
