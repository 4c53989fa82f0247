"""The CPU benchmark: it times what is right, refuses what is wrong, and writes one schema."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from extension_calls import count_prefills

from hf_attn_patch.bench import attention, results


@pytest.fixture(autouse=True)
def _no_flex(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(attention, "flex", refuse)


def test_every_row_has_its_peers(tmp_path: Path):
    out = tmp_path / "cpu.csv"
    with pytest.warns(UserWarning, match="flex_compiled failed with RuntimeError"):
        found = attention.run(out=out, threads=1, quick=True)
    groups: dict[tuple[str, str, str], set[str]] = {}
    for line in found:
        assert 0 < line["p20_ms"] <= line["p50_ms"] <= line["p80_ms"]
        assert (line["gbytes_s"] is not None) == (line["pass"] == "decode")
        groups.setdefault((line["seq_q"], line["extra"], line["dtype"]), set()).add(line["impl"])
    assert len(groups) == 10 and all(results.OURS in group for group in groups.values())
    assert groups["256", "padded row", "fp32"] == {
        results.OURS,
        "sdpa_is_causal",
        "transformers_sdpa",
    }
    assert groups["512", "", "bf16"] == {results.OURS, "sdpa_masked"}
    assert {"sdpa_packed", "sdpa_repeat_kv"} <= groups["1", "heads first", "bf16"]
    assert {"gather_sdpa_packed", "contiguous_cache"} <= groups["1", "page=16", "fp32"]
    assert [line["impl"] for line in results.read_rows(out)] == [line["impl"] for line in found]


@pytest.mark.filterwarnings("ignore:.*flex_compiled failed")
@pytest.mark.parametrize("name", attention.ROWS)
def test_a_shifted_result_is_not_timed(name, monkeypatch):
    """Keys one place off: a wrong peer is left out, and this package's own stops the run."""
    row = attention.ROWS[name]

    def shifted(impl):
        def make(shape):
            trial = row.make(shape)
            call = trial.contenders[impl]
            wrong = lambda: call().roll(1, dims=-2)  # noqa: E731
            return replace(trial, contenders={**trial.contenders, impl: wrong})

        return replace(row, make=make)

    peer = {"prefill": "sdpa_is_causal", "window": "sdpa_masked"}.get(name, "sdpa_packed")
    peer = "contiguous_cache" if name.startswith("paged") else peer
    with pytest.warns(UserWarning, match=f"{peer} is off by"):
        measured = attention.measure(shifted(peer), row.quick, rounds=1)
    assert peer not in {line.impl for line in measured} and len(measured) >= 1
    with pytest.raises(RuntimeError, match=r"is off by .* nothing was timed"):
        attention.measure(shifted(results.OURS), row.quick, rounds=1)


def test_the_extension_takes_part_where_it_is_built(with_extension):
    row = attention.ROWS["paged"]
    names = [line.impl for line in attention.measure(row, row.quick, rounds=1)]
    assert names[:2] == [results.OURS, f"{results.OURS}:extension"]
    assert len(with_extension) == 2  # checked, then timed; nothing else was served by it


@pytest.mark.parametrize("name", ["prefill", "window"])
def test_the_extension_takes_part_in_prompts(name, with_extension, monkeypatch):
    served = count_prefills(monkeypatch)
    row = attention.ROWS[name]
    names = [line.impl for line in attention.measure(row, row.quick, rounds=1)]
    assert names[:2] == [results.OURS, f"{results.OURS}:extension"]
    assert len(served) == 2


def test_nan_is_never_within_budget():
    row = attention.ROWS["decode"]
    trial = row.make(row.quick)
    error, allowed = attention.worst_error(torch.full_like(trial.q, float("nan")), trial, row.quick)
    assert not error <= allowed


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rows": ["sideways"]}, "possible: prefill, window"), ({"threads": 0}, "1 or more")],
    ids=["row", "threads"],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        attention.run(**options)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "measure", lambda *a, **k: 1 // 0)
        attention.run(threads=before + 1)
    assert torch.get_num_threads() == before


def test_the_script(fresh_python):
    done = fresh_python(
        "scripts/bench_attention.py", "--rows", "decode", "--quick", "--threads", "1", "--json"
    )
    assert {line["dtype"] for line in json.loads(done.stdout)} == {"fp32", "bf16"}
    done = fresh_python("scripts/bench_attention.py", "--rows", "sideways", check=False)
    assert done.returncode == 2 and "possible: prefill" in done.stderr
