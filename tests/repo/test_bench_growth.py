"""Curves of cost over length: the fit, and that a wrong result is never timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_attn_patch.bench import growth, results


def test_the_exponent_of_a_known_curve() -> None:
    lengths = [1024, 2048, 4096, 8192, 16384]
    square = [1e-6 * n**2 for n in lengths]
    assert growth.exponent(lengths, square) == pytest.approx(2)
    # what a call costs whatever its length shows below FITTED_FROM only
    with_call = [50.0, 50.0, *(0.01 * n for n in lengths[2:])]
    assert growth.exponent(lengths, with_call) == pytest.approx(1)
    assert growth.exponent(lengths[:3], square[:3]) is None


def test_every_curve_runs_and_lands_in_the_csv(tmp_path: Path) -> None:
    out = tmp_path / "growth.csv"
    found = growth.run(out=out, longest=1024, rounds=1)
    assert [curve["curve"] for curve in found] == list(growth.CURVES)
    assert [row["extra"] for row in results.read_rows(out)] == list(growth.CURVES)
    assert all(curve["p50_ms"][0] > 0 for curve in found)


@pytest.mark.parametrize("curve", ["window", "window-training"])
def test_a_wrong_result_is_not_timed(curve: str, monkeypatch: Any, tmp_path: Path) -> None:
    right = growth.ours
    monkeypatch.setattr(growth, "ours", lambda q, k, v, shape: right(q, k, 1.01 * v, shape))
    out = tmp_path / "growth.csv"
    with pytest.raises(RuntimeError, match="nothing was timed"):
        growth.run(curves=[curve], out=out, longest=1024, rounds=1)
    assert not out.exists()


def test_unknown_curves_are_named() -> None:
    with pytest.raises(ValueError, match="possible: prefill, window"):
        growth.run(curves=["quick"])
