"""Tasks of lm-evaluation-harness: by a stand-in, and by itself where it is installed."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_checkpoints import tiny_checkpoint

from hf_attn_converters import convert
from hf_attn_patch.compare import CompareOptions, compare, parse_spec, table
from hf_attn_patch.compare.tasks import measure_tasks
from hf_attn_patch.loading import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source (4 query, 2 KV heads), mqa (one head), text.txt"""
    folder = tmp_path_factory.mktemp("tasks")
    source = tiny_checkpoint(folder / "source", kv_heads=2, tokenizer=True)
    convert(source, folder / "mqa", num_key_value_heads=1, method="mean")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 9)
    return folder


def test_tasks_of_the_harness(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that answers in the harness's form (lm-eval 0.4.13)."""
    asked = []

    def simple_evaluate(model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
        asked.append((model, tasks, options["limit"]))
        row = {"alias": "arc", "acc,none": 0.5 / len(asked), "acc_stderr,none": 0.125,
               "f1,strict": 0.25, "f1_stderr,strict": "N/A"}  # fmt: skip
        return {"results": {"arc": row}}

    package, wrapper = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    wrapper.HFLM = lambda pretrained, tokenizer: pretrained  # type: ignore[attr-defined]
    for name, module in (("lm_eval", package), ("lm_eval.models", ModuleType("lm_eval.models")),
                         ("lm_eval.models.huggingface", wrapper)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    models = [load(parse_spec(f"{folder}/{name}"), label=name) for name in ("source", "mqa")]
    scores = measure_tasks(models, ["arc", "own.yaml"], limit=7)
    assert [m for m, _, _ in asked] == [loaded.model for loaded in models]
    assert asked[0][1:] == (["arc", str(Path("own.yaml").absolute())], 7)
    assert [(s.label, s.metric, s.value, s.error) for s in scores] == [
        ("source", "acc", 0.5, 0.125), ("source", "f1", 0.25, None),
        ("mqa", "acc", 0.25, 0.125), ("mqa", "f1", 0.25, None),
    ]  # fmt: skip
    options = CompareOptions(text=folder / "text.txt", max_tokens=0, new_tokens=0, rounds=0)
    result = compare(f"{folder}/source", [f"{folder}/mqa"], options)
    result = dataclasses.replace(result, tasks=scores)
    body = {name: cells for name, *cells in table(result)[1]}
    assert body["arc, acc"] == ["0.500 ± 0.12", "0.250 ± 0.12 (-0.250)"]


OWN = """
task: own_choice
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
validation_split: validation
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
- metric: acc
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")
def test_a_task_of_ones_own_with_the_harness(folder: Path, tmp_path: Path) -> None:
    """A YAML file and JSON lines beside it; the right answer is what the source itself prefers."""
    models = [load(parse_spec(f"{folder}/{name}"), label=name) for name in ("source", "mqa")]
    source, tokenizer = models[0].model, models[0].tokenizer
    rows = []
    for word in ("fox", "dog", "over", "lazy", "quick", "jumps"):
        logits = source(tokenizer(word, return_tensors="pt")["input_ids"]).logits[0, -1]
        choices = sorted("abcdefgh", key=lambda c: -logits[tokenizer(c)["input_ids"][0]].item())
        rows.append({"question": word, "choices": choices, "answer": 0})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(OWN.format(data=tmp_path / "own.jsonl"))
    scores = measure_tasks(models, [str(tmp_path / "own.yaml")], limit=5)
    assert [(s.label, s.task, s.metric) for s in scores if s.metric == "acc"] == [
        ("source", "own_choice", "acc"), ("mqa", "own_choice", "acc"),
    ]  # fmt: skip
    best, other = (s.value for s in scores if s.metric == "acc")
    assert best == 1 > other
