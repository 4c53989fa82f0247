"""Uptraining's parts: the loss and the memory it takes, packed rows, plateau, record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import VOCAB, byte_tokenizer, tiny_checkpoint
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from hf_attn_converters.io.text import read_documents
from hf_attn_converters.uptrain import data, recovered
from hf_attn_converters.uptrain import loss as losses
from hf_attn_converters.uptrain.callbacks import waited
from hf_attn_converters.uptrain.data import PackedRows, write_rows
from hf_attn_converters.uptrain.memory import Need, check_fits, in_one_memory
from hf_attn_converters.uptrain.record import card_with, steps_of

# --- the loss -------------------------------------------------------------------------------------


def made(tokens: int = 37, width: int = 51) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [T, V], teacher [T, V], targets [T], some of them not to be predicted)"""
    logits, teacher = 3 * torch.randn(tokens, width), 3 * torch.randn(tokens, width)
    targets = torch.randint(width, (tokens,))
    targets[::5] = losses.IGNORED
    return logits.requires_grad_(), teacher, targets


def plain(logits: Tensor, teacher: Tensor, targets: Tensor, kl_weight: float) -> Tensor:
    """The same loss by torch's own functions, over all at once, in float64."""
    logits, teacher = logits.double(), teacher.double()
    kept = targets != losses.IGNORED
    log_q, log_p = log_softmax(logits[kept], -1), log_softmax(teacher[kept], -1)
    kl = kl_div(log_q, log_p, log_target=True, reduction="sum")
    ce = cross_entropy(logits[kept], targets[kept], reduction="sum")
    return (kl_weight * kl + (1 - kl_weight) * ce) / 29


@pytest.mark.parametrize("kl_weight", [1.0, 0.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 51 * 8, 1 << 22], ids=["one-token", "8-tokens", "whole"])
def test_loss_and_gradient(monkeypatch: pytest.MonkeyPatch, kl_weight: float, chunk: int) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    logits, teacher, targets = made()
    [expected] = torch.autograd.grad(value := plain(logits, teacher, targets, kl_weight), logits)
    loss = losses.distillation_loss(logits, teacher.clone(), targets, kl_weight=kl_weight, count=29)
    [found] = torch.autograd.grad(2 * loss, logits)
    torch.testing.assert_close(loss.double(), value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, 2 * expected.float(), atol=1e-6, rtol=1e-5)
    assert not found[targets == losses.IGNORED].any()
    other = losses.distillation_loss(
        logits, teacher, targets.roll(1), kl_weight=kl_weight, count=29
    )
    assert not torch.isclose(other.double(), value, rtol=1e-3)  # the check can fail


def test_losses_of_tokens_are_those_of_the_sum() -> None:
    logits, teacher, targets = made()
    found = losses.token_losses(logits, teacher, targets)
    assert found.shape == (37, 3) and not found[targets == losses.IGNORED].any()
    kl, ce, source = found.sum(0).double().tolist()
    assert kl == pytest.approx(29 * plain(logits, teacher, targets, 1).item(), rel=1e-5)
    assert ce == pytest.approx(29 * plain(logits, teacher, targets, 0).item(), rel=1e-5)
    assert source == pytest.approx(29 * plain(teacher, teacher, targets, 0).item(), rel=1e-5)
    assert losses.token_losses(logits, None, targets)[1, [0, 2]].isnan().all()


def test_a_teacher_in_another_dtype_is_left_alone() -> None:
    logits, teacher, targets = made()
    half = teacher.bfloat16()
    losses.distillation_loss(logits, half, targets, kl_weight=1.0, count=29).backward()
    assert torch.equal(half, teacher.bfloat16())
    [expected] = torch.autograd.grad(plain(logits, half, targets, 1.0), logits)
    torch.testing.assert_close(logits.grad, expected.float(), atol=1e-6, rtol=1e-5)


