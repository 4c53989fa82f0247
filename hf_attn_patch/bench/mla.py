"""A latent attention layer's decoding step on the CPU: absorbed, beside transformers' own ways.

The layer is DeepSeek-V3's with fewer heads, its cache full but for the new token's place. Rows come
in pairs: `attention` is what the implementations differ in (queries, latents in; before the output
projection), `layer` is the whole attention layer with its projections.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..transformers_compat import latent_layers as adapter
from ..transformers_compat.compat import cache_keyword, implementation_of
from .results import OURS, BenchRow, append_rows, environment, time_interleaved
from .tolerance import ROUNDING_BAND

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEYS = (1024, 4096, 16384)
PEERS = ("sdpa", "eager")  # of transformers: both expand the cache at every step
SIZES: dict[str, Any] = {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_size": 2048,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}


class FullCache:
    """Stands for a static cache at its end: the new token's place is the last one."""

    def __init__(self, latent: Tensor, rope: Tensor) -> None:
        self.latent, self.rope = latent, rope  # [1, 1, K, R], [1, 1, K, P]

    def update(self, latent: Tensor, rope: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.latent[:, :, -1:], self.rope[:, :, -1:] = latent, rope
        return self.latent, self.rope

    @property
    def bytes_per_token(self) -> int:
        return sum(x.nbytes // x.shape[2] for x in (self.latent, self.rope))


@dataclass(frozen=True)
class Step:
    """One decoding step of one layer, as each implementation runs it."""

    layers: Mapping[str, nn.Module]  # contender -> the layer, the same weights
    hidden: Tensor  # [1, 1, hidden]
    query: Tensor  # [1, H, 1, N + P]
    turn: tuple[Tensor, Tensor]  # cos, sin of the new token
    cache: FullCache

    def layer(self, name: str) -> Tensor:
        layer = self.layers[name]
        given = {cache_keyword(layer): self.cache}
        out, _ = layer(self.hidden, self.turn, None, **given)
        return out  # type: ignore[no-any-return]

    def attention(self, name: str) -> Tensor:
        layer: Any = self.layers[name]
        implementation = implementation_of(layer.config) or ""
        keys, values = layer.expand_kv(self.cache.latent, self.cache.rope)
        out, _ = _function(implementation)(
            layer, self.query, keys, values, None, scaling=layer.scaling
        )
        return out


def _function(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    found: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, modeling_deepseek_v3.eager_attention_forward
    )
    return found


def make_step(keys: int, dtype: torch.dtype, seed: int = 0, **sizes: Any) -> Step:
    """A layer of random weights and a cache of random latents, the same for equal seeds."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Attention,
        DeepseekV3RotaryEmbedding,
    )

    layers: dict[str, nn.Module] = {}
    for name, implementation in {
        OURS: adapter.NAME,
        **dict(zip(PEERS, PEERS, strict=True)),
    }.items():
        given = SIZES | sizes | {"attn_implementation": implementation}
        config = DeepseekV3Config(max_position_embeddings=keys, **given)
        torch.manual_seed(seed)
        layers[name] = DeepseekV3Attention(config, layer_idx=0).to(dtype).eval()
    adapter.prepare(layers[OURS])
    hidden = torch.randn(1, 1, config.hidden_size).to(dtype)
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    cos, sin = DeepseekV3RotaryEmbedding(config)(hidden, torch.tensor([[keys - 1]]))
    return Step(
        layers=layers,
        hidden=hidden,
        query=torch.randn(1, config.num_attention_heads, 1, width).to(dtype),
        turn=(cos, sin),
        cache=FullCache(
            torch.randn(1, 1, keys, config.kv_lora_rank).to(dtype),
            torch.randn(1, 1, keys, config.qk_rope_head_dim).to(dtype),
        ),
    )


def check(step: Step) -> None:
    """Raises RuntimeError unless our error is at most twice eager's own, plus a rounding band."""
    exact_layer = copy.deepcopy(step.layers["eager"]).double()
    cache = FullCache(step.cache.latent.double(), step.cache.rope.double())
    exact = replace(step, layers={"eager": exact_layer}, query=step.query.double(), cache=cache)
    want = exact.attention("eager")
    error, own = (float((step.attention(name) - want).abs().max()) for name in (OURS, "eager"))
    band = ROUNDING_BAND * torch.finfo(step.query.dtype).eps * float(want.abs().max())
    if not error <= 2 * own + band:
        raise RuntimeError(f"not timed: error {error:.3g}, eager's own is {own:.3g}")


def run(
    *,
    keys: Sequence[int] = KEYS,
    dtypes: Sequence[str] = tuple(DTYPES),
    out: Path | None = None,
    threads: int = 1,
    budget_s: float = 20.0,
    say: Callable[[str], None] = print,
    **sizes: Any,
) -> list[dict[str, str]]:
    """Check and time every step; rows as `BenchRow.cells` gives them.

    Args:
        keys: tokens in the cache; out: CSV to append to; budget_s: seconds for each timing.
        sizes: of DeepseekV3Config, in the place of SIZES.

    Raises:
        ValueError: an unknown dtype; RuntimeError: our answer is not right.
    """
    if unknown := [name for name in dtypes if name not in DTYPES]:
        raise ValueError(f"dtype {unknown[0]!r} is not possible; possible: {', '.join(DTYPES)}")
    torch.set_num_threads(threads)
    env, found = environment(), []
    for dtype in dtypes:
        for count in keys:
            step = make_step(count, DTYPES[dtype], **sizes)
            config: Any = step.layers[OURS].config
            with torch.inference_mode():
                check(step)
                for what in ("attention", "layer"):
                    method = getattr(step, what)
                    contenders = {name: functools.partial(method, name) for name in step.layers}
                    timings = time_interleaved(contenders, budget_s=budget_s)
                    say(
                        f"{dtype} {count} keys, {what}: "
                        + ", ".join(f"{name} {t.p50_ms:.2f} ms" for name, t in timings.items())
                    )
                    rows = [
                        BenchRow(
                            impl=name,
                            pass_="decode",
                            dtype=dtype,
                            batch=1,
                            heads_q=config.num_attention_heads,
                            heads_kv=1,
                            head_dim=config.kv_lora_rank + config.qk_rope_head_dim,
                            seq_q=1,
                            seq_k=count,
                            extra=f"MLA {what}; cache {step.cache.bytes_per_token} B/token",
                            timing=timing,
                            env=env,
                        )
                        for name, timing in timings.items()
                    ]
                    found += [row.cells() for row in rows]
                    if out is not None:
                        append_rows(out, rows)
    return found
