"""triton_mla in two processes on CPUs (gloo): each has half of the heads, both have the latents."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mla_specs import EXPERTS, OURS, spec
from tiny_models import TinyModel, build
from torch import Tensor

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
NEW = 24
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# families whose tensor-parallel plan in transformers splits the latent attention
MODELS = [
    spec("MiniCPM3", q_lora_rank=16, scale_depth=4.0),  # else attention hardly matters
    spec("DeepseekV2", q_lora_rank=None, **EXPERTS | {"first_k_dense_replace": 2}),
]

GENERATE = """
import json, os, sys
import torch
import hf_attn_patch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

folder, out, NEW = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation="triton_mla", tp_plan="auto"
)
weight = model.model.layers[0].self_attn.kv_b_proj.weight
assert isinstance(weight, DTensor) and len(weight.to_local()) == len(weight) // 2
ids, mask = torch.load(folder + "/ids.pt")
found = {}
for name, cache in (("dynamic", None), ("paged", hf_attn_patch.PagedCache(model))):
    with torch.no_grad():
        tokens = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, past_key_values=cache
        )
    found[name] = tokens.tolist()
if os.environ["RANK"] == "0":
    json.dump(found, open(out, "w"))
"""


def padded_ids() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids.masked_fill(mask == 0, 0), mask


def greedy(model: Any) -> list[list[int]]:
    ids, mask = padded_ids()
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("tiny", MODELS, ids=lambda s: s.id)
def test_two_processes_write_what_one_does(
    tiny: TinyModel, tmp_path: Path, fresh_python: Callable[..., Any]
) -> None:
    model = build(tiny, "eager")
    model.save_pretrained(tmp_path / "model")
    torch.save(padded_ids(), tmp_path / "model" / "ids.pt")
    script, out = tmp_path / "generate.py", tmp_path / "tokens.json"
    script.write_text(GENERATE)
    fresh_python(*TORCHRUN, str(script), str(tmp_path / "model"), str(out), str(NEW), env=QUIET)
    expected = greedy(model)
    assert json.loads(out.read_text()) == {"dynamic": expected, "paged": expected}

    model = copy.deepcopy(model)
    model.set_attn_implementation(OURS)
    for layer in model.model.layers:  # the second process's heads, were they the first's
        weight = layer.self_attn.kv_b_proj.weight.data
        weight[len(weight) // 2 :] = weight[: len(weight) // 2].clone()
    assert greedy(model) != expected
