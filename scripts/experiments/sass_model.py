"""How fast a kernel could run, counted from its machine code: a model, not a measurement.

    PYTHONPATH=kernels python scripts/experiments/sass_model.py --out results/sass_model.csv

Each case is compiled for sm_90 and its hot loop is taken apart: what a block's pass through the
loop asks of the tensor cores, of memory, of the issue slots and of every pipe, in cycles of one
multiprocessor. What a kernel is for is its products (of decoding: the bytes of the cache). If
nothing else ran meanwhile, they would go on at the share `serial` of their peak; if all ran side
by side, at `overlapped`. The truth lies between: nearer to the first where one block fills a
multiprocessor and waits for its own products, nearer to the second where several blocks fit, each
of which works while others wait.

Rates: CUDA C++ programming guide, arithmetic throughput of compute capability 9.0; the matrix and
copy rates are those in `Machine`. Needs Triton, no GPU.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, for its packages

ARCH = "sm_90"
LANES = 32  # threads of a warp
CASES = (
    "forward bf16-D64-causal", "forward bf16-D64-full", "forward bf16-D128-causal",
    "forward bf16-D128-full", "forward bf16-D256-causal", "forward bf16-D128-window",
    "forward bf16-D64-causal-pointers", "forward bf16-D128-causal-pointers",
    "dq bf16-D64-causal", "dq bf16-D128-causal", "dq bf16-D256-causal",
    "dkdv bf16-D64-causal", "dkdv bf16-D128-causal", "dkdv bf16-D256-causal",
    "dq bf16-D128-causal-pointers", "dkdv bf16-D128-causal-pointers",
    "joint bf16-D64-causal", "joint bf16-D128-causal",
    "decode bf16-D128-Q1-page0", "decode bf16-D128-Q1-page16", "decode bf16-D128-Q1-page64",
    "decode bf16-D128-float8-Q1-page16", "decode bf16-D128-Q16-page16",
    "mla bf16-R512-P64-H16-page64", "mla bf16-R512-P64-H128-page64",
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """An H200: its data sheet, and a copy rate that others measured. Nothing of it is ours."""

    processors: int = 132
    matrix_flops: float = 4096.0  # of one multiprocessor in a cycle, 16-bit inputs
    copy_tbytes: float = 4.3  # read and written, per second
    clock_ghz: float = 1.755  # where the tensor cores hardly run

    @property
    def copy_bytes(self) -> float:
        """Bytes that a multiprocessor's share of the memory moves in a cycle."""
        return self.copy_tbytes * 1e12 / self.processors / (self.clock_ghz * 1e9)


@dataclass(frozen=True)
class Pipe:
    """Instructions that share a unit, and their results of a multiprocessor in a cycle."""

    name: str
    per_cycle: int
    opcodes: str  # a regular expression, of the opcode with what follows its dots


PIPES = (
    Pipe("exp2", 16, r"MUFU"),
    Pipe("fp32", 128, r"FADD|FMUL|FFMA|IMAD(?!\.WIDE)"),
    Pipe("other", 64, r"FMNMX|FSEL|FSETP|F2F|F2I|I2F|SHF|SHL|SHR|LOP3|IADD|ISETP|SEL|LEA|PRMT"
                      r"|IMNMX|VIMNMX|IABS|PLOP3|MOV|IMAD\.WIDE|FCHK|VIADD|SGXT|BMSK|FLO|POPC"),
    Pipe("shuffle", 32, r"SHFL|MOVM"),
    Pipe("shared", 32, r"LDS|STS|LDSM|STSM"),
)  # fmt: skip
BY_BYTES = ("decode", "mla")  # kernels that read each key once; others find theirs in the L2 cache
ISSUE = 128  # lanes: four schedulers, one instruction each
# An FP32 or mixed product is one warp's; a warpgroup's (Hopper) is four warps' together.
WARP_PRODUCT = re.compile(r"HMMA\.(16)(8)(\d+)\.")
GROUP_PRODUCT = re.compile(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)\.")
LOADS = ("LDG", "LDGSTS")
COPY_ENGINE = "UTMALDG.4D"  # tiles; 3-D ones bring a number for each row
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # of a thread; 4 without


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: "LDGSTS.E.BYPASS.128"
    target: int | None  # of a branch


@dataclass(frozen=True, kw_only=True)
class Row:
    """A kernel's hot loop. Cycles of one multiprocessor for a block's pass through it."""

    kernel: str
    name: str
    num_warps: int
    blocks: int  # that fit a multiprocessor at a time
    instructions: int  # of a warp
    kflops: float
    kbytes: float  # asked of memory
    matrix: float
    issue: float
    exp2: float
    fp32: float
    other: float
    shuffle: float
    shared: float
    copy: float  # if every byte came from device memory
    serial: float  # share of the matrix rate, of BY_BYTES of the copy rate: see above
    overlapped: float
    binds: str  # what takes longest if all ran side by side


def parse(sass: str) -> list[Instruction]:
    """The instructions that ``cuobjdump -sass`` prints, of one kernel."""
    found = []
    for line in sass.splitlines():
        match = re.match(
            r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line
        )
        if match:
            jump = re.search(r"0x([0-9a-f]+)\s*$", match[3]) if match[2] == "BRA" else None
            target = int(jump[1], 16) if jump else None
            found.append(Instruction(int(match[1], 16), match[2], target))
    return found


