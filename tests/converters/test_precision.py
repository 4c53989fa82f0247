"""Which dtypes are fast is asked in one place, and whatever chooses a dtype asks there."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_checkpoints import tiny_checkpoint
from torch import Tensor

from hf_attn_converters import precision
from hf_attn_converters.calibration.fit import _autocast
from hf_attn_converters.calibration.source_model import SourceModel
from hf_attn_converters.heads.plan import plan_conversion
from hf_attn_converters.layerwise import source_model
from hf_attn_converters.precision import WideProducts, products, slow_note
from hf_attn_converters.uptrain import UptrainOptions
from hf_attn_converters.uptrain.run import with_precision
from hf_attn_patch import loading
from hf_attn_patch.bench import options as bench_options

HALF = (torch.bfloat16, torch.float16)


def answer(patch: pytest.MonkeyPatch, fast: bool) -> None:
    """The processor's flags as they are where half precision is fast, or is not."""
    patch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    features = {name: {"a flag": lambda: fast} for name in ("bfloat16", "float16")}
    patch.setattr(precision, "_CPU_FEATURES", features)


def seconds(dtype: torch.dtype) -> float:
    """Of one product, the best of five."""
    a = torch.randn(256, 256).to(dtype)
    found = []
    for _ in range(6):
        begin = time.perf_counter()
        torch.mm(a, a)
        found.append(time.perf_counter() - begin)
    return min(found[1:])


