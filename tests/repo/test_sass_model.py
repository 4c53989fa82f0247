"""The model of a kernel's machine code: what it reads, and that it reads a real kernel."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from experiments.sass_model import (  # noqa: E402
    Machine,
    blocks_at_once,
    flops,
    hot_loop,
    loaded,
    loops,
    model,
    parse,
)

# An outer loop with two inner ones, the second behind a mask; as cuobjdump prints them.
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00000a0000017a02 */
                                                                          /* 0x000fe40000000f00 */
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R188], desc[UR16][R56.64], P2 ;
        /*0040*/               @P1 LDG.E.U8 R3, desc[UR16][R4.64] ;
        /*0050*/                   MUFU.EX2 R7, R7 ;
        /*0060*/              @!P2 BRA 0x20 ;
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0080*/                   FSEL R1, R2, R3, P0 ;
        /*0090*/                   FSEL R1, R2, R3, P0 ;
        /*00a0*/                   MUFU.EX2 R7, R7 ;
        /*00b0*/                   LDG.E.64 R3, desc[UR16][R4.64] ;
        /*00c0*/              @!P2 BRA 0x70 ;
        /*00d0*/              @!P3 BRA 0x10 ;
        /*00e0*/                   BRA 0xe0;
"""


def test_the_hot_loop_is_the_innermost_without_a_mask() -> None:
    code = parse(CODE)
    assert [hex(i.address) for i in code[:3]] == ["0x0", "0x10", "0x20"]
    assert [len(body) for body in loops(code)] == [5, 6]
    body = hot_loop(code, 8)
    assert [i.opcode.split(".")[0] for i in body] == ["HGMMA", "LDGSTS", "LDG", "MUFU", "BRA"]
    with pytest.raises(ValueError, match="no loop"):
        hot_loop(code[:4], 8)


def test_counts_of_a_block() -> None:
    body = hot_loop(parse(CODE), 8)
    assert flops(body, 8) == 2 * (2 * 64 * 64 * 16)  # two warpgroups
    assert flops(parse("        /*0000*/  HMMA.16816.F32.BF16 R4, R4, R8, R12 ;"), 4) == 16384
    assert loaded(body, 8) == (16 + 1) * 256
    tile = parse("        /*0000*/  UTMALDG.4D [UR8], [UR4], desc[UR6] ;")
    assert loaded(tile, 8, 16384) == 16384  # of the block, not of each thread
    cycles, serial, overlapped, binds = model(body, 8, Machine(), "matrix")
    assert cycles["exp2"] == 256 / 16 and cycles["issue"] == 5 * 256 / 128
    assert cycles["matrix"] == 2 * (2 * 64 * 64 * 16) / 4096
    assert binds == "matrix" and overlapped == 1
    assert serial == pytest.approx(64 / (64 + 16))
    _, serial, _, binds = model(body, 8, Machine(), "copy")  # the bytes, beside its products
    assert binds == "copy" and serial == pytest.approx(234.3 / (234.3 + 64), rel=1e-3)


def test_blocks_by_what_runs_out_first() -> None:
    assert blocks_at_once(128, 0, 4) == 4  # registers
    assert blocks_at_once(32, 100_000, 4) == 2  # shared memory
    assert blocks_at_once(16, 0, 8) == 8  # warps


def test_a_shipped_kernel_is_read() -> None:
    """Its products are those of its tiles: 128 x 64 scores of 128 columns, twice."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script, name = ROOT / "scripts" / "experiments" / "sass_model.py", "forward bf16-D128-full"
    done = subprocess.run(
        [sys.executable, str(script), "--only", name],
        env=env | {"PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = csv.DictReader(done.stdout.splitlines())
    assert float(row["kflops"]) == 4 * 128 * 64 * 128 / 1e3
    assert float(row["kbytes"]) == 2 * 64 * 128 * 2 / 1e3
    # an exponential for each score and row, and nothing near the matrix rate is left out
    assert float(row["exp2"]) >= 128 * 64 / 16
    assert 0.3 < float(row["serial"]) < float(row["overlapped"]) <= 1