class Large(TorchDispatchMode):
    """Counts the tensors of `size` bytes or more that are made, views apart."""

    def __init__(self, size: int, *known: Tensor) -> None:
        super().__init__()
        self.size, self.count = size, 0
        self.known = {x.untyped_storage().data_ptr() for x in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= self.size:
                place = x.untyped_storage().data_ptr()
                self.count += place not in self.known
                self.known.add(place)
        return out


def test_no_second_copy_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward make nothing as large as the logits: the teacher's become the slope."""
    logits, teacher, targets = made(64, 1000)
    monkeypatch.setattr(losses, "CHUNK", 4 * 1000)
    with Large(4 * logits.numel(), logits, teacher) as ours:
        loss = losses.distillation_loss(logits, teacher, targets, kl_weight=1.0, count=29)
        torch.autograd.grad(loss, logits)
    with Large(4 * logits.numel(), logits, teacher) as whole:
        torch.autograd.grad(plain(logits, teacher, targets.clamp(min=0), 1.0), logits)
    assert ours.count == 0
    assert whole.count > 3  # the same count sees what the plain way makes


# --- packed rows ----------------------------------------------------------------------------------


def packed(folder: Path, *texts: str, length: int = 16, **more: Any) -> list[PackedRows]:
    """(to train on, held out)"""
    paths = []
    for number, text in enumerate(texts):
        paths.append(str(folder / f"{number}.txt"))
        Path(paths[-1]).write_text(text)
    given = {"eval_text": None, "rows": 1000, "eval_rows": 3, "seed": 0} | more
    files = folder / "rows", folder / "eval"
    write_rows(*files, tuple(paths), tokenizer=byte_tokenizer(), length=length, **given)
    return [PackedRows(path, length) for path in files]


def test_rows_hold_the_documents(tmp_path: Path) -> None:
    (tmp_path / "eval.txt").write_text("held out " * 9)
    texts = [f"{n} one two three four five" for n in range(8)]
    rows, held_out = packed(tmp_path, *texts, eval_text=str(tmp_path / "eval.txt"))
    ids = [token for row in rows for token in row["input_ids"].tolist()]
    assert sorted(byte_tokenizer().decode(ids).split("</s>")[:-1]) == sorted(texts)[: len(texts)]
    assert len(rows) == sum(len(t) + 1 for t in texts) // 16 and len(held_out) == 3
    for row in rows:
        begins = (row["position_ids"] == 0).nonzero()[:, 0]
        assert begins[0] == 0
        before = row["input_ids"][begins[1:] - 1]
        assert (before == 1).all()  # a document ends where the next begins
        assert (row["labels"][begins] == losses.IGNORED).all()
        others = row["position_ids"] > 0
        assert torch.equal(row["labels"][others], row["input_ids"][others])


def test_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    lines = "".join(f"line {n:05}\n" for n in range(2000))
    rows, held_out = packed(tmp_path, lines, length=32, eval_rows=8)
    decode = byte_tokenizer().decode
    found = [
        {decode(row["input_ids"][i : i + 5]) for row in part for i in range(28)}
        for part in (rows, held_out)
    ]
    numbers = [{word for word in words if word.isdigit()} for words in found]
    assert len(held_out) == 8 and len(numbers[1]) > 8
    assert not numbers[0] & numbers[1]


def test_a_seed_gives_an_order(tmp_path: Path) -> None:
    text = "".join(f"line {n}\n" for n in range(900))
    first, again, other = (
        packed(tmp_path, text, seed=seed)[0].rows[:].copy() for seed in (3, 3, 4)
    )
    assert (first == again).all() and (first[:9] != other[:9]).any()


def test_documents_of_one_row_do_not_see_each_other(tmp_path: Path) -> None:
    """With ours and with transformers' own attention; without position_ids they do (control)."""
    from transformers import AutoModelForCausalLM

    import hf_attn_patch  # noqa: F401

    folder = tiny_checkpoint(tmp_path / "m")
    ids = torch.randint(2, VOCAB, (2, 24))
    changed = ids.clone()
    changed[:, 3] += 1  # in the first document
    places = torch.cat([torch.arange(9), torch.arange(15)]).expand(2, -1)
    for name in ("triton_fa2", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)

        def second(tokens: Tensor, model: Any = model, **kwargs: Any) -> Tensor:
            return model(input_ids=tokens, use_cache=False, **kwargs).logits[:, 9:]

        assert torch.equal(second(ids, position_ids=places), second(changed, position_ids=places))
        assert not torch.allclose(second(ids), second(changed), atol=1e-4)
        torch.testing.assert_close(second(ids, position_ids=places), model(ids[:, 9:]).logits)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_documents_of_files(tmp_path: Path, kind: str) -> None:
    texts = ["first", "second\nline", "  ", "third"]
    path = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    else:
        pytest.importorskip("datasets").Dataset.from_dict({"text": texts}).to_parquet(path)
    assert list(read_documents(path)) == ["first", "second\nline", "third"]


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """A dataset whose second shard cannot be read."""
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": f"{n} one two three four five"}) for n in range(8)]
    (tmp_path / "data" / "train-00000-of-00002.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "data" / "train-00001-of-00002.jsonl").write_text("no JSON\n")
    (tmp_path / "data" / "validation-00000-of-00001.jsonl").write_text('{"text": "held out"}\n')
    return str(tmp_path)


def test_a_dataset_is_streamed(dataset: str) -> None:
    """Documents come before what follows them is read; a split is chosen by its name."""
    documents = read_documents(dataset)
    assert [next(documents)[:5] for _ in range(3)] == ["0 one", "1 one", "2 one"]
    with pytest.raises(Exception, match="JSON"):  # the control: all of it cannot be read
        list(documents)
    assert list(read_documents(f"{dataset}:validation")) == ["held out"]
    with pytest.raises(ValueError, match="neither a text file nor a dataset"):
        list(read_documents(f"{dataset}:ghost"))


def test_rows_of_a_dataset(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing reads no further than rows and shuffling ask for."""
    monkeypatch.setattr(data, "BUFFER", 4)
    files = tmp_path / "rows", tmp_path / "eval"
    write_rows(*files, (dataset,), f"{dataset}:validation", byte_tokenizer(),
               length=8, rows=3, eval_rows=1, seed=0)  # fmt: skip
    rows, held_out = (PackedRows(file, 8) for file in files)
    assert len(rows) == 3 and len(held_out) == 1
    assert byte_tokenizer().decode(held_out[0]["input_ids"]) == "held out"


def test_a_text_shorter_than_one_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"too short: \d+ tokens to .*, one row takes 64"):
        packed(tmp_path, "nothing much", length=64)


# --- the rest -------------------------------------------------------------------------------------


def test_a_plateau() -> None:
    assert waited([3.0, 2.0, 1.0], 0.01) == 0
    assert waited([3.0, 2.0, 1.999, 2.5, 1.99], 0.01) == 3
    assert waited([3.0, 2.0, 1.999, 1.97], 0.01) == 0
    assert waited([2.0, 2.0], 0.0) == 1


def test_what_does_not_fit() -> None:
    check_fits(Need(student=5, teacher=4), 9, "the CPU")
    with pytest.raises(ValueError, match=r"teacher \(6\.00 GB\).*2\.50 GB more than the 8\.00 GB"):
        check_fits(Need(student=int(4.5e9), teacher=int(6e9)), int(8e9), "the CPU")


@pytest.mark.parametrize(
    ("sharded_by", "on_cpu", "expected"),
    [
        ("", False, Need(student=800, teacher=400)),  # whole in each process
        ("", True, Need(student=1600, teacher=800)),  # whole twice in one memory
        ("FSDP", False, Need(student=200, teacher=100)),
        ("FSDP", True, Need(student=400, teacher=200)),
        ("DEEPSPEED 2", False, Need(student=200, teacher=400)),
        ("DEEPSPEED 3", False, Need(student=200, teacher=100)),
    ],
)
def test_what_processes_take(
    sharded_by: str, on_cpu: bool, expected: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four processes on two machines."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    name, _, stage = sharded_by.partition(" ")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    if stage:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    assert in_one_memory(Need(student=800, teacher=400), on_cpu=on_cpu) == expected


def test_recovered() -> None:
    assert recovered(3.0, 2.25, 2.0) == 75
    assert recovered(2.0, 1.9, 2.0) is None


def test_steps_are_the_evaluations() -> None:
    log = [
        {"eval_loss": 2.0, "eval_kl": 2.0, "eval_ppl": 9.0, "step": 0},
        {"loss": 1.0, "step": 5},
        {"eval_loss": 1.0, "eval_kl": 1.0, "eval_ppl": 5.0, "step": 5},
    ]
    assert steps_of(log, 100) == [
        {"step": 0, "tokens": 0, "loss": 2.0, "kl": 2.0, "ppl": 9.0},
        {"step": 5, "tokens": 500, "loss": 1.0, "kl": 1.0, "ppl": 5.0},
    ]


def test_the_cards_section_is_replaced() -> None:
    step = {"step": 0, "tokens": 0, "ppl": 9.0, "kl": 1.0}
    record = {
        "student": "s", "teacher": "t", "recipe": {"train": "all", "loss": "kl"}, "tokens": 7,
        "text": ["a|b"], "steps": [step], "made_by": "x",
    }  # fmt: skip
    card = card_with("# Mine\n\nwords", "s", record)
    assert card.startswith("# Mine\n\nwords\n\n") and "a\\|b" in card
    again = card_with(card, "s", record | {"tokens": 88})
    assert again.count("## Uptraining") == 1 and "88 tokens" in again and "7 tokens" not in again
