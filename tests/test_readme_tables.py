"""README.md's tables: written from results/, and noticed when they are stale."""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hf_attn_patch.bench import rows

SCRIPT = Path(__file__).parents[1] / "scripts" / "readme_tables.py"
ENV = rows.Environment(
    device="chip",
    threads=1,
    torch="2.13",
    triton="3.7",
    transformers="5",
    commit="c",
    date="2026-01-01",
)


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("readme_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(impl: str, p50: float, **changes) -> rows.BenchRow:
    timing = rows.Timing(p20_ms=p50 * 0.9, p50_ms=p50, p80_ms=p50 * 1.1)
    plain = rows.BenchRow(
        impl=impl,
        pass_="forward",
        dtype="bf16",
        batch=1,
        heads_q=32,
        heads_kv=8,
        head_dim=128,
        seq_q=4096,
        seq_k=4096,
        env=ENV,
        timing=timing,
    )
    return replace(plain, **changes)


def skeleton(tables) -> str:
    marks = (f"<!-- table:{name} -->\nold\n<!-- /table:{name} -->" for name in tables.TABLES)
    return "# Title\n\n" + "\n\ntext between\n\n".join(marks) + "\n"


def test_without_results_the_readme_says_so(tables, tmp_path):
    text = tables.render(skeleton(tables), tmp_path)
    assert "old" not in text and text.count("text between") == len(tables.TABLES) - 1
    assert text.count("not measured yet") == 5 and "Not compiled yet" in text
    assert tables.render(text, tmp_path) == text  # a second run changes nothing


def test_cpu_peers_are_multiples_of_ours(tables, tmp_path):
    measured = [row(rows.OURS, 100.0), row("sdpa_mask", 250.0), row("eager", 1234.0)]
    measured += [
        row("sdpa_mask", 5.0, seq_q=1, extra="page=16", window=512)
    ]  # nobody of ours: no line
    rows.append_rows(tmp_path / tables.CPU_CSV, measured)
    table = tables.cpu_table(tmp_path)
    assert "100 ms (90.0 to 110)" in table and "sdpa_mask 2.50× · eager 12.3×" in table
    assert "on chip, 1 thread; torch 2.13" in table and "page=16" not in table


def test_the_newest_row_and_our_best_variant_count(tables, tmp_path):
    newer = replace(ENV, date="2026-02-01")
    measured = [row(rows.OURS, 50.0, env=newer), row(rows.OURS, 100.0), row("sdpa", 100.0)]
    measured += [row(f"{rows.OURS}:split", 25.0)]
    rows.append_rows(tmp_path / tables.CPU_CSV, measured)
    assert "sdpa 4.00×" in tables.cpu_table(tmp_path)


def test_gpu_rates_stand_in_columns_with_the_ceiling(tables, tmp_path):
    measured = [
        row(rows.OURS, 1.0, tflops=480.0),
        row("sdpa_cudnn", 1.0, tflops=590.4),
        row(rows.OURS, 1.0, tflops=300.0, seq_q=512, seq_k=512),
        row("matmul", 1.0, pass_="ceiling", extra="matmul", tflops=790.0),
        row("copy", 1.0, pass_="ceiling", extra="copy", gbytes_s=4300.0),
        row(rows.OURS, 0.009, pass_="decode", seq_q=1, extra="launch"),
    ]
    rows.append_rows(tmp_path / tables.GPU_CSV, measured)
    table = tables.gpu_table("forward")(tmp_path)
    assert "| TFLOP/s | dtype | hf_attn_patch | sdpa_cudnn |" in table
    assert "| bf16 | 480 | 590 |" in table and "| bf16 | 300 | – |" in table
    assert "ceiling: matmul 790 TFLOP/s." in table and "4300" not in table
    assert "not measured yet" in tables.gpu_table("decode")(
        tmp_path
    )  # launch cost alone is no rate


def test_compiled_configurations_are_summed_up(tables, tmp_path):
    columns = ["arch", "kernel", "name", "shared", "shared_limit", "spilled"]
    with (tmp_path / tables.AOT_CSV).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, ["sm_90", "forward", "D64", 100, 232448, 0]])
        writer.writerows([["sm_90", "forward", "D128", 900, 232448, 8]])
        writer.writerows([["gfx942", "forward", "D64", 100, 65536, -1]])
    table = tables.aot_table(tmp_path)
    assert "| sm_90 | `forward` | 2 | 900 | 232448 | 1 |" in table
    assert "| gfx942 | `forward` | 1 | 100 | 65536 | not known |" in table


def test_every_capability_has_a_line(tables, tmp_path):
    table = tables.implementations_table(tmp_path)
    assert {field.name for field in fields(tables.Capabilities)} == set(tables.FEATURES)
    assert "| `triton_fa2` | `triton_swa` |" in table
    assert "| backend on CPU | blockwise PyTorch |" in table


def test_a_stale_readme_is_noticed_and_mended(tables, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(skeleton(tables))
    arguments = ["--readme", str(readme), "--results", str(tmp_path)]
    assert tables.main([*arguments, "--check"]) == 1
    assert "stale: make results" in capsys.readouterr().err and "old" in readme.read_text()
    assert tables.main(arguments) == 0
    assert tables.main([*arguments, "--check"]) == 0


def test_a_missing_marker_is_an_error(tables, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(skeleton(tables).replace("table:cpu", "table:cpus"))
    assert tables.main(["--readme", str(readme), "--results", str(tmp_path)]) == 1
    assert "must have each of" in capsys.readouterr().err
