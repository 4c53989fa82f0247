"""The GPU benchmark as far as a machine without a GPU can take it: shapes, gate, resume, script."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import decode, gpu

from hf_attn_patch.bench import results
from hf_attn_patch.bench.baselines import DECODE, Shape, eager, ours, sdpa, sdpa_packed

CPU = torch.device("cpu")
SMALL = Shape(
    pass_="forward", batch=2, heads_q=4, heads_kv=2, head_dim=32, seq_q=70, seq_k=70, dtype="fp32"
)
SHAPES = {
    "causal": SMALL,
    "full": replace(SMALL, causal=False),
    "window": replace(SMALL, window=9),
    "window-full": replace(SMALL, window=9, causal=False),
    "cross": replace(SMALL, seq_q=40),
}


def shifted(q, k, v, shape):
    """Attention one key off: the negative control that the gate must stop."""
    return ours(q, k.roll(1, dims=1), v.roll(1, dims=1), shape)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_contenders_agree_with_the_oracle(shape):
    torch.manual_seed(0)
    q, k, v = shape.inputs(CPU)
    for attention in (ours, eager, lambda *a: sdpa(*a, backend=None)):
        budget = gpu.forward_budget(attention(q, k, v, shape), q, k, v, shape)
        assert budget.kept, budget


def test_the_ways_of_ours_are_what_they_are_called():
    pytest.importorskip("triton")
    from hf_attn_kernels.triton.options import ruled_out

    ways = gpu.CONTENDERS["backward"]
    assert {name for name in ways if name.startswith(f"{results.OURS}:")} == {
        f"{results.OURS}:{way}" for way in ("pointers", "head-by-head", "nondeterministic")
    }
    with ways[f"{results.OURS}:pointers"].around():
        assert ruled_out("descriptors") and ruled_out("gluon") and not ruled_out("heavy_first")
    with ways[f"{results.OURS}:head-by-head"].around():
        assert ruled_out("heavy_first") and not ruled_out("descriptors")
    assert not ruled_out("descriptors") and ways[results.OURS].deterministic
    assert not ways[f"{results.OURS}:nondeterministic"].deterministic


def test_a_way_lasts_into_the_backward(monkeypatch):
    """What a contender rules out must still be so when its gradient is timed."""
    pytest.importorskip("triton")
    from hf_attn_kernels.triton.options import ruled_out

    shape, seen = replace(SMALL, pass_="backward"), []
    grad = torch.autograd.grad

    def watched(*args, **kwargs):
        seen.append(ruled_out("descriptors"))
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    env = results.environment()
    for name, want in ((f"{results.OURS}:pointers", True), (results.OURS, False)):
        field = {name: gpu.CONTENDERS["backward"][name]}
        before = len(seen)
        measured = gpu.measure(shape, env, CPU, gpu.Report(), contenders=field, rounds=2)
        assert [row.impl for row in measured] == [name]
        assert seen[-1] is want and len(seen) > before + 2


def test_packed_decode_agrees_and_refuses_what_it_cannot_do():
    shape = replace(SMALL, pass_="decode", seq_q=1)
    q, k, v = shape.inputs(CPU)
    for attention in (sdpa_packed, DECODE[results.OURS]):
        assert gpu.forward_budget(attention(q, k, v, shape), q, k, v, shape).kept
    with pytest.raises(ValueError, match="one query"):
        sdpa_packed(*SMALL.inputs(CPU), SMALL)


def test_decode_over_pages_agrees_with_the_oracle():
    shape = replace(SMALL, pass_="decode", seq_q=1, seq_k=512)
    q, k, v = shape.inputs(CPU)
    for attention in decode.PAGED.values():
        assert gpu.forward_budget(attention(q, k, v, shape), q, k, v, shape).kept
    late = attention(q, k[:, :256].repeat(1, 2, 1, 1), v, shape)  # the first half's keys twice
    assert not gpu.forward_budget(late, q, k, v, shape).kept
    with pytest.raises(ValueError, match="full pages"):
        attention(q, k[:, :500], v[:, :500], replace(shape, seq_k=500))


def test_decode_shapes_that_do_not_fit_are_named(tmp_path, monkeypatch):
    shapes = list(decode.shapes())
    assert {(s.batch, s.seq_k, s.heads_q // s.heads_kv) for s in shapes} >= {
        (b, n, g) for b in (1, 8, 64, 256) for n in (1024, 8192, 65536) for g in (1, 4, 8)
    }
    large = [s for s in shapes if decode.too_large(s)]
    assert [(s.batch, s.heads_kv, s.seq_k) for s in large] == [(256, 32, 65536)]
    monkeypatch.setattr(gpu, "SLICES", {"decode": tuple(large)})
    monkeypatch.setattr(gpu, "ceilings", lambda env, device: [])
    report = gpu.run(["decode"], out=tmp_path / "gpu.csv", device=CPU)
    assert not report.rows and "256 GiB, the limit is 120 GiB" in report.left_out[0]


def test_decode_rates_are_said_in_percent_of_the_copy_rate(tmp_path, monkeypatch):
    shape, said = replace(SMALL, pass_="decode", seq_q=1, seq_k=256), []
    monkeypatch.setattr(gpu, "SLICES", {"decode": (shape,)})
    small = gpu.ceilings
    monkeypatch.setattr(gpu, "ceilings", lambda env, device: small(env, device, scale=256))
    monkeypatch.setattr(gpu, "CONTENDERS", {"decode": {results.OURS: ours}})
    gpu.run(["decode"], out=tmp_path / "gpu.csv", device=CPU, say=said.append)
    assert "% of the copy rate" in said[-1] and not any("%" in line for line in said[:-1])


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_a_wrong_contender_is_not_timed(pass_):
    shape, report = replace(SMALL, pass_=pass_), gpu.Report()
    broken = lambda *a: torch.ones(2) @ torch.ones(3)  # noqa: E731
    field = {results.OURS: ours, "shifted": shifted, "broken": broken}
    env = results.environment()
    measured = gpu.measure(shape, env, CPU, report, contenders=field, rounds=3)
    assert [row.impl for row in measured] == [results.OURS]
    assert measured[0].timing.p50_ms > 0 and measured[0].tflops > 0
    assert len(report.wrong) == 1 and " shifted: error" in report.wrong[0]
    assert len(report.left_out) == 1 and " broken: RuntimeError" in report.left_out[0]


def test_nan_is_over_budget():
    q, k, v = SMALL.inputs(CPU)
    out = ours(q, k, v, SMALL).clone()
    out[0, 40, 0, 0] = float("nan")
    assert not gpu.forward_budget(out, q, k, v, SMALL).kept


def test_a_run_stops_at_its_budget_and_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "gpu.csv"
    field = {results.OURS: ours, "eager": eager}
    monkeypatch.setattr(gpu, "SLICES", {"forward": (SMALL, SHAPES["full"])})
    monkeypatch.setattr(gpu, "CONTENDERS", {"forward": field})
    monkeypatch.setattr(gpu, "ceilings", lambda env, device: [])
    one = gpu.run(["forward"], out=out, device=CPU, budget_s=1e-9)
    assert one.shapes_left == 2 and not one.rows
    two = gpu.run(["forward"], out=out, device=CPU)
    assert two.shapes_left == 0 and len(two.rows) == 4
    again = gpu.run(["forward"], out=out, device=CPU)
    assert not again.rows and len(results.read_rows(out)) == 4
    with pytest.raises(ValueError, match="unknown slice 'sideways'"):
        gpu.run(["sideways"], out=out, device=CPU)


def test_ceilings_are_rates():
    matmul, copy = gpu.ceilings(results.environment(), CPU, scale=256)
    assert matmul.extra == "matmul" and matmul.tflops > 0 and matmul.gbytes_s is None
    assert copy.extra == "copy" and copy.gbytes_s > 0 and copy.tflops is None


def test_the_shapes_are_those_of_the_published_tables():
    forward = {(s.head_dim, s.causal, s.seq_q) for s in gpu.SLICES["forward"]}
    assert {
        (d, c, s) for d in (64, 128, 256) for c in (True, False) for s in (512, 16384)
    } <= forward
    assert all(s.seq_q <= 8192 for s in gpu.SLICES["backward"])
    assert all(s.seq_q == 1 for s in gpu.SLICES["decode"])
    everything = [shape for slice_ in gpu.SLICES.values() for shape in slice_]
    assert len(set(everything)) == len(everything)


@pytest.fixture
def script():
    path = Path(__file__).parents[2] / "scripts" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_script_says_that_there_is_no_gpu(fresh_python):
    done = fresh_python("scripts/gpu.py", "--slice", "forward", check=False)
    assert done.returncode == 1 and "no GPU" in done.stderr and "make test" in done.stderr


@pytest.mark.parametrize("bad", [["--slice", "sideways"], ["--budget", "0"]], ids=" ".join)
def test_the_script_checks_its_arguments(script, bad, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(bad)
    assert stop.value.code == 2 and bad[0] in capsys.readouterr().err


def test_the_script_fails_when_this_package_is_wrong(script, monkeypatch, tmp_path, capsys):
    wrong = gpu.Report(wrong=[f"forward {results.OURS}: error 1.0e+00, allowed 1.0e-02"])
    monkeypatch.setattr(gpu, "run", lambda *a, **k: wrong)
    assert script.timings(["forward"], tmp_path / "x.csv", 1.0) == 1
    assert "WRONG" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "run", lambda *a, **k: gpu.Report(left_out=["forward eager: no"]))
    assert script.timings(["forward"], tmp_path / "x.csv", 1.0) == 0
