"""What a backend is asked to compute: one checked, immutable description.

The functions of :mod:`.api` and :mod:`.mla` build these; the Triton and CPU backends read them.
Windows are kept as two numbers, because "causal" is only a window whose right side is 0.

Shape letters: B batch, Q query length, K key length, Hq query heads, Hkv key/value heads,
D head_dim of q and k, Dv head_dim of v, T total tokens of a packed batch, R sequences in it. Those
of latents are :class:`MlaProblem`'s own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .launch_cache import KnownCall

UNBOUNDED = -1


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Which keys a query sees and how a score becomes a weight. All numbers, no tensors."""

    scaling: float
    window_left: int = UNBOUNDED  # keys to the left of the diagonal that stay visible, -1: all
    window_right: int = UNBOUNDED  # keys to the right of it, -1: all, 0: causal
    softcap: float = 0.0  # 0: none; else s -> softcap * tanh(s / softcap)
    sink_tokens: int = 0  # first kept keys of a row that no left window hides
    dropout_p: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Attention over given keys and values, dense (4-D) or packed (3-D with cu_seqlens)."""

    q: Tensor  # [B, Q, Hq, D] or [Tq, Hq, D]
    k: Tensor  # [B, K, Hkv, D] or [Tk, Hkv, D]
    v: Tensor  # [B, K, Hkv, Dv] or [Tk, Hkv, Dv]
    pattern: Pattern
    s_aux: Tensor | None = None  # [Hq] extra logit in each row's denominator
    alibi_slopes: Tensor | None = None  # [1 | B, Hq] float32
    bias: Tensor | None = None  # [1 | B, 1 | Hq, 1 | Q, K], bool or floating point
    key_padding_mask: Tensor | None = None  # [B, K] bool, True = keep; dense only
    cu_seqlens_q: Tensor | None = None  # [R + 1] int32
    cu_seqlens_k: Tensor | None = None  # [R + 1] int32
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    dropout_seed: Tensor | None = None  # [1] int64 on q's device when dropout_p > 0
    need_lse: bool = False  # False: a backend may return None in its place
    deterministic: bool = True  # the backward; False: its last bits may differ from run to run

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary embedding of the first 2R columns of q and of new keys."""

    cos: Tensor  # [positions, R]
    sin: Tensor  # [positions, R]
    interleaved: bool  # pairs (0, 1), (2, 3) ... instead of (0, R), (1, R + 1) ...
    ordered: bool  # query i stands at the i-th new position; else all stand at the first


@dataclass(frozen=True, kw_only=True)
class NewKeys:
    """What a backend writes into the cache, behind the keys a row holds, before it attends."""

    k: Tensor  # [B, Knew, Hkv, D]
    v: Tensor  # [B, Knew, Hkv, Dv]
    rotary: Rotary | None = None


@dataclass(frozen=True, kw_only=True)
class CacheProblem:
    """Attention of new queries over a KV cache, contiguous or paged. Inference only.

    Rows come as a batch, or packed end to end with cu_seqlens (paged only; B is R then).
    """

    q: Tensor  # [B, Q, Hq, D] or [Tq, Hq, D]; not rotated yet where `new` has a rotary
    k_cache: Tensor  # [Bc, K, Hkv, D], or [pages, page_size, Hkv, D] with a block_table
    v_cache: Tensor  # [Bc, K, Hkv, Dv], or [pages, page_size, Hkv, Dv]
    pattern: Pattern
    seqlens_k: Tensor | None = None  # [B] int32: keys each row holds before `new`; None if packed
    new: NewKeys | None = None
    block_table: Tensor | None = None  # [B, max_blocks] int32, unused entries -1
    batch_idx: Tensor | None = None  # [B] int32 row of the cache for each row of q; contiguous only
    leftpad: Tensor | None = None  # [B] int32 keys to skip at the start of a row
    cu_seqlens_q: Tensor | None = None  # [R + 1] int32
    cu_seqlens_k: Tensor | None = None  # [R + 1] int32
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    s_aux: Tensor | None = None  # [Hq]
    alibi_slopes: Tensor | None = None  # [1 | B, Hq] float32
    k_descale: Tensor | None = None  # [1 | B, Hkv] float32, of a float8 cache: value = stored * it
    v_descale: Tensor | None = None  # [1 | B, Hkv] float32
    num_splits: int = 0  # 0: chosen by the backend
    call: KnownCall | None = None  # under which a backend may learn how it ran this

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def capacity(self) -> int:
        """Keys that a row may have."""
        blocks = 1 if self.block_table is None else self.block_table.shape[1]
        return blocks * self.k_cache.shape[1]

    @property
    def as_given(self) -> bool:
        """Whether the tensors are those of `call`: else a copy would have to be made each time."""
        assert self.call is not None
        given, new = self.call.tensors, self.new
        rotary = None if new is None else new.rotary
        k, v = (None, None) if new is None else (new.k, new.v)
        cos, sin = (None, None) if rotary is None else (rotary.cos, rotary.sin)
        lengths = self.seqlens_k if self.cu_seqlens_k is None else self.cu_seqlens_k
        mine = (
            self.q, self.k_cache, self.v_cache, lengths, self.cu_seqlens_q, k, v, cos, sin,
            self.block_table, self.batch_idx, self.leftpad, self.alibi_slopes, self.s_aux,
            self.k_descale, self.v_descale,
        )  # fmt: skip
        return all(t is None or t.is_contiguous() for t in (cos, sin)) and all(
            a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr())
            for a, b in zip(given, mine, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class MlaProblem:
    """Absorbed queries over latents, contiguous or paged; checked. Inference only.

    H heads, R rank of the latent, P columns of the rotated key; see :mod:`.mla`.
    """

    q_latent: Tensor  # [B, Q, H, R]
    q_rope: Tensor  # [B, Q, H, P]
    latent: Tensor  # [B, K, R], or [pages, page_size, R] with a block_table
    k_rope: Tensor  # [B, K, P], or [pages, page_size, P]
    pattern: Pattern
    seqlens_k: Tensor | None = None  # [B] int32; None: all of a contiguous cache's keys
    block_table: Tensor | None = None  # [B, max_blocks] int32, unused entries -1
    leftpad: Tensor | None = None  # [B] int32 keys to skip at the start of a row
    key_mask: Tensor | None = None  # [B, K] bool, True = keep; contiguous only
    latent_descale: Tensor | None = None  # [1] float32, of a float8 cache: value = stored * it
    rope_descale: Tensor | None = None  # [1] float32
    num_splits: int = 0  # 0: chosen by the backend

    @property
    def capacity(self) -> int:
        """Keys that a row may have."""
        blocks = 1 if self.block_table is None else self.block_table.shape[1]
        return blocks * self.latent.shape[1]
