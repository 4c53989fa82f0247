"""Whole models beside sdpa: rows, what stops a wrong one, resuming, and the GPU script's slices."""

from __future__ import annotations

import csv
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from tiny_checkpoints import tiny_checkpoint

from hf_attn_patch.bench import model, model_worker, script, shapes
from hf_attn_patch.bench.model_worker import Case, Subject
from hf_attn_patch.bench.worker import Alone
from hf_attn_patch.registration import functions
from hf_attn_patch.swa_config import SwaSettings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

TINY = Subject(name="tiny-window", dtype="float32", device="cpu", threads=1)
DECODE = Case(phase="decode", batch=2, context=70)
CASES = {
    "prefill": Case(phase="prefill", batch=2, context=70),
    "decode": DECODE,
    "training": Case(phase="training", batch=2, context=70),
    "checkpointing": Case(phase="training", batch=2, context=70, checkpointing=True),
}


class Here(Alone):
    """In this process: what is tested is not where it runs."""

    alive = True

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def call(self, function: Any, *arguments: object) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise RuntimeError(f"{self.name}: {type(error).__name__}: {error}") from error


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "Alone", Here)


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def see_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is behind triton_fa2 and the paged one sees 16 tokens."""
    narrow = functions._open()._replace(own_windows=SwaSettings(window=16))
    monkeypatch.setattr(functions, "_behind", narrow)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_implementations_agree_and_half_a_window_shows(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 tokens under a window of 32; the negative control sees 16 of them."""
    want = model_worker.answer("sdpa", TINY, case)
    assert len(want) > 100 and any(want)
    impls = model.TRAINED if case.phase == "training" else model.IMPLEMENTATIONS
    for impl in impls:
        assert model.distance(model_worker.answer(impl, TINY, case), want) < model.BAND["float32"]
        turn = model_worker.turn(impl, TINY, case)
        assert turn.ms > 0 and turn.peak_bytes > 0
    see_half(monkeypatch)
    wrong = model_worker.answer("triton_fa2", TINY, case)
    assert model.distance(wrong, want) > max(model.BAND.values())


def test_nan_is_never_near() -> None:
    assert not model.distance([float("nan"), 1.0], [1.0, 1.0]) <= 1


