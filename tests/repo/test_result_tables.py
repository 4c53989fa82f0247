"""The tables of README.md and docs/: written from results/, and noticed when they are stale."""

from __future__ import annotations

import csv
from dataclasses import fields, replace

import pytest
import result_tables as tool
from tables import attention, compiled, conversion, implementations, models, slower, whole

from hf_attn_patch.bench import results
from hf_attn_patch.capabilities import Capabilities

ENV = results.Environment(
    device="chip",
    threads=1,
    torch="2.13",
    triton="3.7",
    transformers="5",
    commit="c",
    date="2026-01-01",
)


def row(impl: str, p50: float, **changes) -> results.BenchRow:
    timing = results.Timing(p20_ms=p50 * 0.9, p50_ms=p50, p80_ms=p50 * 1.1)
    plain = results.BenchRow(
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


def skeleton(names=tuple(tool.TABLES)) -> str:
    marks = (f"<!-- table:{name} -->\nold\n<!-- /table:{name} -->" for name in names)
    return "# Title\n\n" + "\n\ntext between\n\n".join(marks) + "\n"


@pytest.fixture
def project(tmp_path):
    """A README with one table and a page below docs/ with all others."""
    first, *others = tool.TABLES
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "README.md").write_text(skeleton([first]))
    (tmp_path / "docs" / "deep" / "page.md").write_text(skeleton(others))
    return tmp_path


def arguments(project) -> list[str]:
    return ["--root", str(project), "--results", str(project)]


def test_without_results_the_tables_say_so(tmp_path):
    file = tmp_path / "README.md"
    text = tool.render({file: skeleton()}, tmp_path)[file]
    assert "old" not in text and text.count("text between") == len(tool.TABLES) - 1
    # all but the registry's own, what is compiled and what is counted in it
    assert text.count("not measured yet") == len(tool.TABLES) - 3
    assert "Not compiled yet" in text and "Not counted yet" in text
    assert tool.render({file: text}, tmp_path)[file] == text  # a second run changes nothing


def test_cpu_peers_are_multiples_of_ours(tmp_path):
    measured = [row(results.OURS, 100.0), row("sdpa_mask", 250.0), row("eager", 1234.0)]
    measured += [
        row("sdpa_mask", 5.0, seq_q=1, extra="page=16", window=512)
    ]  # nobody of ours: no line
    results.append_rows(tmp_path / attention.CPU_CSV, measured)
    table = attention.cpu_table(1)(tmp_path)
    assert "100 ms (90.0 to 110)" in table and "sdpa_mask 2.50× · eager 12.3×" in table
    assert "on chip, 1 thread; torch 2.13" in table and "page=16" not in table


def test_the_newest_row_counts_and_each_way_of_ours_has_a_line(tmp_path):
    newer = replace(ENV, date="2026-02-01")
    measured = [row(results.OURS, 50.0, env=newer), row(results.OURS, 100.0), row("sdpa", 100.0)]
    measured += [row(f"{results.OURS}:split", 25.0)]
    results.append_rows(tmp_path / attention.CPU_CSV, measured)
    plain, split = attention.cpu_table(1)(tmp_path).splitlines()[2:4]
    assert "sdpa 2.00×" in plain and "by the" not in plain
    assert "sdpa 4.00×" in split and ", by the split |" in split


def test_a_default_install_is_shown_without_the_extension(tmp_path):
    measured = [row(results.OURS, 100.0), row("sdpa", 250.0), row("eager", 125.0)]
    measured += [row(f"{results.OURS}:extension", 10.0)]
    measured += [row(results.OURS, 200.0, dtype="fp32"), row("sdpa", 100.0, dtype="fp32")]
    measured += [row(results.OURS, 3.0, seq_q=1), row(f"{results.OURS}:extension", 1.0, seq_q=512)]
    results.append_rows(tmp_path / attention.CPU_CSV, measured)
    shown, _, about = attention.default_table(1)(tmp_path).partition("\n\n")
    head, _, both, one = shown.splitlines()
    assert head == "| work | fp32 | bf16 |"
    assert both.endswith("| 200 ms; sdpa 0.50× | 100 ms; eager 1.25×, sdpa 2.50× |")
    assert one.endswith("D 128 | – | 3.00 ms |") and "512" not in one
    assert about.startswith("Medians, interleaved, on chip, 1 thread;")
    assert "not measured yet" in attention.default_table(2)(tmp_path)


