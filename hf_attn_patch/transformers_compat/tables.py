"""Where transformers keeps its attention and mask functions by name."""

from __future__ import annotations

from typing import Any


def interfaces() -> tuple[tuple[str, dict[str, Any]], ...]:
    """transformers' global name -> function tables, attention first, with a word for messages."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    return (
        ("attention", AttentionInterface._global_mapping),
        ("mask", AttentionMaskInterface._global_mapping),
    )


def batching_prefix() -> str:
    """What continuous batching puts before a name; from transformers 5.19 on, nothing."""
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return "paged|" if (int(major), int(minor)) < (5, 19) else ""
