"""A second call of a kind launches what the first one compiled, with its own tensors.

Runs without a GPU: kernels are really compiled, and a driver that only notes launches takes the
place of CUDA's. In a process of its own, because Triton's interpreter is on in this one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

NOTING = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from hf_attn_kernels import dispatch, flash_attn_varlen_func, flash_attn_with_kvcache, launch_cache
from hf_attn_kernels import kvcache
from hf_attn_kernels.triton import decode

LAUNCHES = []

class Utils:
    def load_binary(self, *args):
        return 1, 2, 64, 0, 1024
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

class Launcher:
    def __init__(self, src, metadata):
        self.name = metadata.name
    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, exit, *args):
        LAUNCHES.append((self.name, (x, y, z), args))

class Driver:
    utils, launcher_cls = Utils(), Launcher
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
dispatch.backend_name = lambda device: "triton"
launch_cache._is_here = lambda q: True
kvcache.check_values = lambda *args: None
decode.chip_of, decode.processors = (lambda *args: "sm_90"), (lambda device: 132)

def given(float8=False, shift=0):
    # other memory each time; `shift` spoils q's alignment, for which a kernel is compiled
    def half(*shape):
        return torch.zeros(shape, dtype=torch.bfloat16)
    flat = torch.zeros(4 * 8 * 64 + 8, dtype=torch.bfloat16)
    dtype = torch.float8_e4m3fn if float8 else torch.bfloat16
    return dict(
        q=flat[shift : shift + 4 * 8 * 64].view(4, 1, 8, 64),
        k_cache=half(32, 16, 2, 64).to(dtype), v_cache=half(32, 16, 2, 64).to(dtype),
        k=half(4, 1, 2, 64), v=half(4, 1, 2, 64),
        rotary_cos=torch.zeros(4096, 32), rotary_sin=torch.zeros(4096, 32),
        cache_seqlens=torch.zeros(4, dtype=torch.int32),
        block_table=torch.zeros(4, 256, dtype=torch.int32), causal=True,
        **(dict(k_descale=torch.ones(2), v_descale=torch.ones(2)) if float8 else {}),
    )

def packed():
    args = given()
    return dict(
        q=args["q"][:, 0], k=args["k_cache"], v=args["v_cache"],
        cu_seqlens_q=torch.arange(5, dtype=torch.int32),
        cu_seqlens_k=torch.arange(5, dtype=torch.int32), max_seqlen_q=1, max_seqlen_k=4096,
        block_table=args["block_table"], causal=True,
    )

def launches(function, args):
    LAUNCHES.clear()
    function(**args)
    return list(LAUNCHES)

def roles(found, args):
    # arguments with tensors as the names they were given under, or their shapes
    by_pointer = {t.data_ptr(): n for n, t in args.items() if isinstance(t, torch.Tensor)}
    def role(x):
        if not isinstance(x, torch.Tensor):
            return x
        return by_pointer.get(x.data_ptr(), tuple(x.shape))
    return [(name, grid, tuple(map(role, values))) for name, grid, values in found]

def same(function, make):
    first, second = make(), make()
    want = roles(launches(function, first), first)
    known_before = len(launch_cache._PLANS)
    jit = triton.runtime.jit.JITFunction.run
    triton.runtime.jit.JITFunction.run = None  # Triton's own way is shut
    got = roles(launches(function, second), second)
    triton.runtime.jit.JITFunction.run = jit
    assert got == want, (got, want)
    assert len(launch_cache._PLANS) == known_before
    return [name for name, *_ in got]
"""

BODIES = {
    "append-decode-reduce": """
names = same(flash_attn_with_kvcache, given)
assert names == ["append_kernel", "decode_kernel", "reduce_kernel"], names
names = same(flash_attn_with_kvcache, lambda: given(float8=True) | {"num_splits": 1})
assert names == ["append_kernel", "decode_kernel"], names
plain = lambda: {n: t for n, t in given().items() if n not in ("rotary_cos", "rotary_sin")}
assert same(flash_attn_with_kvcache, plain)[0] == "append_kernel"
""",
    "packed": """
assert same(flash_attn_varlen_func, packed) == ["decode_kernel", "reduce_kernel"]
""",
    "other-kinds": """
flash_attn_with_kvcache(**given())
assert len(launch_cache._PLANS) == 1
for changed in (given(shift=1), given(float8=True), given() | {"softcap": 2.0},
                given() | {"window_size": (5, 0)},
                given() | {"block_table": torch.zeros(4, 128, dtype=torch.int32)}):
    before = len(launch_cache._PLANS)
    flash_attn_with_kvcache(**changed)
    assert len(launch_cache._PLANS) == before + 1
""",
    "never-known": """
with_copy = given() | {"q": torch.zeros(4, 1, 64, 8, dtype=torch.bfloat16).transpose(2, 3)}
for args in (with_copy, given() | {"cache_seqlens": 3}):
    flash_attn_with_kvcache(**args)
asking = given()
asking["q"].requires_grad_()
try:
    flash_attn_with_kvcache(**asking)
except ValueError as error:
    assert "no backward" in str(error)
else:
    raise SystemExit("a gradient was not refused")
assert not launch_cache._PLANS
""",
    "bounded": """
launch_cache.MOST = 2
for columns in (16, 32, 48, 64, 80):
    flash_attn_with_kvcache(**given() | {
        "block_table": torch.zeros(4, columns, dtype=torch.int32), "num_splits": 2})
    assert len(launch_cache._PLANS) <= 2
""",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled kernels are kept, so that the tests compile each but once."""
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("name", BODIES)
def test_known_calls(name: str, fresh_python: Callable[..., Any], compiled: Path) -> None:
    fresh_python(NOTING + BODIES[name], env={"TRITON_CACHE_DIR": str(compiled)})
