"""More than one process, on CPUs by gloo: sharded uptraining, tensor-parallel generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny_checkpoints import tiny_checkpoint, weights_of

import hf_attn_patch  # noqa: F401  registers triton_fa2
from hf_attn_converters import convert
from hf_attn_converters.uptrain import UptrainOptions, UptrainResult, uptrain

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


@pytest.fixture(scope="module")
def alone(folders: tuple[Path, Path]) -> UptrainResult:
    """What one process learns, with four rows at once."""
    folder = folders[0].parent
    (text := folder / "text.txt").write_text(LINES)
    options = UptrainOptions(
        student=str(folder / "one"), teacher=str(folders[0]), text=(str(text),),
        output=str(folder / "alone"), tokens=6 * 128, sequence_length=32, batch_size=4,
        evaluations=3, eval_tokens=160, patience=0, learning_rate=1e-2, precision="float32",
        attn_implementation="triton_fa2", device="cpu",
    )  # fmt: skip
    return uptrain(options)


def of_two(alone: UptrainResult, output: Path) -> dict[str, Any]:
    """The same recipe for two processes, two rows each, as plain values."""
    recipe, folder = alone.record["recipe"], alone.output.parent
    places = {"student": str(folder / "one"), "teacher": str(folder / "source")}
    places |= {"text": [str(folder / "text.txt")], "output": str(output)}
    return recipe | places | {"batch_size": 2}


def assert_learned_the_same(output: Path, alone: UptrainResult) -> None:
    """The same losses to 1e-3 at every step that was logged, and the same weights."""
    record = json.loads((output / "uptrain.json").read_text())
    assert record["processes"] == 2
    for mine, other in zip(record["steps"], alone.record["steps"], strict=True):
        assert mine == pytest.approx(other, rel=1e-3)
    curves = record["train_loss"], alone.record["train_loss"]
    assert record["steps"][0]["kl"] > 1.1 * record["steps"][-1]["kl"]  # there is a curve
    for (_, mine), (_, other) in zip(*curves, strict=True):
        assert mine == pytest.approx(other, rel=1e-3)
    two, one, before = map(weights_of, (output, alone.output, alone.output.with_name("one")))
    assert two.keys() == one.keys()
    for name in two:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)
    assert any((two[name] - before[name]).abs().max() > 1e-2 for name in two)


def test_two_sharded_processes_learn_what_one_does(
    alone: UptrainResult, tmp_path: Path, fresh_python: Callable[..., Any]
) -> None:
    """FSDP2 by the committed config: the same loss curve to 1e-3, the same weights."""
    script = tmp_path / "script.py"
    script.write_text(SHARDED)
    config = str(ROOT / "scripts/accelerate/fsdp2.yaml")
    launch = ("-m", "accelerate.commands.launch", "--config_file", config)
    options = {"OPTIONS": repr(of_two(alone, tmp_path / "two"))}
    fresh_python(*launch, "--main_process_port", "0", str(script), env={**options, **QUIET})
    assert_learned_the_same(tmp_path / "two", alone)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_two_whole_processes_learn_what_one_does(
    alone: UptrainResult, tmp_path: Path, fresh_python: Callable[..., Any]
) -> None:
    """DDP: scripts/uptrain.py under plain torchrun, its options from a file, which names no device
    where there is only one."""
    recipe = tmp_path / "recipe.json"
    device = "cpu" if torch.accelerator.is_available() else None
    recipe.write_text(json.dumps(of_two(alone, tmp_path / "two") | {"device": device}))
    done = fresh_python(*TORCHRUN, "scripts/uptrain.py", str(recipe), "--json", env=QUIET)
    assert json.loads(done.stdout)["processes"] == 2  # said once, by one of both
    assert done.stderr.count("768 tokens in 6 steps of 128; about 0:00:") == 1
    assert_learned_the_same(tmp_path / "two", alone)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_of_deepspeed_learn_what_one_does(
    stage: int, alone: UptrainResult, tmp_path: Path, fresh_python: Callable[..., Any]
) -> None:
    """The committed configs, with float32 arithmetic as `alone` has."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(of_two(alone, tmp_path / "two")))
    config = str(ROOT / f"scripts/accelerate/deepspeed_zero{stage}.yaml")
    launch = ("-m", "accelerate.commands.launch", "--config_file", config)
    launch += ("--main_process_port", "0", "--mixed_precision", "no")
    fresh_python(*launch, "scripts/uptrain.py", str(recipe), env=QUIET)
    assert_learned_the_same(tmp_path / "two", alone)


def test_control_another_batch_learns_otherwise(alone: UptrainResult, tmp_path: Path) -> None:
    """What the tests above compare does depend on which rows make a step."""
    options = of_two(alone, tmp_path / "two")
    other = uptrain(UptrainOptions(**options | {"text": tuple(options["text"])}))
    ours, theirs = (result.record["steps"][-1]["kl"] for result in (other, alone))
    assert ours != pytest.approx(theirs, rel=1e-2)


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
    fresh_python(*TORCHRUN, str(script), str(folders[1]), "triton_fa2", str(out), env=QUIET)
    ids = torch.arange(2, 26)[None]

    def alone(folder: Path) -> list[list[int]]:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="triton_fa2")
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False).tolist()

    assert json.loads(out.read_text()) == alone(folders[1])
    assert alone(folders[0]) != alone(folders[1])  # the text does depend on the heads
