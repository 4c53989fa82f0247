"""README.md's Python runs as it stands there, on a tiny model; its links and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md")]
PAGES += [ROOT / "converters" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def tiny_checkpoint(tmp_path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", "It", "was", "a", "dark", "and"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 6}
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_examples_run(tiny_checkpoint):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    names = {"name": tiny_checkpoint}
    for block in blocks:
        exec(block, names)
    assert names["model"].config._attn_implementation == "triton_swa"
    assert callable(names["flash_attn_func"])


def test_the_commands_exist():
    import typer.main

    from hf_attn_patch.cli import app

    commands = set(typer.main.get_command(app).commands)
    shown = set(re.findall(r"^hf-attn (\w+)", README, re.MULTILINE))
    assert shown == commands
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.MULTILINE))
        assert named <= targets, page
        assert named or page.name != "CONTRIBUTING.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https://)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
