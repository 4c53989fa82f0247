"""The pictures of what was measured: drawn from rows, named where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import draw_results
from bench import gpu

from hf_attn_patch.bench import results as rows


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Rows of two peers on a CPU and on a GPU, and a curve that doubles with length."""
    env, timing = rows.environment(), rows.Timing(p20_ms=1.0, p50_ms=2.0, p80_ms=3.0)
    shapes = [s for s in gpu.SLICES["forward"] if s.head_dim == 128 and s.window is None]
    made = [
        shape.row(impl, env, timing=timing, tflops=300.0)
        for shape in shapes
        for impl in (rows.OURS, "sdpa_cudnn")
    ]
    rows.append_rows(tmp_path / "attention_gpu.csv", made)
    rows.append_rows(tmp_path / "attention_cpu.csv", made[:2])
    return tmp_path


def test_each_picture_is_drawn_where_there_are_rows(results: Path, capsys) -> None:
    out = results / "pictures"
    assert draw_results.main(["--results", str(results), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["attention_cpu.png", "forward_gpu.png"]
    assert "growth_cpu: no rows are measured yet" in capsys.readouterr().out


def test_curves_are_those_of_the_rows(results: Path) -> None:
    figure = draw_results.forward_on_a_gpu(results)
    assert figure is not None and len(figure.axes) == 2  # full and causal
    for axis in figure.axes:
        names = [line.get_label() for line in axis.get_lines()]
        assert names == [rows.OURS, "sdpa_cudnn"]
        for line in axis.get_lines():
            assert list(line.get_xdata()) == list(gpu.SEQUENCES)
            assert set(line.get_ydata()) == {300.0}


def test_no_rows_no_pictures(tmp_path: Path) -> None:
    assert all(draw(tmp_path) is None for draw in draw_results.PICTURES.values())
