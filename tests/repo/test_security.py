"""What a checkpoint, an archive or an index from a stranger can do here: nothing.

Pickles that run code, indexes that leave their folder: test_convert_bad_input.py and
test_convert_fuzz.py. What the page shows of models and prompts: test_compare_page.py.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_checkpoints import edit_config, tiny_checkpoint
from typer.testing import CliRunner
from upstream.fetch import LARGEST, unpack

from hf_attn_converters import convert
from hf_attn_patch.cli import app

Fresh = Callable[..., "subprocess.CompletedProcess[str]"]

# --- network --------------------------------------------------------------------------------------

# Every way out is shut and watched.
WATCHED = """
import socket, sys
tried = []

def refuse(what):
    def door(*args, **kwargs):
        tried.append((what, args[-1] if args else None))
        raise OSError("no network in this test")
    return door

class Watched(socket.socket):
    def connect(self, address):
        if self.family != socket.AF_UNIX:
            refuse("connect")(address)
        return super().connect(address)
    connect_ex = connect

socket.socket, socket.getaddrinfo = Watched, refuse("getaddrinfo")
socket.create_connection = refuse("create_connection")
"""
COMMANDS = """
from typer.testing import CliRunner
from hf_attn_patch.cli import app
model, text, out = sys.argv[1:]
for line in (
    "list",
    f"check {model} --device cpu",
    f"estimate {model} --device h200",
    f"generate {model} --prompt the --max-new-tokens 2",
    f"convert {model} {out} -n 1 --method csvd --calibration-text {text} --verify",
    f"compare {model} {out} --text {text} --max-tokens 300 --rounds 0 --report {out}.html",
):
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, (line, result.output, result.exception)
assert not tried, tried
"""


def test_no_command_looks_for_a_network(tmp_path: Path, fresh_python: Fresh) -> None:
    """Given folders, nothing asks the hub, although nothing says offline."""
    model = tiny_checkpoint(tmp_path / "a", heads=4, kv_heads=2, tokenizer=True)
    text = tmp_path / "text.txt"
    text.write_text("words that somebody spoke before an audience. " * 300)
    code = tmp_path / "watched.py"
    code.write_text(WATCHED + COMMANDS)
    fresh_python(str(code), str(model), str(text), str(tmp_path / "b"), env={"HF_HUB_OFFLINE": "0"})


def test_negative_control_a_lookup_is_seen(fresh_python: Fresh) -> None:
    fresh_python(
        WATCHED + "from huggingface_hub import HfApi\n"
        "try:\n    HfApi().model_info('nobody/nothing', timeout=1)\n"
        "except Exception:\n    pass\n"
        "assert tried",
        env={"HF_HUB_OFFLINE": "0"},
    )


@pytest.mark.parametrize("file", ["checkpoints.txt", "their_tests.txt"])
def test_every_download_is_pinned_by_hash(file: str) -> None:
    lines = (ROOT / "constraints" / file).read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted
    for line in wanted:
        assert re.fullmatch(r"[\w.-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line), line


# --- code of a checkpoint -------------------------------------------------------------------------

EVIL = """
import pathlib
pathlib.Path({place!r}).write_text("ran")
from .configuration_bert_gqa import BertGqaConfig
"""


def with_code(folder: Path, place: Path, **auto_map: str) -> Path:
    """Puts code into a checkpoint's folder, and its name into the config."""
    (folder / "evil.py").write_text(EVIL.format(place=str(place)))
    known = json.loads((folder / "config.json").read_text()).get("auto_map", {})
    edit_config(folder, auto_map={**known, **auto_map})
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "check {model}",
        "estimate {model} --device h200",
        "generate {model} --prompt the --max-new-tokens 1",
        "compare {model} {model} --text {text} --max-tokens 300 --rounds 0",
        "convert {model} {out} -n 1 --method mean --verify",
    ],
    ids=lambda command: command.split()[0],
)
def test_code_of_a_checkpoint_is_not_run(command: str, tmp_path: Path) -> None:
    place, text = tmp_path / "ran", tmp_path / "text.txt"
    text.write_text("words that somebody spoke before an audience. " * 300)
    model = tiny_checkpoint(tmp_path / "a", heads=4, kv_heads=2, tokenizer=True)
    with_code(
        model, place, AutoConfig="evil.BertGqaConfig", AutoModelForCausalLM="evil.BertGqaConfig"
    )
    filled = command.format(model=model, text=text, out=tmp_path / "b")
    CliRunner().invoke(app, filled.split())  # it may refuse, or do without
    assert not place.exists()


# the converters alone: where hf_attn_patch is imported its own classes come first
ALONE = """
import sys
from hf_attn_converters import convert
try:
    convert(sys.argv[1], sys.argv[2], num_key_value_heads=4, verify=True)
except (ValueError, RuntimeError):
    pass
"""


def test_our_code_beside_foreign_code(tmp_path: Path, fresh_python: Fresh) -> None:
    """Our own files are in the folder to the letter, but the config names another."""
    place, code = tmp_path / "ran", tmp_path / "alone.py"
    code.write_text(ALONE)
    source = tiny_checkpoint(tmp_path / "a", family="bert", kv_heads=4)
    convert(source, tmp_path / "b", num_key_value_heads=2, method="mean")
    with_code(tmp_path / "b", place, AutoConfig="evil.BertGqaConfig")
    fresh_python(str(code), str(tmp_path / "b"), str(tmp_path / "c"))
    assert not place.exists()


# --- archives -------------------------------------------------------------------------------------


def hostile(path: Path) -> Path:
    """An archive that tries to write where it should not."""

    def add(name: str, data: bytes = b"evil", **kind: object) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for key, value in kind.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(path, "w:gz") as tar:
        add("t-1/tests/test_good.py", b"good")
        add("t-1/tests/../escaped.py")
        add("../tests/escaped.py")
        add("/tmp/tests/escaped.py")
        add("t-1/tests/../../../escaped.py")
        add("t-1/tests/deep/test_deep.py")
        add("t-1/tests/notes.txt")
        add("t-1/tests/link.py", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("t-1/tests/hard.py", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd")
        add("t-1/tests/device.py", b"", type=tarfile.CHRTYPE)
    return path


def test_an_archive_stays_in_its_folder(tmp_path: Path) -> None:
    before = {p.name for p in Path("/tmp").glob("*escaped*")}
    (tmp_path / "in" / "deep").mkdir(parents=True)
    unpack(hostile(tmp_path / "t-1.tar.gz"), tmp_path / "in" / "deep" / "tests")
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"t-1.tar.gz", "in/deep/tests/test_good.py"}
    assert {p.name for p in Path("/tmp").glob("*escaped*")} == before
    assert not Path("/tmp/tests/escaped.py").exists()


@pytest.mark.parametrize("what", ["empty", "huge", "another"])
def test_an_archive_that_is_not_what_it_should_be(what: str, tmp_path: Path) -> None:
    path = tmp_path / ("t-2.tar.gz" if what == "another" else "t-1.tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("t-1/tests/test_huge.py")
        info.size = LARGEST + 1 if what == "huge" else 0
        if what != "empty":
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(ValueError):
        unpack(path, tmp_path / "tests")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
