"""Implementations × features × backends, from the registry."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from hf_attn_patch.capabilities import Capabilities
from hf_attn_patch.registry import list_implementations

from .markdown import table

FEATURES = {
    "dtypes": "dtypes",
    "head_dim_forward": "head_dim, forward up to",
    "head_dim_backward": "head_dim, backward up to",
    "causal": "causal",
    "full": "bidirectional and cross-attention",
    "gqa": "GQA and MQA without repeating K/V",
    "latents": "decode over cached latents (MLA), never expanded",
    "window": "sliding window (the model's own)",
    "sink_tokens": "window on any causal model, first tokens kept",
    "rolling_cache": "KV cache that stays O(window)",
    "softcap": "softcap (gemma2)",
    "sink_logits": "sink logits `s_aux` (gpt_oss)",
    "bias": "position bias, arbitrary 4D masks",
    "padding": "left and right padding",
    "packed": "packed sequences",
    "dropout": "dropout",
    "backward": "backward",
    "paged": "keys and values in pages (`PagedCache`; inference)",
    "continuous_batching": "continuous batching (`generate_batch`, server; inference)",
}


def implementations_table(results: Path) -> str:
    """Features down, implementations across; the backend of each device at the foot."""
    impls = list_implementations()
    lines = []
    for field in fields(Capabilities):
        values = [getattr(impl.supports, field.name) for impl in impls]
        if any(value is not False for value in values):
            lines.append([FEATURES[field.name], *(_feature(value) for value in values)])
    devices = {need.device for impl in impls for need in impl.requires.devices}
    for device in sorted(devices, key=("cuda", "xpu", "cpu").index):
        cells = []
        for impl in impls:
            found = [need for need in impl.requires.devices if need.device == device]
            cells.append(found[0].backend.replace("triton", "Triton") if found else "–")
        lines.append([f"backend on {DEVICES[device]}", *cells])
    return table(["", *(f"`{impl.name}`" for impl in impls)], lines)


DEVICES = {"cuda": "NVIDIA and AMD GPUs", "xpu": "Intel GPUs", "cpu": "CPU"}


def _feature(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "–"
    if isinstance(value, tuple):
        return ", ".join(str(part) for part in value)
    return str(value)