def test_gpu_rates_stand_in_columns_with_the_ceiling(tmp_path):
    measured = [
        row(results.OURS, 1.0, tflops=480.0),
        row("sdpa_cudnn", 1.0, tflops=590.4),
        row(results.OURS, 1.0, tflops=300.0, seq_q=512, seq_k=512),
        row("matmul", 1.0, pass_="ceiling", extra="matmul", tflops=790.0),
        row("copy", 1.0, pass_="ceiling", extra="copy", gbytes_s=4300.0),
        row(results.OURS, 0.009, pass_="decode", seq_q=1, extra="launch"),
    ]
    results.append_rows(tmp_path / attention.GPU_CSV, measured)
    table = attention.gpu_table("forward")(tmp_path)
    assert "| TFLOP/s | dtype | hf_attn_patch | sdpa_cudnn |" in table
    assert "| bf16 | 480 | 590 |" in table and "| bf16 | 300 | – |" in table
    assert "ceiling: matmul 790 TFLOP/s." in table and "4300" not in table
    assert "not measured yet" in attention.gpu_table("decode")(
        tmp_path
    )  # launch cost alone is no rate


def test_compiled_configurations_are_summed_up(tmp_path):
    columns = ["arch", "kernel", "name", "shared", "shared_limit", "spilled"]
    with (tmp_path / compiled.AOT_CSV).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, ["sm_90", "forward", "D64", 100, 232448, 0]])
        writer.writerows([["sm_90", "forward", "D128", 900, 232448, 8]])
        writer.writerows([["gfx942", "forward", "D64", 100, 65536, -1]])
    table = compiled.aot_table(tmp_path)
    assert "| sm_90 | `forward` | 2 | 900 | 232448 | 1 |" in table
    assert "| gfx942 | `forward` | 1 | 100 | 65536 | not known |" in table


def test_every_capability_has_a_line(tmp_path):
    table = implementations.implementations_table(tmp_path)
    assert {field.name for field in fields(Capabilities)} == set(implementations.FEATURES)
    assert "| `triton_fa2` | `triton_swa` |" in table
    assert "| backend on CPU | blockwise PyTorch |" in table


def test_a_stale_file_is_noticed_and_mended(project, capsys):
    page = project / "docs" / "deep" / "page.md"
    assert tool.main([*arguments(project), "--check"]) == 1
    assert "docs/deep/page.md: make results" in capsys.readouterr().err
    assert "old" in page.read_text()
    assert tool.main(arguments(project)) == 0
    assert "old" not in page.read_text()
    assert tool.main([*arguments(project), "--check"]) == 0


def test_a_misspelt_or_doubled_table_is_an_error(project, capsys):
    page = project / "docs" / "deep" / "page.md"
    page.write_text(page.read_text().replace("table:growth", "table:growths"))
    assert tool.main(arguments(project)) == 1
    assert "growth (0 times), growths (1 times)" in capsys.readouterr().err
    page.write_text(skeleton())  # one of them is in README.md already
    assert tool.main(arguments(project)) == 1
    assert "cpu-default (2 times)" in capsys.readouterr().err


def test_models_and_trainings_are_shown_as_measured(tmp_path):
    (tmp_path / models.GENERATE_CSV).write_text(
        "impl,model,dtype,requests,longest_prompt,new_tokens,page_size,tokens_s,of_sdpa,"
        "generate_bytes,pool_bytes,same_tokens,device,threads,torch,triton,transformers,date\n"
        "sdpa,m,float32,2,9,4,64,10,1.0,2097152,1048576,1.0,chip,1,2,3,5,2026-01-01\n"
        "ours,m,float32,2,9,4,64,25,2.5,1048576,1048576,0.5,chip,1,2,3,5,2026-01-01\n"
    )
    table = models.generate_table(tmp_path)
    assert "| `ours` | float32 | 25.0 | 2.50× | 1 MiB | 50% |\n| `sdpa` |" in table
    (tmp_path / conversion.GQA_CSV).write_text(
        "method,kv_heads,percent,loss,ppl,kl\n"
        "csvd,1,5,kl,12.34,.0625\nmean,1,0,,99,1\nmean,4,0,,50,.5\ncontrol,0,0,,10,0\n"
    )
    lines = conversion.gqa_table(tmp_path).splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| source's", "none (control)"], ["| 4", "mean"], ["| 1", "mean"], ["| 1", "csvd"]
    ]  # fmt: skip
    assert lines[3] == "| 1 | csvd | – | 12.3 (0.062) | – | – | – |"


