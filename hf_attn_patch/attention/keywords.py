"""Which keywords an attention call may carry.

transformers hands its attention functions whatever came with the model's call. Some of it decides
who sees whom, and a function that swallowed it would answer with other numbers and say nothing. So
every keyword is either served, known not to concern attention, or refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Named parameters of `forward.attend`; a test holds the two together.
SERVED = frozenset(
    {
        "attention_mask", "cache", "cu_seq_lens_k", "cu_seq_lens_q", "dropout", "indices",
        "is_causal", "max_length_k", "max_length_q", "output_attentions", "position_bias",
        "position_ids", "s_aux", "scaling", "sliding_window", "softcap",
    }
)  # fmt: skip

# Why nothing is lost where these are not read. eager and sdpa attention read none of them either.
HARMLESS: dict[str, str] = {
    # the model's bookkeeping
    "use_cache": "the layer has updated its cache before it calls attention",
    "cache_position": "the layer has updated its cache before it calls attention",
    "past_key_values": "the layer has updated its cache before it calls attention",
    "layer_idx": "names the layer",
    "labels": "for the loss",
    "num_items_in_batch": "for the loss",
    "logits_to_keep": "for the language model's head",
    "return_dict": "form of the model's output",
    "output_hidden_states": "recorded by the model",
    "output_router_logits": "recorded by the model",
    "deterministic": "the backward pass is deterministic without being asked",
    # inputs of other parts of the model
    "input_ids": "read by embeddings and routers",
    "ple_input_ids": "read by embeddings",
    "inputs_embeds": "the layer's own input by now",
    "token_type_ids": "their effect on attention is in the mask",
    "mm_token_type_ids": "their effect on attention is in the mask",
    "moe_mm_token_type_ids": "chooses experts",
    "position_embeddings": "applied to queries and keys by the layer",
    "encoder_hidden_states": "projected to keys and values by the layer",
    "encoder_attention_mask": "cross-attention gets it as its mask",
    "interpolate_pos_encoding": "read by embeddings",
    "bool_masked_pos": "read by embeddings",
    "image_sizes": "read by the vision tower",
    "image_grid_thw": "read by the vision tower",
    "video_grid_thw": "read by the vision tower",
    "grid_thw": "read by the vision tower",
    "conv_mask": "for convolutions",
    "conv_attention_mask": "for convolutions",
    "mamba_attention_mask": "for state-space layers",
    "padding_cache": "for convolutions",
    "seq_idx": "for state-space layers; attention takes cu_seq_lens_q and cu_seq_lens_k",
}

SPARSE = "load the model with attn_implementation='sdpa' or 'eager', whose mask it puts them into"
# What to do where a keyword that models are known to pass is not served.
INSTEAD: dict[str, str] = {
    "block_indices": SPARSE,
    "sinks": "load the model with attn_implementation='eager': its sinks differ by query",
    "block_table": "pass pages as past_key_values=hf_attn_patch.PagedCache(model)",
    "k_cache": "pass pages as past_key_values=hf_attn_patch.PagedCache(model)",
    "v_cache": "pass pages as past_key_values=hf_attn_patch.PagedCache(model)",
    "head_mask": "load the model with attn_implementation='eager'",
    "learnable_sink": "the keyword of transformers' interface for it is s_aux",
}
DEFAULT_INSTEAD = "leave it out, or load the model with attn_implementation='eager'"


def unserved(names: Iterable[str]) -> str | None:
    """The first of `names` that is neither served nor harmless."""
    return next((n for n in sorted(names) if n not in SERVED and n not in HARMLESS), None)


def refuse_unserved(implementation: str, given: Mapping[str, Any]) -> None:
    """Check what came beside the parameters of an attention function.

    Raises:
        ValueError: a keyword that is not None and not known to be harmless.
    """
    for name, value in given.items():
        if value is not None and name not in HARMLESS:
            raise ValueError(
                f"attn_implementation={implementation!r} got the keyword {name!r}, which it does "
                f"not know and may not ignore. Instead: {INSTEAD.get(name, DEFAULT_INSTEAD)}."
            )