@pytest.mark.parametrize("impl", ["triton_fa2", model_worker.PAGED])
def test_a_filled_cache_is_what_attention_reads(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of its first layer turned round, and the answer is another."""
    filled = model_worker.fill
    caches: list[Any] = []

    def watched(cache: Any, *rest: Any) -> None:
        filled(cache, *rest)
        assert cache.get_seq_length() == DECODE.context
        if caches:
            layer = cache.layers[0]
            (layer.v_pages if impl == model_worker.PAGED else layer.values).neg_()
        caches.append(cache)

    monkeypatch.setattr(model_worker, "fill", watched)
    first, second = (model_worker.answer(impl, TINY, DECODE) for _ in range(2))
    assert model.distance(second, first) > max(model.BAND.values())
    monkeypatch.setattr(model_worker, "fill", filled)
    assert model_worker.answer(impl, TINY, DECODE) == first


def test_rows_of_their_own_processes(tmp_path: Path) -> None:
    """The real thing, small: a process for each implementation, then a run that goes on."""
    out = tmp_path / "model.csv"
    folder = tiny_checkpoint(tmp_path / "m", kv_heads=2)
    options: dict[str, Any] = {
        "contexts": [24], "batches": [1], "rounds": 2, "threads": 1, "out": out,
        "impls": ["sdpa", model_worker.PAGED, model.WINDOWED],
    }  # fmt: skip
    said: list[str] = []
    found = model.run(folder, phases=["prefill", "decode"], **options, say=said.append)
    # this model has no window, so triton_swa has nothing to do
    assert [(row["phase"], row["impl"]) for row in found] == [
        (phase, impl) for phase in ("prefill", "decode") for impl in ("sdpa", model_worker.PAGED)
    ]
    for row in found:
        tokens = 24 if row["phase"] == "prefill" else 1
        assert row["rounds"] == 2 and 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["tokens_s"] == pytest.approx(tokens / row["p50_ms"] * 1e3, rel=1e-2)
        assert row["model_bytes"] > 0 and row["error"] < 1e-3 and row["threads"] == 1
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        assert len([*reader]) == 4 and reader.fieldnames == model.COLUMNS
    assert model.run(folder, phases=["prefill", "decode"], **options) == []


def test_a_run_stops_at_its_budget(here: None) -> None:
    said: list[str] = []
    found = model.run(shape="tiny", phases=["decode"], budget_s=0.0, say=said.append)
    assert not found and said == ["out of time before 6 of 6 cases: run it again"]


def test_what_is_wrong_is_not_timed(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = model_worker.answer

    def off(impl: str, subject: Subject, case: Case) -> list[float]:
        values = right(impl, subject, case)
        return [1.01 * x for x in values] if impl == "triton_fa2" else values

    monkeypatch.setattr(model_worker, "answer", off)
    timed: list[str] = []
    turn = model_worker.turn
    monkeypatch.setattr(model_worker, "turn", lambda impl, *a: timed.append(impl) or turn(impl, *a))
    with pytest.raises(RuntimeError, match=r"decode of 1 x 16 tokens: triton_fa2 is off by \d"):
        model.run(
            shape="tiny", phases=["decode"], contexts=[16], batches=[1], rounds=1, threads=1,
            impls=["sdpa", "triton_fa2", model_worker.PAGED],
        )  # fmt: skip
    assert timed == ["sdpa", model_worker.PAGED]


def test_what_does_not_fit_is_a_row_without_times(
    here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too large by the guess, or by the device's own word, also in the middle."""
    answer, turn = model_worker.answer, model_worker.turn

    def full(impl: str, *rest: Any) -> Any:
        if impl == "triton_fa2":
            raise RuntimeError("OutOfMemoryError: CUDA out of memory. Tried to allocate")
        return answer(impl, *rest)

    def broken(impl: str, *rest: Any) -> Any:
        if impl == "sdpa":
            raise RuntimeError("sdpa: its process ended with -9")
        return turn(impl, *rest)

    monkeypatch.setattr(model_worker, "answer", full)
    monkeypatch.setattr(model_worker, "turn", broken)
    monkeypatch.setattr(model, "needed", lambda case, known, impl: 1 << 60 * (impl == "eager"))
    found = model.run(
        shape="tiny", phases=["prefill"], contexts=[16], rounds=1, threads=1,
        impls=["sdpa", "triton_fa2", model_worker.PAGED, "eager"],
    )  # fmt: skip
    assert {row["impl"]: row["why_not"] for row in found} == {
        "triton_fa2": "does not fit", "eager": "does not fit", model_worker.PAGED: "",
    }  # fmt: skip


def test_memory_that_is_clearly_too_much() -> None:
    """A Llama-3-8B: 128 KiB of keys and values a token; eager's scores grow with the square."""
    facts = model_worker.Facts(
        bytes=16 << 30, free_bytes=120 << 30, layers=32, heads=32, kv_bytes=128 << 10, width=4096,
        inner=14336, vocabulary=128256, itemsize=2,
    )  # fmt: skip

    def needed(phase: str, context: int, impl: str = "sdpa", **more: Any) -> float:
        case = Case(phase=phase, batch=1, context=context, **more)
        return model.needed(case, facts, impl) / 2**30

    assert needed("decode", 131072) == 16
    assert needed("prefill", 32768, "eager") - needed("prefill", 32768) == 32 * 8
    assert needed("training", 8192) > 3 * needed("training", 8192, checkpointing=True) / 2


def test_the_tolerance_is_eagers_own_rounding(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times its distance from sdpa on a short text, once a phase, and a band at least."""
    asked: list[tuple[str, Case]] = []
    answers = {"sdpa": [1.0, 0.0], "eager": [1.0, 0.1]}

    def answer(impl: str, subject: Subject, case: Case) -> list[float]:
        asked.append((impl, case))
        return answers[impl]

    monkeypatch.setattr(model_worker, "answer", answer)
    with ExitStack() as stack:
        bench = model.Bench(TINY, print, stack)
        long = Case(phase="decode", batch=8, context=8192)
        assert bench.tolerance(long) == bench.tolerance(DECODE) == pytest.approx(0.3)
        small = Case(phase="decode", batch=1, context=model.YARDSTICK)
        assert asked == [("sdpa", small), ("eager", small)]
        answers["eager"] = answers["sdpa"]
        assert bench.tolerance(CASES["prefill"]) == model.BAND["float32"]
        del answers["sdpa"]  # as gpt-oss
        assert bench.tolerance(CASES["training"]) == pytest.approx(
            model.WIDER * model.BAND["float32"]
        )


def test_a_process_that_fails_or_ends_says_so() -> None:
    with Alone("one") as process:
        assert process.call(len, "four") == 4
        with pytest.raises(RuntimeError, match="one: ValueError: unknown shape 'huge'"):
            process.call(shapes.check, None, "huge", "float32", "cpu")
        assert process.call(len, "it goes on") == 10
        with pytest.raises(RuntimeError, match="one: its process ended with 3"):
            process.call(sys.exit, 3)
        assert not process.alive


def test_windows_are_known_without_loading(tmp_path: Path) -> None:
    assert [name for name in shapes.SHAPES if not shapes.has_window(name)] == ["llama3-8b", "tiny"]
    for config, wanted in (
        ({"sliding_window": 8}, True),
        ({"sliding_window": None}, False),
        ({"sliding_window": 8, "use_sliding_window": False}, False),
        ({"text_config": {"sliding_window": 8}}, True),
        ({}, False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert shapes.has_window(str(tmp_path)) is wanted


@pytest.mark.parametrize("name", [name for name in shapes.SHAPES if "tiny" not in name])
def test_shapes_are_what_transformers_takes(name: str) -> None:
    """Every layer, without its weights: parameters in billions as published; gpt-oss without 28 of
    its 32 experts."""
    billions = {
        "llama3-8b": 8.03, "mistral-7b": 7.24, "gemma3-1b": 1.0, "gemma3-4b": 3.88,
        "gpt-oss-20b-4-experts": 4.19,
    }  # fmt: skip
    made = shapes.load(name, "triton_fa2", "bfloat16", "meta")
    assert sum(p.numel() for p in made.parameters()) / 1e9 == pytest.approx(
        billions[name], rel=0.01
    )


@pytest.mark.parametrize("name", ["gemma3-4b", "gpt-oss-20b-4-experts"])
def test_every_phase_runs_on_every_family(name: str, here: None, monkeypatch: Any) -> None:
    """Local and global layers, experts, sink logits: the shapes of a GPU run, small."""
    large = shapes.SHAPES[name]
    small = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 7, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "sliding_window": 32,
    }  # fmt: skip
    shape = replace(large, sizes={**large.sizes, **small})
    monkeypatch.setitem(shapes.SHAPES, f"small-{name}", shape)
    found = model.run(shape=f"small-{name}", contexts=[70], batches=[2], rounds=1, threads=1)
    without = {row["impl"] for row in found if row["why_not"] == "not possible"}
    assert without == ({"sdpa"} if "gpt-oss" in name else set())  # it has no sdpa in transformers
    assert {(row["phase"], row["checkpointing"], row["impl"]) for row in found} == {
        *((phase, 0, impl) for phase in ("prefill", "decode") for impl in model.IMPLEMENTATIONS),
        *(("training", again, impl) for again in (0, 1) for impl in model.TRAINED),
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--shape"),
        (["folder", "--shape", "tiny"], "not both"),
        (["folder"], "has no config.json"),
        (["--shape", "huge"], "possible: llama3-8b"),
        (["--shape", "tiny", "--dtype", "int8"], "possible: float32"),
        (["--shape", "tiny", "--phases", "dreaming"], "possible: prefill, decode, training"),
        (["--shape", "tiny", "--batches", "0"], "1 or more"),
    ],
    ids=" ".join,
)
def test_misuse(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main("model", arguments) == 2
    assert says in capsys.readouterr().err


def test_the_gpu_slices_run_whole_models(
    here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As far as a machine without a GPU can take them; then again, with nothing left to do."""
    small = (
        gpu.Whole(shape="tiny-window", phase="prefill", batches=(1, 2), contexts=(40,)),
        gpu.Whole(shape="tiny", phase="training", batches=(1,), contexts=(24,)),
    )
    monkeypatch.setattr(gpu, "WHOLE", {"model": small})
    out = tmp_path / "model_gpu.csv"
    assert gpu.whole("model", out, 60.0, device="cpu") == 0
    with out.open(newline="") as file:
        rows = [(row["model"], row["batch"], row["impl"]) for row in csv.DictReader(file)]
    assert rows == [
        *(("tiny-window", b, impl) for b in "12" for impl in model.IMPLEMENTATIONS),
        *(("tiny", "1", impl) for impl in model.TRAINED * 2),  # without and with checkpointing
    ]
    size = out.stat().st_size
    assert gpu.whole("model", out, 60.0, device="cpu") == 0 and out.stat().st_size == size
    see_half(monkeypatch)
    out.unlink()
    assert gpu.whole("model", out, 60.0, device="cpu") == 1
    assert "FAILED: prefill of 1 x 40 tokens: triton_fa2 is off" in capsys.readouterr().out


def test_every_slice_of_whole_models_is_asked_for_rightly() -> None:
    assert set(gpu.WHOLE) < set(gpu.SLICES)
    for run in (run for runs in gpu.WHOLE.values() for run in runs):
        assert run.shape in shapes.SHAPES and run.phase in model.PHASES
        assert max(run.contexts) <= shapes.SHAPES[run.shape].sizes["max_position_embeddings"]
