"""The families that the converter tests go through, each with what is tried on it."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import tiny_checkpoint, tiny_config

from hf_attn_converters import convert

merge = functools.partial(convert, method="mean")
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family of TINY: expanded from `low` to `high` KV heads, and merged from `high` to 1."""

    tiny: str
    low: int = 2
    high: int = 4
    merge_first: bool = False  # the source has all heads, and comes to `low` by merging
    after: str = ""  # model_type of the expanded checkpoint, when another than the source's
    cache: bool = True


CASES = [
    *(
        Case(tiny=name)
        for name in (
            "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
            "gemma3", "phi", "phi_normed", "phi3", "starcoder2", "olmo2", "falcon",
        )
    ),
    Case(tiny="falcon_mqa", low=1, high=2),
    Case(tiny="falcon_mqa_serial", low=1),
    Case(tiny="falcon_mha", low=1, merge_first=True),
    Case(tiny="falcon_mha_parallel", low=2, merge_first=True),
    Case(tiny="gpt2", low=1, merge_first=True, after="gpt_bigcode"),
    Case(tiny="gpt_bigcode", low=1),
    Case(tiny="gpt_bigcode_mha", low=1, merge_first=True),
    Case(tiny="bert", merge_first=True, cache=False),
    Case(tiny="roberta", merge_first=True, cache=False),
    Case(tiny="albert", merge_first=True, cache=False),
]  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.tiny)
REFUSED = ("gpt_neox", "opt", "t5")


def config_of(tiny: str) -> dict[str, Any]:
    return json.loads(tiny_config(tiny).to_json_string(use_diff=False))


def low_checkpoint(case: Case, folder: Path) -> Path:
    source = tiny_checkpoint(folder / "source", family=case.tiny, kv_heads=case.low)
    if not case.merge_first:
        return source
    merge(source, folder / "low", num_key_value_heads=case.low)
    return folder / "low"


def read(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)