def loops(code: Sequence[Instruction]) -> Iterator[Sequence[Instruction]]:
    """The innermost loops: what lies between a branch back and its target."""
    spans = [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]
    for start, end in spans:
        inner = any((a, b) != (start, end) and start <= a and b <= end for a, b in spans)
        if not inner:
            yield [i for i in code if start <= i.address <= end]


def flops(body: Sequence[Instruction], num_warps: int) -> float:
    """Of a block's tensor cores in one pass."""
    total = 0
    for instruction in body:
        for pattern, warps in ((WARP_PRODUCT, 1), (GROUP_PRODUCT, 4)):
            if shape := pattern.match(instruction.opcode):
                m, n, k = map(int, shape.groups())
                total += 2 * m * n * k * num_warps // warps
    return total


def loaded(body: Sequence[Instruction], num_warps: int, tile_bytes: int = 0) -> int:
    """Bytes that a block asks of memory in one pass, if no load is masked.

    The copy engine's instructions do not say how much they bring: `tile_bytes` each.
    """
    tiles = sum(i.opcode.startswith(COPY_ENGINE) for i in body)
    loads = (i.opcode.split(".") for i in body)
    sizes = (
        next((BYTES[part] for part in parts if part in BYTES), 4)
        for parts in loads
        if parts[0] in LOADS
    )
    return sum(sizes) * LANES * num_warps + tiles * tile_bytes


def hot_loop(code: Sequence[Instruction], num_warps: int) -> Sequence[Instruction]:
    """The loop with the most arithmetic; of those, the one with the fewest instructions: the others
    do the same behind a mask. Raises ValueError where there is no loop."""
    bodies = list(loops(code))
    if not bodies:
        raise ValueError("there is no loop in this kernel")
    return max(bodies, key=lambda body: (flops(body, num_warps), -len(body)))


def model(
    body: Sequence[Instruction], num_warps: int, machine: Machine, useful: str, tile_bytes: int = 0
) -> tuple[dict[str, float], float, float, str]:
    """Cycles by unit, the shares `serial` and `overlapped` of `useful`, and the unit that binds."""
    counts = Counter(
        next((p.name for p in PIPES if re.match(p.opcodes, i.opcode)), "") for i in body
    )
    threads = num_warps * LANES
    cycles: dict[str, float] = {p.name: counts[p.name] * threads / p.per_cycle for p in PIPES}
    cycles["issue"] = len(body) * threads / ISSUE
    cycles["matrix"] = flops(body, num_warps) / machine.matrix_flops
    copy = loaded(body, num_warps, tile_bytes) / machine.copy_bytes
    if useful == "copy":
        cycles["copy"] = copy
    rest = max(count for unit, count in cycles.items() if unit != useful)
    binds = max(cycles, key=lambda unit: cycles[unit])
    goal = cycles[useful]
    return cycles | {"copy": copy}, goal / (goal + rest), goal / max(goal, rest), binds


def blocks_at_once(registers: int, shared: int, num_warps: int) -> int:
    """How many blocks a multiprocessor holds: by registers, by shared memory, by warps."""
    by_registers = 65536 // (-(-registers // 8) * 8 * num_warps * LANES)
    by_shared = 233472 // (shared + 1024)
    return min(by_registers, by_shared, 64 // num_warps)


def streamed_bytes(kernel: str, constexprs: Mapping[str, Any]) -> int:
    """Of a tile that a pass through the hot loop brings: keys for queries, queries for keys."""
    rows = constexprs.get("BLOCK_N" if kernel in ("forward", "dq") else "BLOCK_M", 0)
    return int(rows * constexprs.get("BLOCK_D", 0) * 2)  # 16-bit numbers


def rows(names: Sequence[str]) -> Iterator[Row]:
    """A row for each case, compiled now."""
    from aot.aot import aot_cases, build, cuobjdump

    cases = {f"{case.kernel} {case.name}": case for case in aot_cases(ARCH)}
    unknown = [name for name in names if name not in cases]
    if unknown:
        raise ValueError(f"unknown case {unknown[0]!r}; scripts/aot_report.py lists them")
    for name in names:
        case = cases[name]
        built = build(case, ARCH)
        body = hot_loop(parse(cuobjdump(built.asm["cubin"], "-sass")), case.num_warps)
        usage = cuobjdump(built.asm["cubin"], "--dump-resource-usage")
        registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
        tile_bytes = streamed_bytes(case.kernel, case.constexprs)
        cycles, serial, overlapped, binds = model(
            body, case.num_warps, Machine(), "copy" if case.kernel in BY_BYTES else "matrix",
            tile_bytes,
        )  # fmt: skip
        yield Row(
            kernel=case.kernel, name=case.name, num_warps=case.num_warps,
            blocks=blocks_at_once(registers, built.metadata.shared, case.num_warps),
            instructions=len(body), kflops=flops(body, case.num_warps) / 1e3,
            kbytes=loaded(body, case.num_warps, tile_bytes) / 1e3,
            serial=round(serial, 3), overlapped=round(overlapped, 3), binds=binds,
            **{unit: round(count, 1) for unit, count in cycles.items()},
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="CSV to write; standard output by default")
    parser.add_argument("--only", nargs="+", default=CASES, help='cases, each as "kernel name"')
    args = parser.parse_args(argv)
    try:
        found = list(rows(args.only))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = args.out.open("w", newline="") if args.out else sys.stdout
    writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in found)
    if args.out:
        file.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
