"""Ahead-of-time compilation of the shipped configurations: all fit their chip and none spills.

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
ROOT = Path(__file__).resolve().parents[2]
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


def compiling(*command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Python, without the interpreter of Triton; it must end with exit code `code`."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT / "kernels"), str(ROOT / "scripts"), *filter(None, [env.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *command],
        env=env | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


def report(*args: str, code: int = 0) -> list[dict[str, str]]:
    """Rows of the report."""
    done = compiling(str(ROOT / "scripts" / "aot_report.py"), *args, code=code)
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
    "bf16-D64-Q256-page16",
    "append bf16",
    "mla bf16-R512-P64-H128-page16",
)
ONCE_SPILLED = {  # with tiles of earlier tables
    "sm_80": (
        "forward bf16-D128-packed",
        "dkdv bf16-D256-full",
        "dkdv bf16-D128-dropout",
        "dkdv fp32-D128-causal",
        "decode bf16-D256-float8-Q8-page16",
    ),
    "sm_89": (
        "dq bf16-D80-causal",
        "joint bf16-D128-bool-mask",
        "decode bf16-D64-float8-Q256-page16",
        "decode fp32-D64-Q1-page16",
    ),
    "sm_100": (
        "forward bf16-D128-dropout",
        "dkdv bf16-D128-packed",
        "joint bf16-D128-alibi",
        "forward bf16-D64-window",
        "delta fp32-D256-causal",
        "mla bf16-R512-P64-H128-page64-float8",
    ),
    "gfx942": (
        "joint fp32-D128-causal",
        "decode fp32-D512-Q8-page16",
        "mla fp32-R512-P64-H16-page16",
        "mla bf16-R256-P32-H128-page64-float8",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ONCE_SPILLED)
def test_other_chips_fit_and_do_not_spill(arch: str) -> None:
    rows = report("--arch", arch, "--only", *SAMPLE, *ONCE_SPILLED[arch])
    named = [f"{row['kernel']} {row['name']}" for row in rows]
    assert all(any(part in name for name in named) for part in (*SAMPLE, *ONCE_SPILLED[arch]))
    for row in rows:
        assert int(row["shared"]) <= int(row["shared_limit"]), row
        assert row["spilled"] == "0", row


LARGER = """
import sys
import aot_report
from hf_attn_kernels.triton import config

config.TABLE["sm_80"]["forward"][2] = (config.Tiles(*map(int, sys.argv[1:])),) * 4
sys.exit(aot_report.main(["--arch", "sm_80", "--only", "forward bf16-D128-full"]))
"""


@pytest.mark.parametrize(
    ("tile", "code", "complaint"),
    [
        ("128 32 8 2", 0, ""),
        ("128 128 4 2", 1, "sm_80 forward bf16-D128-full: 11856 spilled"),
        ("128 128 8 9", 1, "bytes of shared memory, the chip has 166912"),
    ],
)
def test_control_the_report_fails_on_a_tile_too_large(
    tile: str, code: int, complaint: str, tmp_path: Path
) -> None:
    script = tmp_path / "larger.py"
    script.write_text(LARGER)
    assert complaint in compiling(str(script), *tile.split(), code=code).stderr


LISTED = """
from aot.aot import CHIPS, aot_cases

for arch, chip in CHIPS.items():
    for case in aot_cases(arch):
        print(arch, case.kernel, case.name, case.num_warps, case.num_stages, chip.shared_limit)
"""


def test_the_written_report_is_whole_and_without_complaint() -> None:
    """results/aot.csv is of today's chips, calls and warps: a stale file is found."""
    with (ROOT / "results" / "aot.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("arch", "kernel", "name", "num_warps", "num_stages", "shared_limit")
    written = [" ".join(row[column] for column in columns) for row in rows]
    assert written == compiling("-c", LISTED).stdout.splitlines()
    for row in rows:
        assert int(row["shared"]) <= int(row["shared_limit"]), row
        assert row["spilled"] == "0", row
        # a tile too large for tensor memory has been seen compiled to a kernel without products
        vectors = row["kernel"] in ("delta", "reduce", "append") or row["name"].startswith("fp32")
        assert vectors or int(row["matrix"]) > 0, row


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
from aot.aot import case_from_arguments, compile_case

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
    assert "sm_80, sm_89, sm_90, sm_100, gfx942" in str(error)
"""


def test_arguments_are_specialised_as_a_launch_would(tmp_path: Path) -> None:
    script = tmp_path / "specialise.py"  # triton.jit reads the source of its functions
    script.write_text(SPECIALISE)
    compiling(str(script))
