"""What every test shares: the device, forced Triton, poisoned memory, fresh processes.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is
imported, hence at the top of this file. Tests that compile ahead of time, or that look at what an
import pulls in, run in a process of their own (`fresh_python`), where the interpreter is off.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_ATTN_CPU_EXTENSION"] = "0"  # one that was built here before is not what is tested

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = (ROOT, ROOT / "kernels", ROOT / "converters")


def pytest_configure(config: pytest.Config) -> None:
    from fence import put_up_fence
    from interpreter import add_descriptor_sums, fix_bf16_dot, interpreting

    if interpreting() and importlib.util.find_spec("triton") is not None:
        fix_bf16_dot()
        add_descriptor_sums()
        put_up_fence()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from fence import FENCE

    if FENCE.checked:
        terminalreporter.write_line(
            f"{FENCE.checked:,} elements that interpreted kernels loaded and stored lay within the "
            "tensors of their calls"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernel tests put their tensors: the GPU where there is one, else the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session")
def triton_backend(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A context manager that makes the Triton kernels run on `device` (interpreted on the CPU)."""
    from hf_attn_kernels import use_backend

    return nullcontext if device.type == "cuda" else lambda: use_backend("triton")


# --- poisoned memory ------------------------------------------------------------------------------


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """Fill fresh memory with what no kernel may ever let through: NaN, or the largest integer."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `empty` allocation in Python comes filled with NaN, so a forgotten store shows."""

    def poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: poisoned(allocate(*args, **kwargs))

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.fixture
def fenced() -> Callable[[torch.Tensor], torch.Tensor]:
    """`fenced(t)` copies `t` into the middle of a NaN block, one guard row on every side of each
    dimension, so that a load out of bounds reads NaN. The last dimension stays contiguous."""

    def fence(tensor: torch.Tensor) -> torch.Tensor:
        block = poisoned(tensor.new_empty([size + 2 for size in tensor.shape]))
        inside = block[tuple(slice(1, -1) for _ in tensor.shape)]
        inside.copy_(tensor.detach())
        return inside.requires_grad_(tensor.requires_grad)

    return fence


# --- the CPU extension ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def extension_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Torch's folder of extensions for this run, with the CPU extension built in it."""
    from hf_attn_kernels import build_cpu_extension

    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("torch_extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        build_cpu_extension()
    return folder


@pytest.fixture
def with_extension(
    extension_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[object]]:
    """The CPU extension serves what it can; gives a list that grows by each call that it served."""
    from hf_attn_kernels.cpu import extension, extension_decode

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extension_folder))
    monkeypatch.setenv("HF_ATTN_CPU_EXTENSION", "")
    extension.forget()
    run = extension.library()
    assert run is not None
    served: list[object] = []

    def counted(call: object) -> int:
        served.append(call)
        return run(call)

    monkeypatch.setattr(extension_decode, "library", lambda: extension.library() and counted)
    yield served
    extension.forget()


# --- processes of their own -----------------------------------------------------------------------


def fresh_environment(**extra: str) -> dict[str, str]:
    """This environment for a child process: the three source roots importable, no interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(str(root) for root in SOURCE_ROOTS)
    return env | extra


@pytest.fixture(scope="session")
def fresh_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`fresh_python(code)` runs Python code (`fresh_python("-m", "pkg", ...)` a command line) in a
    new process at the repository root. Options: `env` (extra variables), `cwd`, `check` (default
    True: a failing exit fails the test with the child's output)."""

    def run(
        *args: str,
        env: dict[str, str] | None = None,
        cwd: Path = ROOT,
        check: bool = True,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *(("-c", *args) if len(args) == 1 else args)]
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command,
            cwd=cwd,
            env=fresh_environment(**(env or {})),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture(autouse=True)
def same_seed() -> Iterator[None]:
    """Every test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
    yield


def pytest_report_header(config: pytest.Config) -> str:
    triton: Any = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "native"
    name = torch.cuda.get_device_name() if HAS_GPU else "cpu"
    return f"torch {torch.__version__} on {name}, triton {triton}"