def test_a_slower_row_needs_a_reason(tmp_path, project, capsys):
    """10% behind by median and by p20; pages are not measured against a cache without pages."""
    behind = [row(results.OURS, 111.0), row("sdpa", 100.0), row("eager", 300.0)]
    even = {"seq_k": 512, "seq_q": 512}
    fine = [row(results.OURS, 109.0, **even), row("sdpa", 100.0, **even)]
    pages = {"pass_": "decode", "seq_q": 1, "extra": "page=16"}
    fine += [row(results.OURS, 40.0, **pages), row("contiguous_cache", 20.0, **pages)]
    fine += [row("gather", 50.0, **pages)]
    results.append_rows(tmp_path / attention.CPU_CSV, fine)
    assert "No row takes more than 1.10 ×" in slower.slower_table(tmp_path)
    results.append_rows(tmp_path / attention.CPU_CSV, behind)
    with pytest.raises(ValueError, match=r"4096.* bf16, 1 thread, on chip: 1\.11 × sdpa's time"):
        slower.slower_table(tmp_path)
    assert tool.main([*arguments(project), "--check"]) == 1  # what `make check` runs
    assert "without a reason" in capsys.readouterr().err
    other = slower.Reason(impl=results.OURS, dtype="fp32", why="rounding")
    meant = slower.Reason(impl=results.OURS, dtype="bf16", sizes="4096", why="because")
    with pytest.raises(ValueError, match="without a reason"):
        slower.slower_table(tmp_path, [other])
    table = slower.slower_table(tmp_path, [other, meant])
    assert "| `hf_attn_patch` | 1.11 × sdpa's time | because |" in table and "512" not in table


def test_one_busy_moment_is_no_finding(tmp_path):
    busy = results.Timing(p20_ms=95.0, p50_ms=130.0, p80_ms=300.0)
    measured = [row(results.OURS, 1.0, timing=busy), row("sdpa", 100.0)]
    results.append_rows(tmp_path / attention.CPU_CSV, measured)
    assert "No row" in slower.slower_table(tmp_path)


def test_whole_models_stand_beside_sdpa(tmp_path):
    from hf_attn_patch.bench.model import COLUMNS

    common = {
        "model": "m", "dtype": "float32", "batch": 8, "context": 2048, "checkpointing": 0,
        "phase": "decode", "device": "chip", "threads": 1, "torch": "2", "triton": "3",
        "transformers": "5", "date": "2026-01-01", "peak_bytes": 3 << 20,
    }  # fmt: skip
    measured = [
        {"impl": "triton_fa2", "p50_ms": 4, "tokens_s": 2000},
        {"impl": "sdpa", "p50_ms": 99, "tokens_s": 80},
        {"impl": "sdpa", "p50_ms": 10, "tokens_s": 800},  # later, so it counts
        {"impl": "eager", "why_not": "does not fit"},
        {"impl": "sdpa", "p50_ms": 1500, "phase": "training", "checkpointing": 1},
        {"impl": "sdpa", "p50_ms": 7, "device": "another", "phase": "prefill"},
    ]
    results.append_table(tmp_path / "model_cpu.csv", COLUMNS, [common | row for row in measured])
    text = whole.model_table("prefill", "decode")(tmp_path)
    assert "| work | tokens | `sdpa` | `triton_fa2` | `eager` |" in text
    line = (
        "| decode | 8 × 2,048 | 800 tokens/s, 3 MiB | 2000 tokens/s, 2.50×, 3 MiB | does not fit |"
    )
    assert line in text and text.count("on another, 1 thread") == 1
    training = whole.model_table("training")(tmp_path)
    assert "| training, checkpointing | 8 × 2,048 | 1500 ms, 3 MiB |" in training


def test_short_prompts_are_ratios_of_sdpas_time(tmp_path):
    from hf_attn_patch.bench.short import COLUMNS

    common = {
        "model": "m", "dtype": "float32", "prompt_tokens": 16, "new_tokens": 32, "device": "chip",
        "threads": 1, "torch": "2", "triton": "3", "transformers": "5", "date": "2026-01-01",
    }  # fmt: skip
    measured = [
        {"impl": "sdpa", "p50_ms": 100, "of_sdpa_time": 1},
        {"impl": "triton_fa2", "p50_ms": 101, "of_sdpa_time": 1.0125},
    ]
    results.append_table(tmp_path / whole.SHORT_CSV, COLUMNS, [common | row for row in measured])
    assert "| m | float32 | 16 + 32 | 100 ms | 1.012 |" in whole.short_table(tmp_path)
