"""The compiled part of the CPU backend: when it is built, where it is kept, and loading it.

It is a few hundred lines of C++ without a header of torch: a compiler needs seconds, and one build
serves every release of torch. Nobody's first call waits for a compiler unasked: it is built by
:func:`build_cpu_extension`, by ``hf-attn check --build``, or on first use where the environment
says ``HF_ATTN_CPU_EXTENSION=1``. Once built, every later process uses it; ``=0`` leaves it out.

It is compiled for the instructions that torch found on this machine, never ``-march=native``: its
folder may be in a home that machines of several kinds share. The file's name says for which source
and which flags it is.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("csrc")
SWITCH = "HF_ATTN_CPU_EXTENSION"

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-fopenmp")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
DECODE, PREFILL = "hf_attn_decode", "hf_attn_prefill"  # its functions
SAID_LINES = 8  # of a compiler that failed

_left_out = False


@dataclass(frozen=True)
class Instructions:
    """Flags for processors that torch calls something that begins with `capability`."""

    capability: str
    flags: tuple[str, ...]
    holds: Callable[[], bool] = lambda: True  # what else the processor must have


def _multiplies_bfloat16() -> bool:
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


# the first that fits counts; torch's name does not say whether pairs of bfloat16 are multiplied
INSTRUCTIONS = (
    Instructions("AVX512", (*_AVX512, "-mavx512bf16"), _multiplies_bfloat16),
    Instructions("AVX512", _AVX512),
    Instructions("AVX2", _AVX2),
    Instructions("", ()),  # what the compiler takes for granted
)


@dataclass(frozen=True)
class Status:
    """Whether a process like this one uses the extension, and why."""

    used: bool
    reason: str


def flags() -> tuple[str, ...]:
    """The compiler's flags on this machine."""
    capability = torch.backends.cpu.get_cpu_capability()
    return next(
        (*FLAGS, *row.flags)
        for row in INSTRUCTIONS
        if capability.startswith(row.capability) and row.holds()
    )


def location() -> Path:
    """Where the library lies once it is built: in the folder of torch's extensions."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(root) if root else Path.home() / ".cache" / "torch_extensions"
    digest = hashlib.sha256(" ".join((*flags(), platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return folder / "hf_attn_cpu" / f"attention_{digest.hexdigest()[:16]}.so"


def build_cpu_extension() -> Path:
    """Compile the extension, unless that was done before; this and later processes use it.

    The compiler is ``$CXX``, else ``c++``.

    Returns:
        The library's path.

    Raises:
        RuntimeError: no compiler, or it failed, with the end of what it said; or not on Linux.
    """
    path = location()
    if not path.exists():
        _compile(path)
    forget()
    return path


def _compile(target: Path) -> None:
    if sys.platform != "linux":
        raise RuntimeError(
            f"the CPU extension is built on Linux only, this is {sys.platform}; everything works "
            "without it"
        )
    compiler = os.environ.get("CXX") or "c++"
    target.parent.mkdir(parents=True, exist_ok=True)
    # built beside its place and then renamed: no process sees half a file, none waits for another
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        command = [*compiler.split(), *flags(), *map(str, sorted(SOURCES.glob("*.cpp")))]
        command += ["-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise RuntimeError(
                f"the CPU extension needs a C++ compiler, and {compiler!r} does not run: {error}; "
                "install g++ or clang, or name one in CXX"
            ) from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()[-SAID_LINES:]
            raise RuntimeError(
                "\n".join([
                    f"the CPU extension was not built, {compiler!r} ended with {done.returncode}",
                    *said,
                ])
            )  # fmt: skip
        built.replace(target)


def library(name: str = DECODE) -> Callable[..., int] | None:
    """A compiled function, or None where it is not to be used; looked for once.

    With ``HF_ATTN_CPU_EXTENSION=1`` it is built where it is missing. When that fails, one warning
    says why, and torch's operators do the work.
    """
    return None if _left_out else _load().get(name)


@contextmanager
def left_out() -> Iterator[None]:
    """Inside a ``with`` block torch's operators do everything: to compare. Not thread-local."""
    global _left_out
    before, _left_out = _left_out, True
    try:
        yield
    finally:
        _left_out = before


def forget() -> None:
    """Look for the library again at the next call."""
    _load.cache_clear()


@functools.cache
def _load() -> dict[str, Callable[..., int]]:
    switch = os.environ.get(SWITCH)
    if switch == "0":
        return {}
    try:
        path = location()
        if not path.exists():
            if switch != "1":
                return {}
            _compile(path)
        found = ctypes.CDLL(str(path))
        functions = {name: getattr(found, name) for name in (DECODE, PREFILL)}
    except (OSError, RuntimeError) as error:
        warnings.warn(f"{error}\nTorch's operators do its work.", stacklevel=2)
        return {}
    for function in functions.values():
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int64
    return functions


def status() -> Status:
    """What :func:`library` would find, without building anything."""
    switch, path = os.environ.get(SWITCH), location()
    if switch == "0":
        return Status(False, f"switched off by {SWITCH}=0")
    if path.exists():
        return Status(True, f"built: {path}")
    if switch == "1":
        return Status(True, f"to be built on first use ({SWITCH}=1)")
    return Status(False, "not built; a C++ compiler does it in seconds: hf-attn check --build")
