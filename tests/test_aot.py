"""Ahead-of-time compilation of the shipped configurations: all fit their chip, sm_90 never spills.

Compiling needs a process without Triton's interpreter, so `scripts/aot_report.py` runs in one of
its own and what it wrote is looked at here.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
KERNELS = (
    "forward",
    "dq",
    "dkdv",
    "joint",
    "delta",
    "bias_grad",
    "decode",
    "reduce",
    "append",
    "mla",
)
CASES = (*(f"{kernel} " for kernel in KERNELS), "hopper bf16")


def report(*args: str, code: int = 0) -> list[dict[str, str]]:
    """Rows of the report; it must end with exit code `code`."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT / "kernels"), *filter(None, [env.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "aot_report.py"), *args],
        env=env | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return list(csv.DictReader(done.stdout.splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES)
def test_sm_90_fits_and_does_not_spill(cases: str) -> None:
    rows = report("--arch", "sm_90", "--only", cases)
    assert rows
    for row in rows:
        assert int(row["shared"]) <= int(row["shared_limit"]) == 232448, row
        assert row["spilled"] == "0", row


SAMPLE = (
    "bf16-D128-causal",
    "bf16-D256-causal",
    "bf16-D128-Q1-page16",
    "bf16-D128-Q256-page16",
    "append bf16",
    "mla bf16-R512-P64-H128-page16",
)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_other_chips_fit(arch: str) -> None:
    for name in SAMPLE:
        rows = report("--arch", arch, "--only", name)
        assert rows
        for row in rows:
            assert int(row["shared"]) <= int(row["shared_limit"]), row


def test_prefill_tiles_use_the_chips_own_matrix_instructions() -> None:
    (row,) = report("--arch", "sm_90", "--only", "decode bf16-D128-Q256-page16")
    assert int(row["matrix"]) > 0 and int(row["registers"]) > 0 and row["tma"] == "0"


@pytest.mark.slow
def test_two_blocks_share_a_multiprocessor() -> None:
    """What the tiles of sm_90 were chosen for: tiles by the copy engine, and room for a second."""
    (row,) = report("--arch", "sm_90", "--only", "forward bf16-D128-full")[:1]
    assert int(row["tma"]) > 0 and int(row["matrix"]) > 0
    assert int(row["registers"]) <= 65536 // (2 * 8 * 32)
    assert 2 * (int(row["shared"]) + 1024) <= 233472
    (row,) = report("--arch", "sm_90", "--only", "forward bf16-D128-full-pointers")
    assert row["tma"] == "0"


def test_nothing_to_compile_is_a_failure() -> None:
    assert report("--arch", "sm_90", "--only", "no such kernel", code=1) == []


# -- cases from arguments -------------------------------------------------------------------------

SPECIALISE = """
import torch, triton
from triton.tools.tensor_descriptor import TensorDescriptor
from hf_attn_kernels.triton.aot import case_from_arguments, compile_case

@triton.jit(do_not_specialize=["free"])
def kernel(x, absent, one, sixteen, seven, free, big, factor, tile, B: triton.language.constexpr):
    pass

case = case_from_arguments(
    kernel="k", name="n", fn=kernel, num_warps=4, num_stages=1,
    arguments=dict(x=torch.empty(4, dtype=torch.bfloat16, device="meta"), absent=None, one=1,
                   sixteen=48, seven=7, free=1, big=2**40, factor=1.0, B=64,
                   tile=TensorDescriptor.from_tensor(torch.empty(64, 32, device="meta"), [16, 32])),
)
assert case.signature == dict(x="*bf16", sixteen="i32", seven="i32", free="i32", big="i64",
                              factor="fp32", tile="tensordesc<fp32[16, 32]>"), case.signature
assert case.constexprs == dict(absent=None, one=1, B=64), case.constexprs
assert case.divisible == {"x", "sixteen", "big"}, case.divisible
for arguments, message in ((dict(x=1), "missing"), (dict.fromkeys("abc"), "unknown")):
    try:
        case_from_arguments(kernel="k", name="n", fn=kernel, arguments=arguments, num_warps=4,
                            num_stages=1)
    except ValueError as error:
        assert message in str(error)
    else:
        raise SystemExit("accepted")
try:
    compile_case(case, "sm_70")
except ValueError as error:
    assert "sm_80, sm_90, sm_100, gfx942" in str(error)
"""


def test_arguments_are_specialised_as_a_launch_would(tmp_path: Path) -> None:
    script = tmp_path / "specialise.py"  # triton.jit reads the source of its functions
    script.write_text(SPECIALISE)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=env | {"PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
