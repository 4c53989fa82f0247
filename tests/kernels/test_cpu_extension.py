"""The compiled part of the CPU backend: built once, and then the torch path's equal.

It is built into a folder of the test run; what is in the user's own is not looked at. The cases of
test_cpu_cache.py run through it too.
"""

from __future__ import annotations

import json
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from click.testing import Result
from extension_calls import count_prefills, pages, pretend
from kernel_cases import assert_within_budget
from torch import Tensor
from typer.testing import CliRunner

from hf_attn_kernels import (
    build_cpu_extension,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from hf_attn_kernels.cpu import extension, extension_decode
from hf_attn_kernels.reference import attention_reference
from hf_attn_patch.cli import app

BF16 = torch.bfloat16
COMPILER = shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
Python = Callable[..., "CompletedProcess[str]"]


def lengths_of(rows: list[Tensor]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int32)


class TestResults:
    """Beyond the cases of test_cpu_cache.py, which compare it with the oracle."""

    def paged(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q ``[3, 1, 4, 64]``, pages of keys (and as values), their table, lengths: enough for
        several threads."""
        rows = [torch.randn(n, 2, 64).to(dtype) for n in (2000, 40, 900)]
        pool, table = pages(rows, 16)
        return torch.randn(3, 1, 4, 64).to(dtype), pool, table, lengths_of(rows)

    def attend(self, q: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        out = flash_attn_with_kvcache(
            q, pool, pool, cache_seqlens=lengths, causal=True, block_table=table
        )
        assert isinstance(out, Tensor)
        return out

    def test_wrong_page_changes_the_result(self, with_extension: list[object]) -> None:
        q, pool, table, lengths = self.paged()
        right = self.attend(q, pool, table, lengths)
        table[0, [0, 1]] = table[1, [0, 1]]
        wrong = self.attend(q, pool, table, lengths)
        assert not torch.allclose(right[0], wrong[0])
        assert torch.equal(right[1:], wrong[1:]) and len(with_extension) == 2

    @pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
    def test_threads_and_other_rows_change_no_bit(
        self, dtype: torch.dtype, with_extension: list[object]
    ) -> None:
        q, pool, table, lengths = self.paged(dtype)
        before = torch.get_num_threads()
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(self.attend(q, pool, table, lengths))
        finally:
            torch.set_num_threads(before)
        for row in range(3):
            one = slice(row, row + 1)
            found.append(found[0].clone())
            found[-1][one] = self.attend(q[one], pool, table[one], lengths[one])
        assert all(torch.equal(found[0], other) for other in found[1:])
        assert len(with_extension) == 6

    def test_page_that_is_seen_and_missing(self, with_extension: list[object]) -> None:
        q, pool, table, lengths = self.paged()
        table[0, 3] = -1
        with pytest.raises(ValueError, match=r"no page .* keys 0 to 1999"):
            self.attend(q, pool, table, lengths)

    def test_packed_rows_of_few_and_of_many_queries(self, with_extension: list[object]) -> None:
        """As continuous batching packs them: decode beside prefill, and tokens of nobody."""
        queries, keys = (1, 40, 3, 1), (100, 60, 17, 530)
        q, k = torch.randn(sum(queries) + 2, 4, 16), [torch.randn(n, 2, 16) for n in keys]
        v = [torch.randn(n, 2, 32) for n in keys]
        torch.manual_seed(1)
        k_pages, table = pages(k, 16)
        torch.manual_seed(1)
        v_pages, same = pages(v, 16)
        assert torch.equal(table, same)
        starts = [torch.tensor([0, *n], dtype=torch.int32).cumsum(0).int() for n in (queries, keys)]
        out, lse, _ = flash_attn_varlen_func(
            q, k_pages, v_pages, *starts, max(queries), max(keys), causal=True, block_table=table,
            return_attn_probs=True,
        )  # fmt: skip
        for number, (rows_k, rows_v) in enumerate(zip(k, v, strict=True)):
            mine = slice(*starts[0][number : number + 2].tolist())
            exact, exact_lse = attention_reference(
                q[None, mine], rows_k[None], rows_v[None], causal=True
            )
            torch.testing.assert_close(out[None, mine].double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[None, :, mine].double(), exact_lse, rtol=1e-5, atol=1e-5)
        assert not out[-2:].any() and torch.isneginf(lse[:, -2:]).all()
        assert len(with_extension) == 1

    @pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
    def test_every_half_number_is_read_and_rounded_right(
        self, dtype: torch.dtype, with_extension: list[object]
    ) -> None:
        """One key a row: its value comes out again to the bit, whatever it is."""
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 1, 1, 16)
        q = torch.zeros(len(every), 1, 1, 16, dtype=dtype)
        out = flash_attn_with_kvcache(q, torch.zeros_like(every), every)
        assert len(with_extension) == 1
        assert torch.equal(out.isnan(), every.isnan())
        assert torch.equal(out.nan_to_num(0), every.nan_to_num(0))
        # and the mean of two neighbours is rounded to even as torch rounds it
        pairs = torch.stack([every, every.roll(1, dims=-1)], dim=1).view(len(every), 2, 1, 16)
        out = flash_attn_with_kvcache(q, torch.zeros_like(pairs), pairs)
        mean = pairs.float().mean(dim=1, keepdim=True).to(dtype)
        finite = pairs.isfinite().all(dim=1, keepdim=True)
        assert torch.equal(out[finite], mean[finite])


@pytest.mark.parametrize(
    ("why", "make"),
    [
        ("float64", lambda: (torch.ones(1, 1, 1, 16, dtype=torch.float64),) * 3),
        ("multiples", lambda: (torch.ones(1, 1, 1, 24),) * 3),
        ("multiples", lambda: (*(torch.ones(1, 1, 1, 16),) * 2, torch.ones(1, 1, 1, 40))),
        ("float8", lambda: (torch.ones(1, 1, 1, 16), *(torch.ones(1, 16, 1, 16).to(
            torch.float8_e4m3fn),) * 2)),
    ],
    ids=["float64", "D24", "DV40", "float8"],
)  # fmt: skip
def test_what_is_left_to_torch(
    why: str, make: Callable[[], tuple[Tensor, Tensor, Tensor]], with_extension: list[object]
) -> None:
    q, k, v = make()
    said = extension_decode.refusal(q, k, v)
    assert said is not None and why in said
    lengths = torch.ones(1, dtype=torch.int32)
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
    assert torch.equal(out, torch.ones_like(out)) and not with_extension


# --- building it ----------------------------------------------------------------------------------

Attend = Callable[..., "tuple[bool, list[str]]"]


@pytest.fixture
def attend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attend]:
    """`attend(NAME=value, ...)` runs two calls as a new process with that environment would; gives
    whether the extension served them, and the warnings."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))

    def run(**env: str) -> tuple[bool, list[str]]:
        for name, value in ({"HF_ATTN_CPU_EXTENSION": ""} | env).items():
            monkeypatch.setenv(name, value)
        extension.forget()
        x = torch.ones(2, 1, 4, 16)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            outs = [flash_attn_with_kvcache(x, x, x) for _ in range(2)]
        assert all(torch.equal(out, x) for out in outs)
        return extension.library() is not None, [str(warning.message) for warning in said]

    yield run
    extension.forget()


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


class TestBuilding:
    def test_not_unasked(self, attend: Attend, tmp_path: Path) -> None:
        assert attend() == attend(HF_ATTN_CPU_EXTENSION="0") == (False, [])
        assert extension.status().reason.startswith("switched off")
        assert not files(tmp_path)

    @needs_compiler
    def test_on_first_use_where_asked_then_by_all(
        self, attend: Attend, tmp_path: Path, fresh_python: Python
    ) -> None:
        """Built once by a compiler that leaves a mark each time it runs."""
        marks, wrapper = tmp_path / "marks", tmp_path / "cxx"
        wrapper.write_text(f'#!/bin/sh\necho x >> {marks}\nexec {COMPILER} "$@"\n')
        wrapper.chmod(stat.S_IRWXU)
        wanted = {"HF_ATTN_CPU_EXTENSION": "1", "CXX": str(wrapper)}
        assert attend(**wanted) == (True, [])
        (found,) = files(tmp_path / "cache")  # and nothing half done
        assert found == extension.location() and extension.status().used
        assert attend(**wanted) == (True, [])
        assert attend(CXX="/bin/false") == (True, [])
        assert attend(HF_ATTN_CPU_EXTENSION="0") == (False, [])
        seen = "from hf_attn_kernels.cpu import extension; print(extension.library().__name__)"
        folder = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "HF_ATTN_CPU_EXTENSION": ""}
        assert "hf_attn_decode" in fresh_python(seen, env=folder | {"CXX": "/bin/false"}).stdout
        assert marks.read_text() == "x\n" and files(tmp_path / "cache") == [found]

    @pytest.mark.parametrize(
        ("compiler", "says"),
        [("/bin/false", "ended with 1"), ("no-such-compiler", "does not run")],
    )
    def test_failure_is_said_once(
        self, compiler: str, says: str, attend: Attend, tmp_path: Path
    ) -> None:
        used, said = attend(CXX=compiler, HF_ATTN_CPU_EXTENSION="1")
        assert not used and len(said) == 1
        assert says in said[0] and "Torch's operators" in said[0]
        assert not files(tmp_path)

    def test_end_of_what_the_compiler_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loud = tmp_path / "cxx"
        loud.write_text("#!/bin/sh\nseq 1 50 | sed 's/^/line /' >&2\nexit 3\n")
        loud.chmod(stat.S_IRWXU)
        monkeypatch.setenv("CXX", str(loud))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        with pytest.raises(RuntimeError, match="ended with 3") as failure:
            build_cpu_extension()
        lines = str(failure.value).splitlines()
        assert lines[1:] == [f"line {n}" for n in range(43, 51)]

    def test_broken_library_is_said(self, attend: Attend, tmp_path: Path) -> None:
        path = extension.location()
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half a file")
        used, said = attend()
        assert not used and len(said) == 1 and path.name in said[0]

    def test_other_flags_are_another_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = {}
        for capability in ("DEFAULT", "AVX2", "AVX512", "AVX512_VNNI"):
            for pairs in (False, True):
                pretend(monkeypatch, capability, pairs)
                found[capability, pairs] = extension.flags(), extension.location()
        assert found["DEFAULT", True] == found["DEFAULT", False]
        assert found["DEFAULT", True][0] == extension.FLAGS
        avx2, avx512, pairs = (
            found[key][0] for key in (("AVX2", True), ("AVX512", False), ("AVX512", True))
        )
        assert "-mavx2" in avx2 and "-mavx512f" not in avx2
        assert "-mavx512f" in avx512 and pairs == (*avx512, "-mavx512bf16")
        assert found["AVX512", True] == found["AVX512_VNNI", True]
        assert len({path for _, path in found.values()}) == 4

    def test_other_sources_are_another_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = extension.location()
        copy = shutil.copytree(extension.SOURCES, tmp_path / "csrc")
        monkeypatch.setattr(extension, "SOURCES", copy)
        assert extension.location() == before
        with (copy / "call.h").open("a") as header:
            header.write("// changed\n")
        assert extension.location() != before

    def test_elsewhere_than_on_linux(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hf_attn_kernels.cpu.extension.sys.platform", "win32")
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        with pytest.raises(RuntimeError, match="Linux only, this is win32"):
            build_cpu_extension()


def test_left_out(extension_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extension_folder))
    monkeypatch.setenv("HF_ATTN_CPU_EXTENSION", "")
    extension.forget()
    with extension.left_out():
        assert extension.library() is None
    assert extension.library() is not None
    extension.forget()


class TestCommand:
    """``hf-attn check`` says whether it is used, and builds it."""

    def check(self, *options: str) -> Result:
        return CliRunner().invoke(app, ["check", "--device", "cpu", *options])

    def test_says(self, attend: Attend) -> None:
        attend()
        assert "not used, not built; " in self.check().stdout
        attend(HF_ATTN_CPU_EXTENSION="0")
        found = json.loads(self.check("--json").stdout)["cpu_extension"]
        assert found == {"used": False, "reason": "switched off by HF_ATTN_CPU_EXTENSION=0"}

    @needs_compiler
    def test_builds(self, attend: Attend) -> None:
        assert attend() == (False, [])
        done = self.check("--build")
        assert done.exit_code == 0 and "used, built: " in " ".join(done.stdout.split())
        assert extension.location().exists() and extension.library() is not None

    def test_fails(self, attend: Attend) -> None:
        attend(CXX="/bin/false")
        done = self.check("--build")
        assert done.exit_code == 1 and "ended with 1" in done.stderr


@needs_compiler
@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_older_processors(capability: str, attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for less than this processor has: the same, to rounding."""
    have = torch.backends.cpu.get_cpu_capability()
    if capability != "DEFAULT" and not (have.startswith("AVX") and capability <= have[:6]):
        pytest.skip("this processor is older")
    pretend(monkeypatch, capability, False)
    assert attend(HF_ATTN_CPU_EXTENSION="1") == (True, [])
    prefills = count_prefills(monkeypatch)
    for dtype in (torch.float32, BF16, torch.float16):
        q, k, v = (
            torch.randn(2, *shape).to(dtype) for shape in ((3, 6, 48), (333, 2, 48), (333, 2, 80))
        )
        assert extension_decode.refusal(q, k, v) is None
        options = {"causal": True, "window_size": (200, 0), "softcap": 2.0}
        out = flash_attn_with_kvcache(q, k, v, **options)
        exact = flash_attn_with_kvcache(q.double(), k.double(), v.double(), **options)
        assert (out - exact).abs().max() <= 2 * torch.finfo(dtype).eps
        queries = torch.randn(2, 70, 6, 48).to(dtype)
        options |= {"window_size": (41, 3), "causal": False}
        out, lse, _ = flash_attn_func(queries, k, v, return_attn_probs=True, **options)
        exact, exact_lse = attention_reference(queries, k, v, **options)
        eager, eager_lse = attention_reference(queries, k, v, **options, dtype=dtype)
        assert_within_budget("out", out, eager, exact)
        assert_within_budget("lse", lse, eager_lse.float(), exact_lse)
    assert len(prefills) == 3
