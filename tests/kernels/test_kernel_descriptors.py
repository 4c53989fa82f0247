"""The copy engine's way through the kernels, and the backward that adds up dq as it goes.

Inputs lie in a fence of NaN whose guard columns keep rows at multiples of 16 bytes, as descriptors
need. In Triton's interpreter a descriptor is masked loads and stores; `make gpu` runs the same
tests on the engine itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from kernel_cases import Case, apart, check, gradients, make_data, run_kernel
from torch import Tensor

from hf_attn_kernels import flash_attn_func
from hf_attn_kernels.problem import Pattern

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from hf_attn_kernels.triton import backward_launch, descriptors, forward_launch, options
from hf_attn_kernels.triton.config import JOINT_HEAD_DIM

Backend = Callable[[], AbstractContextManager[None]]
pytestmark = pytest.mark.usefixtures("poison_memory")
F16, BF16 = torch.float16, torch.bfloat16
LAUNCHERS = (forward_launch, backward_launch)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Short calls take descriptors too; gives a list of the shapes that were described."""
    monkeypatch.setattr(descriptors, "FEW_SCORES", 1)
    shapes: list[torch.Size] = []

    def counted(x: Tensor, rows: int, columns: int) -> Any:
        shapes.append(x.shape)
        return descriptors.tiles_of(x, rows, columns)

    for module in LAUNCHERS:
        monkeypatch.setattr(module, "tiles_of", counted)
    return shapes


DENSE = [
    *(
        Case(q_len=q, k_len=k, causal=causal, batch=1, dtype=BF16, note="length")
        for q, k in ((4, 63), (64, 64), (112, 111), (20, 63), (60, 17), (63, 63))
        for causal in (False, True)
    ),
    *(
        Case(q_len=60, heads_q=8, heads_kv=kv, causal=True, dtype=F16, note="group")
        for kv in (8, 2, 1)
    ),
    *(
        Case(q_len=40, head_dim=dim, causal=True, batch=1, dtype=BF16, heads_q=2, heads_kv=1)
        for dim in (16, 64, 72, 80, 128, 256)
    ),
    Case(q_len=36, head_dim=192, head_dim_v=128, causal=True, heads_q=2, batch=1, dtype=BF16),
    Case(q_len=112, causal=True, window=(16, 0), batch=1, dtype=BF16),
    Case(q_len=64, k_len=70, window=(7, 3), dtype=F16),
    Case(q_len=112, causal=True, window=(7, 0), sink_tokens=4, dtype=BF16),
    Case(q_len=60, k_len=17, causal=True, s_aux=True, dtype=BF16, note="empty-rows"),
    Case(q_len=60, causal=True, softcap=5.0, dtype=BF16),
    Case(q_len=60, causal=True, alibi="rows", dtype=F16),
    Case(q_len=60, bias=(1, 4, 60), dtype=F16),
    Case(q_len=60, bias=(2, 1, 60), bool_bias=True, dtype=BF16),
]
PACKED = [
    Case(lengths=((5, 9), (0, 1), (35, 35), (23, 18)), causal=True, dtype=BF16),
    Case(lengths=((63, 63), (1, 1), (47, 47)), causal=True, dtype=F16, heads_kv=1),
    Case(lengths=((20, 30), (3, 0), (40, 40)), window=(6, 2), dtype=BF16),
]
PADDED = [Case(padding=kind, causal=True, dtype=BF16) for kind in ("left", "holes")]


BOTH = [(case, True) for case in DENSE + PACKED] + [(case, False) for case in DENSE[1::2]]


@pytest.mark.parametrize(("case", "deterministic"), BOTH, ids=lambda x: "" if x is True else str(x))
def test_matches_the_oracle(
    case: Case, deterministic: bool, device: torch.device, triton_backend: Backend,
    described: list[torch.Size],
) -> None:  # fmt: skip
    with triton_backend():
        check(case, device, apart, deterministic=deterministic)
    # k and v; else q, k, v, then with dout for each kernel of the backward, and the sum itself
    two_kernels = deterministic or case.head_dim > JOINT_HEAD_DIM
    backward = 4 + 4 if two_kernels else 4 + 1
    if case.q_len % 4:  # the log-sum-exp of a head begins at no multiple of 16 bytes
        backward = 0
    assert len(described) == (2 if case in PACKED else 3 + backward)


