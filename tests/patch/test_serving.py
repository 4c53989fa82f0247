"""transformers' own server over triton_paged_flash2, asked as an OpenAI client asks."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "tiny-llama-mha"
SERVE = ROOT / "scripts" / "serve.py"
NEEDED = ("fastapi", "uvicorn", "openai")
QUESTIONS = ("The king", "In the beginning", "It was a truth", "And God said unto him")

needs_server = pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDED),
    reason="transformers[serving] is not installed",
)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    lines: list[str]

    def ask(self, question: str, **options: Any) -> Any:
        """The answer to a chat request: a dict, or the list of a stream's events."""
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 12,
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            json.dumps(body | options).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            if not options.get("stream"):
                return json.load(answer)
            events = [line.decode().removeprefix("data: ").strip() for line in answer]
            return [json.loads(event) for event in events if event and event != "[DONE]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's checkpoint with a chat template that is nothing but the words."""
    target = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(FIXTURE, target)
    (target / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    return target


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    options = ["--device", "cpu", "--dtype", "float32", "--pages", "32", "--page-size", "16"]
    command = [sys.executable, str(SERVE), str(folder), "--port", str(port), *options]
    command += ["--max-batch-tokens", "64"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    found = Server(process, f"http://localhost:{port}", [])
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: found.lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    deadline = time.monotonic() + 300
    while not any("is served with triton_paged_flash2" in line for line in found.lines):
        assert process.poll() is None and time.monotonic() < deadline, "".join(found.lines)
        time.sleep(0.1)
    try:
        yield found
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def wanted(folder: Path, question: str) -> str:
    """What eager attention and generate() answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    ids = torch.tensor([tokenizer(question)["input_ids"]])
    out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


@needs_server
def test_answers_are_eagers(server: Server, folder: Path) -> None:
    """One after the other, all at once, and streamed."""
    expected = [wanted(folder, question) for question in QUESTIONS]
    assert len(set(expected)) > 1
    assert [text(server.ask(question)) for question in QUESTIONS] == expected
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        assert [text(answer) for answer in pool.map(server.ask, QUESTIONS)] == expected
    events = server.ask(QUESTIONS[0], stream=True)
    pieces = [
        choice["delta"].get("content") or "" for event in events for choice in event["choices"]
    ]
    assert len([piece for piece in pieces if piece]) > 3, "not streamed"
    assert "".join(pieces) == expected[0]
    assert any("CB: True" in line for line in server.lines), "without continuous batching"


@needs_server
def test_a_bad_request_does_not_stop_the_server(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError, match="400"):
        server.ask("?", model="another")
    assert text(server.ask(QUESTIONS[1]))


def test_page_size_is_checked_before_anything_is_loaded() -> None:
    done = subprocess.run(
        [sys.executable, str(SERVE), "nowhere", "--page-size", "24"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "multiple of 16" in done.stderr
