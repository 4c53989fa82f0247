"""Ahead-of-time compilation: what every shipped configuration costs on each chip, with no GPU.

A module of CASE_MODULES lists configurations in ``aot_cases(arch) -> list[AotCase]``, built from
the very arguments a launcher would pass (`case_from_arguments` specialises them as Triton's
launcher does). `compile_case` compiles one and reads registers, stack and shared memory out of the
binary. Needs a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_attn_kernels.triton.launch import Launch

CASE_MODULES = ("attention_cases", "gluon_cases", "decode_cases", "mla_cases")

_POINTEES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Chip:
    """A compilation target and the shared memory (LDS) that one block may use there, in bytes."""

    target: GPUTarget
    shared_limit: int


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 166912),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 101376),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 232448),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 232448),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65536),
}


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """One kernel with one shipped configuration, specialised for one kind of call."""

    kernel: str  # "forward", "dq", "decode", ...
    name: str  # readable, unique within the kernel: "bf16-D128-causal"
    fn: Any  # the triton.jit function
    signature: Mapping[str, str]  # run-time arguments and their types: "*bf16", "i32", "fp32"
    constexprs: Mapping[str, Any]  # every other argument; None for a tensor that is not given
    divisible: frozenset[str]  # run-time arguments known to be multiples of 16
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class AotResult:
    """What the binary of one case uses. -1: this target's tools do not say."""

    arch: str
    kernel: str
    name: str
    num_warps: int
    num_stages: int
    shared: int  # bytes of a block
    shared_limit: int
    registers: int  # of a thread (AMD: vector registers, accumulation registers included)
    spilled: int  # bytes of stack of a thread (AMD: spilled registers)
    matrix: int  # matrix instructions: mma.sync, wgmma (Hopper), tcgen05 (Blackwell), MFMA (AMD)
    tma: int  # loads of whole tiles by the copy engine
    seconds: float

    @property
    def fits(self) -> bool:
        return self.shared <= self.shared_limit


def case_from_arguments(
    *,
    kernel: str,
    name: str,
    fn: Any,
    arguments: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    max_registers: int | None = None,
) -> AotCase:
    """Specialise a call as Triton's launcher would.

    Args:
        arguments: every parameter of `fn` by name. Tensors (the "meta" device will do) become
            16-byte aligned pointers, tensor descriptors their type, None and constexpr parameters
            constants, ints ``i32`` or ``i64`` (a constant when 1, divisible by 16 when they are),
            floats ``fp32``.

    Raises:
        ValueError: parameters are missing or unknown, or a value has no Triton type.
    """
    params = {p.name: p for p in fn.params}
    if params.keys() != arguments.keys():
        raise ValueError(
            f"{kernel} {name}: missing {sorted(params.keys() - arguments.keys())}, "
            f"unknown {sorted(arguments.keys() - params.keys())}; give every parameter by name"
        )
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    divisible = set()
    for key, value in arguments.items():
        free = params[key].do_not_specialize
        one = type(value) is int and value == 1 and not free
        if params[key].is_constexpr or value is None or one:
            constexprs[key] = value
            continue
        signature[key], aligned = _specialise(key, value)
        if aligned and not free:
            divisible.add(key)
    return AotCase(
        kernel=kernel, name=name, fn=fn, signature=signature, constexprs=constexprs,
        divisible=frozenset(divisible), num_warps=num_warps, num_stages=num_stages,
        max_registers=max_registers,
    )  # fmt: skip


def case_of(launch: Launch, name: str) -> AotCase:
    """The kernel of a launch, as it is called `name`; errors as :func:`case_from_arguments`."""
    return case_from_arguments(
        kernel=launch.kernel, name=name, fn=launch.fn, arguments=launch.arguments,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
        max_registers=launch.max_registers,
    )  # fmt: skip


def _specialise(key: str, value: object) -> tuple[str, bool]:
    """Triton type of a run-time value, and whether it is known to be a multiple of 16."""
    if isinstance(value, Tensor):
        return "*" + _POINTEES[value.dtype], True
    if isinstance(value, TensorDescriptor):
        return _tiles(value), False
    if hasattr(value, "layout"):  # a descriptor of Gluon, which says how tiles lie on the chip
        return _tiles(value, f",{value.layout!r}"), False
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise ValueError(f"argument {key} has no Triton type: {value!r}")


def _tiles(descriptor: Any, layout: str = "") -> str:
    return f"tensordesc<{_POINTEES[descriptor.base.dtype]}{list(descriptor.block_shape)}{layout}>"


def aot_cases(arch: str) -> list[AotCase]:
    """Cases of every kernel of this package, in a fixed order."""
    cases: list[AotCase] = []
    for module in CASE_MODULES:
        cases += importlib.import_module(f".{module}", __package__).aot_cases(arch)
    return cases


def build(case: AotCase, arch: str) -> Any:
    """`case` compiled for one of CHIPS, as Triton's compiled kernel.

    Raises:
        ValueError: the chip is unknown, or this process runs Triton's interpreter.
    """
    if arch not in CHIPS:
        raise ValueError(f"chip {arch!r} is not known; possible: {', '.join(CHIPS)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set; compile in a process without it")
    # every parameter is in the signature, in the kernel's order; constants by name and None too
    signature = {name: case.signature.get(name, "constexpr") for name in case.fn.arg_names}
    attrs = {
        (case.fn.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in case.divisible
        if name in case.signature
    }
    source = _source_type(case.fn)(
        fn=case.fn, signature=signature, constexprs=dict(case.constexprs), attrs=attrs
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.max_registers is not None:
        options["maxnreg"] = case.max_registers
    return triton.compile(source, target=CHIPS[arch].target, options=options)


def _source_type(fn: Any) -> Any:
    """Triton's, or Gluon's; found as Triton's own launcher finds it."""
    if not fn.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def compile_case(case: AotCase, arch: str) -> AotResult:
    """Compile `case` for one of CHIPS and read what the binary uses; errors as :func:`build`."""
    began = time.perf_counter()
    built = build(case, arch)
    seconds = time.perf_counter() - began
    chip = CHIPS[arch]
    read = _read_amd if chip.target.backend == "hip" else _read_nvidia
    return AotResult(
        arch=arch, kernel=case.kernel, name=case.name, num_warps=case.num_warps,
        num_stages=case.num_stages, shared=built.metadata.shared, shared_limit=chip.shared_limit,
        seconds=round(seconds, 2), **read(built.asm),
    )  # fmt: skip


def cuobjdump(cubin: bytes, what: str) -> str:
    """What NVIDIA's tool, which comes with Triton, prints of a binary: ``"-sass"``, say."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_nvidia(asm: Mapping[str, Any]) -> dict[str, int]:
    usage = cuobjdump(asm["cubin"], "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    # PTX has them one for one, and disassembling the binary would take as long as compiling it
    matrix = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"
    return {
        "registers": int(found[1]),
        "spilled": int(found[2]),
        "matrix": len(re.findall(matrix, asm["ptx"])),
        "tma": len(re.findall(r"\bcp\.async\.bulk\.tensor\.\dd\.shared", asm["ptx"])),
    }


def _read_amd(asm: Mapping[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]

    def count(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else -1

    return {
        "registers": count("vgpr_count"),
        "spilled": count("vgpr_spill_count"),
        "matrix": len(re.findall(r"\bv_mfma_", text)),
        "tma": 0,
    }
