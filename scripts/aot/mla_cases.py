"""The MLA calls that are compiled ahead of time: every tile of the table, every feature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn_kernels.fp8 import E4M3
from hf_attn_kernels.problem import MlaProblem, Pattern
from hf_attn_kernels.triton.mla import launches

from .aot import AotCase, case_of
from .decode_cases import BATCH, KEYS, NAMES, UNITS


@dataclass(frozen=True, kw_only=True)
class MlaCall:
    """A kind of call over latents."""

    feature: str = ""
    dtype: torch.dtype = torch.bfloat16
    rank: int = 512
    rope: int = 64
    heads: int = 128
    tokens: int = 1
    page_size: int = 64
    splits: int = 8
    window: int = -1
    masked: bool = False
    leftpad: bool = False
    float8: bool = False

    @property
    def name(self) -> str:
        parts = [NAMES[self.dtype], f"R{self.rank}-P{self.rope}-H{self.heads}"]
        parts += [f"page{self.page_size}", self.feature, "float8" * self.float8]
        return "-".join(filter(None, parts))


CALLS: tuple[MlaCall, ...] = (
    # 16 and 128 heads: the tile of 16 rows and the largest one
    *(
        MlaCall(dtype=dtype, rank=rank, rope=rope, heads=heads, page_size=page)
        for dtype, pages in ((torch.bfloat16, (0, 16, 64)), (torch.float16, (64,)))
        for rank, rope in ((512, 64), (256, 32))
        for heads in (16, 128)
        for page in pages
    ),
    *(MlaCall(dtype=torch.float32, rank=rank, heads=16, page_size=16) for rank in (512, 256)),
    *(MlaCall(heads=heads, float8=True) for heads in (16, 128)),
    *(MlaCall(rank=256, rope=32, heads=heads, float8=True) for heads in (16, 128)),
    MlaCall(dtype=torch.float32, heads=16, float8=True),
    MlaCall(dtype=torch.float32, rank=256, heads=16, float8=True),
    MlaCall(feature="one-split", splits=1),
    MlaCall(feature="Q4", tokens=4, heads=16),
    MlaCall(feature="masked", page_size=0, masked=True),
    MlaCall(feature="masked", page_size=0, masked=True, heads=16),
    MlaCall(feature="leftpad-window", leftpad=True, window=4095),
    MlaCall(feature="R384", rank=384),
)


def _problem(call: MlaCall) -> MlaProblem:
    def tensor(*shape: int, dtype: torch.dtype = call.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    paged, stored = call.page_size > 0, E4M3 if call.float8 else call.dtype
    rows = (BATCH * KEYS // call.page_size, call.page_size) if paged else (BATCH, KEYS)
    descale = tensor(1, dtype=torch.float32) if call.float8 else None
    table = tensor(BATCH, KEYS // call.page_size, dtype=torch.int32) if paged else None
    return MlaProblem(
        q_latent=tensor(BATCH, call.tokens, call.heads, call.rank),
        q_rope=tensor(BATCH, call.tokens, call.heads, call.rope),
        latent=tensor(*rows, call.rank, dtype=stored),
        k_rope=tensor(*rows, call.rope, dtype=stored),
        pattern=Pattern(scaling=192**-0.5, window_left=call.window, window_right=0),
        seqlens_k=None if call.masked else tensor(BATCH, dtype=torch.int32),
        block_table=table,
        leftpad=tensor(BATCH, dtype=torch.int32) if call.leftpad else None,
        key_mask=tensor(BATCH, KEYS, dtype=torch.bool) if call.masked else None,
        latent_descale=descale,
        rope_descale=descale,
        num_splits=call.splits,
    )


def aot_cases(arch: str) -> list[AotCase]:
    """Cases of the MLA kernel with the tiles of `arch`; the reduction behind it is decode's own."""
    cases: list[AotCase] = []
    for call in CALLS:
        problem = _problem(call)
        batch, q_len, heads, _ = problem.q_latent.shape
        lse = problem.q_latent.new_empty(batch, heads, q_len, dtype=torch.float32)
        launch, *_ = launches(problem, torch.empty_like(problem.q_latent), lse, arch, UNITS)
        cases.append(case_of(launch, call.name))
    return cases