class TestFlags:
    def test_they_say_what_products_take(self) -> None:
        """Half of float32's rate lies far from both: 1.5 and more by instructions, .25 without."""
        for dtype in HALF:
            measured = seconds(dtype) < 2 * seconds(torch.float32)
            assert products(dtype).fast == measured, products(dtype)

    @pytest.mark.parametrize("flag", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
    def test_one_is_enough(self, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda there=name == flag: there)
        assert products(torch.bfloat16, "cpu").fast

    def test_arm_is_asked_of_onednn_and_x86_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: False)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        monkeypatch.setattr(precision, "_onednn", lambda name: True)
        for machine, fast in (("aarch64", True), ("x86_64", False)):
            monkeypatch.setattr(precision.platform, "machine", lambda machine=machine: machine)
            assert products(torch.bfloat16).fast is fast

    @pytest.mark.parametrize(
        "cap,fast", [("AVX2", False), ("avx512_core", False), ("AVX512_CORE_BF16", True)]
    )
    def test_a_cap_on_instructions_counts(
        self, cap: str, fast: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer(monkeypatch, True)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
        assert products(torch.bfloat16).fast is fast

    @pytest.mark.parametrize("emulates", [True, False])
    def test_a_gpu_that_emulates_is_slow(
        self, emulates: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def supported(including_emulation: bool = True) -> bool:
            return including_emulation or not emulates

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert products(torch.bfloat16, "cuda").fast is not emulates
        assert products(torch.float16, "cuda").fast

    def test_other_dtypes_are_no_question(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answer(monkeypatch, False)
        assert products(torch.float32).fast and products(torch.int8).fast

    def test_the_note_says_what_why_and_what_instead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answer(monkeypatch, False)
        note = slow_note(torch.float16, "cpu", "use this") or ""
        assert "float16" in note and "no float16 products" in note and note.endswith("use this")
        answer(monkeypatch, True)
        assert slow_note(torch.float16, "cpu", "use this") is None


def recipe(**how: object) -> UptrainOptions:
    return UptrainOptions(
        student="s", output="o", teacher="t", text=("x.txt",), device="cpu", **how
    )


class TestUptrain:
    @pytest.mark.parametrize("fast,expected", [(True, "bf16"), (False, "float32")])
    def test_auto(self, fast: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        answer(monkeypatch, fast)
        said: list[str] = []
        assert recipe().precision == "auto"
        assert with_precision(recipe(), said.append).precision == expected
        [line] = said
        assert line.startswith(f"precision {expected}: this processor")

    @pytest.mark.parametrize("chosen", ["bf16", "bf16-weights"])
    def test_a_choice_stands_and_is_warned_of(
        self, chosen: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for fast in (True, False):
            answer(monkeypatch, fast)
            said: list[str] = []
            assert with_precision(recipe(precision=chosen), said.append).precision == chosen
            assert ["slow" in line and "--precision" in line for line in said] == [True] * (
                not fast
            )
        assert with_precision(recipe(precision="float32"), said.append).precision == "float32"
        assert len(said) == 1


@pytest.mark.parametrize("fast", [True, False])
def test_the_fit(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, fast)
    a = torch.ones(4, 4)
    with _autocast(a):
        assert (a @ a).dtype == (torch.bfloat16 if fast else torch.float32)


class TestCalibration:
    """A checkpoint in bfloat16 keeps its dtype in memory and is multiplied in float32."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> SourceModel:
        folder = tiny_checkpoint(tmp_path / "half", kv_heads=2, dtype=torch.bfloat16)
        work = plan_conversion(folder, tmp_path / "out", num_key_value_heads=1, method="csvd")
        return source_model(work)

    @pytest.mark.parametrize("fast", [True, False])
    def test_its_whole_passes(
        self, source: SourceModel, fast: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer(monkeypatch, fast)
        seen: list[torch.dtype] = []
        real = torch.nn.functional.linear

        class See(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore
                if func is real:
                    seen.append(args[0].dtype)
                return func(*args, **(kwargs or {}))

        with See():
            source._forward(torch.arange(8)[None])
        assert source.model.dtype == torch.bfloat16
        assert set(seen) == {torch.bfloat16 if fast else torch.float32}


class TestWideProducts:
    @pytest.mark.parametrize("dtype", HALF)
    def test_as_in_float32_and_rounded_once(self, dtype: torch.dtype) -> None:
        a, b = (torch.randn(2, 5, 5).to(dtype) for _ in range(2))

        def all_of(a: Tensor, b: Tensor) -> list[Tensor]:
            return [
                a @ b, torch.matmul(a, b), torch.bmm(a, b), torch.nn.functional.linear(a, b[0]),
                torch.addmm(a[0, 0], a[0], b[1]), torch.baddbmm(a, a, b),
                torch.nn.functional.scaled_dot_product_attention(a, b, value=b),
            ]  # fmt: skip

        with WideProducts():
            found = all_of(a, b)
        for ours, exact in zip(found, all_of(a.double(), b.double()), strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, exact.float().to(dtype), rtol=0, atol=0.02)
        assert torch.equal(found[0], (a.float() @ b.float()).to(dtype))

    def test_other_tensors_are_left_alone(self) -> None:
        a = torch.randn(3, 3, dtype=torch.float64)
        with WideProducts():
            assert (a @ a).dtype == torch.float64


class TestLoading:
    @pytest.mark.parametrize("fast", [True, False])
    def test_a_slow_dtype_is_said_once(
        self,
        fast: bool,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        answer(monkeypatch, fast)
        loading._warn_once.cache_clear()
        folder = tiny_checkpoint(tmp_path / "half", kv_heads=2, dtype=torch.bfloat16)
        spec = loading.ModelSpec(path=str(folder))
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                loading.load(spec, device="cpu")
            loading.load(spec, device="cpu", dtype="float32")
        lines = [r.getMessage() for r in caplog.records if "slow" in r.getMessage()]
        assert len(lines) == (not fast)
        assert all("bfloat16" in line and "--dtype float32" in line for line in lines)


@pytest.mark.parametrize(
    "given,warned",
    [({"dtype": "bfloat16"}, True), ({"dtype": "float32"}, False), ({"dtypes": ["bf16"]}, True)],
)
def test_bench(given: dict[str, object], warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(run=lambda **given: [])
    monkeypatch.setattr(bench_options.importlib, "import_module", lambda name: module)
    for fast in (True, False):
        answer(monkeypatch, fast)
        said: list[str] = []
        bench_options.run("model", dict(given), said.append)
        assert len(said) == (warned and not fast)
