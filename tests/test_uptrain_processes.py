"""More than one process, on CPUs by gloo: sharded uptraining, tensor-parallel generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny_checkpoints import tiny_checkpoint, weights_of

import hf_attn_patch  # noqa: F401  registers triton_fa2
from hf_attn_converters import convert
from hf_attn_converters.uptrain import UptrainOptions, uptrain

pytest.importorskip("accelerate")

LINES = "".join(f"{n} times {n} is {n * n}, and so on.\n" for n in range(400))
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

SHARDED = """
import os
import hf_attn_patch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from hf_attn_converters.uptrain import UptrainOptions, uptrain
from hf_attn_converters.uptrain.trainer import Uptrainer

step, seen = Uptrainer.training_step, set()

def watched(self, model, *args, **kwargs):
    for module in (model, self.teacher):
        assert isinstance(module, FSDPModule), type(module)
        for weight in module.model.layers.parameters():
            assert isinstance(weight, DTensor) and 2 * len(weight.to_local()) == len(weight)
        seen.add(id(module))
    return step(self, model, *args, **kwargs)

Uptrainer.training_step = watched
result = uptrain(UptrainOptions(**eval(os.environ["OPTIONS"])))
assert len(seen) == 2 and result.record["processes"] == 2
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source with 4 KV heads, its conversion to 2; beside it one to 1, `one`)"""
    folder = tmp_path_factory.mktemp("processes")
    source = tiny_checkpoint(folder / "source", kv_heads=4, tokenizer=True)
    convert(source, folder / "student", num_key_value_heads=2, method="mean")
    convert(source, folder / "one", num_key_value_heads=1, method="mean")
    return source, folder / "student"


def test_two_sharded_processes_learn_what_one_does(
    folders: tuple[Path, Path], tmp_path: Path, fresh_python: Callable[..., Any]
) -> None:
    """FSDP2 by the committed config: the same loss curve to 1e-3, the same weights."""
    (text := tmp_path / "text.txt").write_text(LINES)
    student = folders[1].with_name("one")
    alone = UptrainOptions(
        student=str(student), teacher=str(folders[0]), text=(str(text),),
        output=str(tmp_path / "alone"), tokens=6 * 128, sequence_length=32, batch_size=4,
        evaluations=3, eval_tokens=160, patience=0, learning_rate=1e-2, precision="float32",
        attn_implementation="triton_fa2", device="cpu",
    )  # fmt: skip
    expected = uptrain(alone)
    options = replace(alone, output=str(tmp_path / "two"), batch_size=2)
    script = tmp_path / "script.py"
    script.write_text(SHARDED)
    config = str(ROOT / "scripts/accelerate/fsdp2.yaml")
    launch = ("-m", "accelerate.commands.launch", "--config_file", config)
    plain = {f.name: getattr(options, f.name) for f in fields(options)}
    fresh_python(
        *launch, "--main_process_port", "0", str(script), env={"OPTIONS": repr(plain), **QUIET}
    )
    record = json.loads((tmp_path / "two" / "uptrain.json").read_text())
    for mine, other in zip(record["steps"], expected.record["steps"], strict=True):
        assert mine == pytest.approx(other, rel=1e-3)
    curves = record["train_loss"], expected.record["train_loss"]
    assert record["steps"][0]["kl"] > 1.1 * record["steps"][-1]["kl"]  # there is a curve
    for (_, mine), (_, other) in zip(*curves, strict=True):
        assert mine == pytest.approx(other, rel=1e-3)
    two, one = weights_of(tmp_path / "two"), weights_of(expected.output)
    before = weights_of(student)
    assert two.keys() == one.keys()
    for name in two:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)
    assert any((two[name] - before[name]).abs().max() > 1e-2 for name in two)


GENERATE = """
import json, os, sys
import torch
import hf_attn_patch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

folder, implementation, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation=implementation, tp_plan="auto"
)
key = model.model.layers[0].self_attn.k_proj.weight
assert isinstance(key, DTensor) and len(key.to_local()) == len(key) // 2
ids = torch.arange(2, 26)[None]
mask = torch.ones_like(ids)
tokens = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
if os.environ["RANK"] == "0":
    json.dump(tokens.tolist(), open(out, "w"))
"""


def test_tensor_parallel_generation_writes_the_same(
    folders: tuple[Path, Path], tmp_path: Path, fresh_python: Callable[..., Any]
) -> None:
    """A converted checkpoint with tp_plan="auto" under torchrun: as many heads, half in each."""
    from transformers import AutoModelForCausalLM

    script, out = tmp_path / "generate.py", tmp_path / "tokens.json"
    script.write_text(GENERATE)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    fresh_python(*launch, str(script), str(folders[1]), "triton_fa2", str(out), env=QUIET)
    ids = torch.arange(2, 26)[None]

    def alone(folder: Path) -> list[list[int]]:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="triton_fa2")
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False).tolist()

    assert json.loads(out.read_text()) == alone(folders[1])
    assert alone(folders[0]) != alone(folders[1])  # the text does depend on the heads