SUMS = [*DENSE[:6], *DENSE[-6:], *PACKED, *PADDED]
SUMS += [Case(causal=True, heads_kv=1), Case(q_len=111), Case(dropout_p=0.3, dtype=BF16)]


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_adding_up_by_pointers(case: Case, device: torch.device, triton_backend: Backend) -> None:
    """Where there is no copy engine, or it may not be used; float32 too."""
    with triton_backend(), options.without("descriptors"):
        check(case, device, apart, deterministic=False)


@pytest.mark.parametrize("module", LAUNCHERS, ids=["forward", "backward"])
def test_negative_control(
    module: Any, device: torch.device, triton_backend: Backend, described: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Tiles of keys one row off break the budget."""
    honest = module.tiles_of

    def shifted(x: Tensor, rows: int, columns: int) -> Any:
        return honest(x.detach().roll(1, dims=1) if x.shape[2] == 2 else x, rows, columns)

    monkeypatch.setattr(module, "tiles_of", shifted)
    with triton_backend(), pytest.raises(AssertionError, match="exceeds"):
        check(Case(q_len=60, causal=True, dtype=BF16), device, apart)


@pytest.mark.parametrize("by", ["descriptors", "pointers"])
def test_negative_control_of_the_sum(
    by: str, device: torch.device, triton_backend: Backend, described: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """dq is what was added up: a sum that starts at one is noticed, and in dq alone."""
    monkeypatch.setattr(torch, "zeros_like", torch.ones_like)
    ways = () if by == "descriptors" else ("descriptors",)
    with (
        triton_backend(), options.without(*ways),
        pytest.raises(AssertionError, match=r"^dq: error .* exceeds"),
    ):  # fmt: skip
        check(Case(q_len=60, causal=True, dtype=BF16), device, apart, deterministic=False)


def test_torch_can_insist_on_the_same_bits(
    device: torch.device, triton_backend: Backend, described: list[torch.Size]
) -> None:
    data = make_data(Case(q_len=40, batch=1, dtype=BF16), device, apart)
    found = []
    for insist in (False, True):
        torch.use_deterministic_algorithms(insist)
        try:
            with triton_backend():
                described.clear()
                gradients(data, *run_kernel(data, deterministic=False))
                found.append(len(described))
        finally:
            torch.use_deterministic_algorithms(False)
    assert found == [3 + 4 + 1, 3 + 4 + 4]  # tensors: one kernel and its sum, or two


def test_same_bits_as_by_pointers(
    device: torch.device, triton_backend: Backend, described: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With the same tiles the way that they come does not matter."""
    from hf_attn_kernels.triton.config import Tiles

    for module in LAUNCHERS:
        monkeypatch.setattr(module, "tiles_for", lambda *a, **k: Tiles(32, 32, 4, 1))
    data = make_data(Case(q_len=112, causal=True, window=(40, 0), dtype=BF16), device, apart)
    results = []
    for ways in ((), ("descriptors",)):
        with triton_backend(), options.without(*ways):
            out, lse = run_kernel(data)
            results.append([out, lse, *gradients(data, out, lse).values()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_neighbour_is_not_read(
    device: torch.device, triton_backend: Backend, described: list[torch.Size]
) -> None:
    """NaN in the sequences before and behind does not reach a packed one."""
    data = make_data(Case(lengths=((35, 35), (63, 63), (20, 20)), dtype=BF16), device, apart)
    with triton_backend(), torch.no_grad():
        want, _ = run_kernel(data)
        for x in (data.q, data.k, data.v):
            x[:35], x[98:] = float("nan"), float("nan")
        out, _ = run_kernel(data)
    assert torch.equal(out[35:98], want[35:98])
    assert bool(out[:35].isnan().all())  # what lies there is read by its own sequence
    assert described


@pytest.mark.parametrize(
    "why",
    [
        "float32",
        "odd-base",
        "odd-stride",
        "repeated-heads",
        "padding",
        "dropout",
        "few-scores",
        "ruled-out",
    ],
)
def test_what_the_copy_engine_cannot_bring(
    why: str, device: torch.device, triton_backend: Backend, described: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It goes by pointers, with the same result."""
    q, k = (torch.randn(1, 20, 2, 16, dtype=BF16, device=device) for _ in range(2))
    mask, ways, dropout_p = None, (), 0.0
    with triton_backend():
        want = flash_attn_func(q, k, k)
    assert described == [(1, 20, 2, 16)] * 3
    if why == "float32":
        q, k = q.float(), k.float()
    elif why == "odd-base":
        k = torch.cat([k.new_zeros(1), k.flatten()])[1:].view(k.shape)
    elif why == "odd-stride":
        k = torch.cat([k, k[..., :1]], -1)[..., :16]
    elif why == "repeated-heads":
        q = q[:, :, :1].expand(q.shape)
    elif why == "padding":
        mask = torch.ones(1, 20, dtype=torch.bool, device=device)
    elif why == "dropout":
        dropout_p = 1e-9  # drops nothing
    elif why == "few-scores":
        monkeypatch.setattr(descriptors, "FEW_SCORES", 2 * 20 * 20 + 1)
    else:
        ways = ("descriptors",)
    with triton_backend(), options.without(*ways):
        described.clear()
        out = flash_attn_func(q, k, k, dropout_p, key_padding_mask=mask)
    assert not described and isinstance(out, Tensor) and isinstance(want, Tensor)
    heads = 1 if why == "repeated-heads" else 2
    torch.testing.assert_close(out[:, :, :heads].to(BF16), want[:, :, :heads], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("shape", "steps", "why"),
    [
        ((2, 20, 4, 16), (1280, 64, 16, 1), None),
        ((2, 4, 20, 16), (1280, 16, 64, 1), None),  # heads first, as transformers has them
        ((1, 20, 1, 16), (7, 16, 3, 1), None),  # what a dimension of one says is never used
        ((2, 0, 4, 16), (0, 64, 16, 1), "an empty tensor"),
        ((2, 20, 4, 16), (1280, 64, 1, 4), "a last stride of 4"),
        ((2, 20, 4, 12), (960, 48, 12, 1), "a stride of 24 bytes"),
        ((2, 20, 4, 16), (1280, 64, 0, 1), "a stride of 0 bytes"),
    ],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_which_layouts_can_be_described(
    shape: tuple[int, ...], steps: tuple[int, ...], why: str | None
) -> None:
    x = torch.zeros(4096, dtype=BF16).as_strided(shape, steps)
    assert descriptors.obstacle(x) == why
    if why is None:
        told = descriptors.tiles_of(x, 32, 16)  # Triton's own checks pass
        assert told.shape == [shape[0], shape[2], shape[1], shape[3]]


def test_an_odd_base_cannot_be_described() -> None:
    x = torch.zeros(65, dtype=BF16)[1:].view(1, 2, 2, 16)
    assert descriptors.obstacle(x) == "a base that is no multiple of 16 bytes"


def test_chips_without_a_copy_engine() -> None:
    x = forward_launch.Inputs(
        *(torch.zeros(4, 4096, 1, 16, dtype=BF16) for _ in range(3)), *[None] * 7, 4096, 4096,
        Pattern(scaling=1.0),
    )  # fmt: skip
    for chip, name in (("sm_80", "pointers"), ("sm_90", "descriptors"), ("gfx942", "pointers")):
        assert forward_launch.forward_kernel(x, chip).name == name


def test_ruling_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not options.ruled_out("descriptors")
    with options.without("descriptors"):
        assert options.ruled_out("descriptors") and not options.ruled_out("heavy_first")
    assert not options.ruled_out("descriptors")
    with pytest.raises(ValueError, match=r"names 'magic'; possible: gluon, descriptors"):
        options.without("magic").__enter__()
    monkeypatch.setenv(options.WITHOUT, "descriptors")
    assert options.ruled_out("descriptors")
    monkeypatch.setenv(options.WITHOUT, "descriptors,pointers")
    with pytest.raises(ValueError, match=r"HF_ATTN_TRITON_WITHOUT names 'pointers'"):
        options.ruled_out("descriptors")


def test_compiles_as_one_graph(
    device: torch.device, triton_backend: Backend, described: list[torch.Size]
) -> None:
    """Descriptors and the choice of the backward live behind the operator."""
    q, k, v = (
        torch.randn(1, 40, heads, 16, dtype=F16, device=device, requires_grad=True)
        for heads in (2, 1, 1)
    )

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q * 1.5, k, v, causal=True, deterministic=False)
        assert isinstance(out, Tensor)
        return out

    with triton_backend():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        got, want = compiled(q, k, v), layer(q, k, v)
        grads = [torch.autograd.grad(x.sum(), (q, k, v)) for x in (got, want)]
    assert (1, 40, 2, 16) in described
    torch.testing.assert_close(got, want)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
