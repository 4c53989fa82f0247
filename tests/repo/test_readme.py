"""What README.md and docs/ print works: Python runs as it stands there, on tiny models; commands
parse; links, files and targets exist."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "AGENTS.md", "CODE_OF_CONDUCT.md")
PAGES = [ROOT / name for name in TOP]
PAGES += [ROOT / folder / "README.md" for folder in ("kernels", "converters", "examples/text")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))

THEIRS = {"tests/test_modeling_common.py"}  # files of transformers that a page names


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page in a language; without one, the shell's."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [body for name, body in found if name == language]


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- Python ---------------------------------------------------------------------------------------


def save_llama(folder: Path, **sizes: int) -> str:
    """A checkpoint of one layer whose tokenizer knows five words and pads with one more."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", "It", "was", "a", "dark", "and"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[UNK]")
    wrapped.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        vocab_size=6,
        **{"num_attention_heads": 2, "num_key_value_heads": 2, **sizes},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def llama(folder: Path) -> dict[str, object]:
    return {"name": save_llama(folder / "model")}


def prompts(folder: Path) -> dict[str, object]:
    return llama(folder) | {"prompts": [[1, 2, 3], [4, 5]]}


def converted(folder: Path) -> dict[str, object]:
    save_llama(folder / "model")
    save_llama(folder / "model-mqa", num_key_value_heads=1)
    (folder / "held_out.txt").write_text("It was a dark and\n\n" * 120)
    return {}


def latents(folder: Path) -> dict[str, object]:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        vocab_size=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    DeepseekV2ForCausalLM(config).save_pretrained(folder / "deepseek")
    return {"name": str(folder / "deepseek")}


def nothing(folder: Path) -> dict[str, object]:
    return {}


def is_a_window_of_64(got: dict[str, Any]) -> bool:
    """The page's own implementation sees what triton_swa sees with that window, and not more."""
    import torch

    from hf_attn_patch import configure_swa

    model, ids = got["model"], torch.randint(6, (1, 100))
    near = model(ids).logits
    model.set_attn_implementation("triton_fa2")
    everything = model(ids).logits
    model.set_attn_implementation("triton_swa")
    configure_swa(model, window=64)
    return torch.equal(near, model(ids).logits) and not torch.allclose(near, everything)


# each page with Python: what it takes as given, and what must then be true
RUN: dict[str, tuple[Callable[[Path], dict[str, object]], Callable[[dict[str, Any]], bool]]] = {
    "README.md": (llama, lambda got: got["model"].config._attn_implementation == "triton_fa2"),
    "docs/index.md": (
        llama,
        lambda got: (
            got["model"].config._attn_implementation == "triton_fa2"
            and got["out"].shape == (1, 63, 4, 64)
        ),
    ),
    "docs/choosing.md": (
        llama,
        lambda got: got["model"].config._attn_implementation == "triton_fa2",
    ),
    "docs/paged-cache.md": (llama, lambda got: got["cache"].get_seq_length() > 20),
    "docs/serving.md": (prompts, lambda got: all(a.is_finished() for a in got["answers"].values())),
    "docs/comparing.md": (converted, lambda got: "<html" in Path("report.html").read_text()),
    "docs/extending/implementation.md": (llama, is_a_window_of_64),
    "docs/mla.md": (latents, lambda got: got["model"].config._attn_implementation == "triton_mla"),
    "docs/reliability.md": (nothing, lambda got: got["hf_attn_kernels"].batch_invariant()),
}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=title)
def test_the_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_attn_kernels import batch_invariant, set_batch_invariant
    from hf_attn_patch.transformers_compat.tables import interfaces

    given, holds = RUN[title(page)]
    names: dict[str, Any] = dict(given(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = batch_invariant()
    for _, table in interfaces():  # what a page registers goes again
        monkeypatch.setitem(table, "triton_near", None)
        monkeypatch.delitem(table, "triton_near")
    try:
        for block in blocks(page, "python"):
            exec(compile(block, title(page), "exec"), names)
        assert holds(names)
    finally:
        set_batch_invariant(before)


# --- commands -------------------------------------------------------------------------------------


def commands(program: str) -> list[Any]:
    """(page, words) of each line in a block that starts so, up to a comment or a redirection."""
    found = []
    for page in PAGES:
        for line in "".join(blocks(page)).splitlines():
            if line.startswith(f"{program} "):
                words = shlex.split(line.partition(" > ")[0], comments=True)
                found.append(pytest.param(words, id=f"{title(page)}: {' '.join(words)}"))
    assert found
    return found


@pytest.mark.parametrize("words", commands("hf-attn"))
def test_the_command_line_takes_it(words: list[str]) -> None:
    import typer.main

    from hf_attn_patch.cli import app

    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands"):  # a group
        command = command.commands[rest.pop(0)]
    command.make_context("hf-attn", rest)  # parses, and runs nothing


class Parsed(Exception):
    """The arguments were understood."""


@pytest.mark.parametrize("words", commands("python"))
def test_the_script_takes_it(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(
        self: argparse.ArgumentParser, args: Any = None, namespace: Any = None
    ) -> NoReturn:
        parse(self, args, namespace)
        raise Parsed

    script = ROOT / words[1]
    assert script.is_file() and ROOT / "scripts" in script.parents
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises(Parsed):
        importlib.import_module(
            words[1].removeprefix("scripts/").removesuffix(".py").replace("/", ".")
        ).main(words[2:])


def test_every_command_is_shown_and_every_target_exists() -> None:
    import typer.main

    from hf_attn_patch.cli import app

    readme = (ROOT / "README.md").read_text()
    shown = set(re.findall(r"^hf-attn (\w+)", readme, re.MULTILINE))
    assert shown == set(typer.main.get_command(app).commands)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.MULTILINE))
        assert named <= targets, page
        assert named or page.name != "CONTRIBUTING.md"


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_what_it_names_is_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https://)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for named in re.findall(r"\b(?:scripts|tests|examples)/[\w/.-]*\w\.(?:py|yaml|ipynb)", text):
        assert (ROOT / named).is_file() or named in THEIRS, named
