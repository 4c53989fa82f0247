"""The kernels as a repository for the hub: written, loaded by Hugging Face's `kernels`, used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_hub_kernel as tool
import pytest

pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "repository"
    assert tool.main([str(folder)]) == 0
    return folder


def test_every_variant_is_the_whole_package(repository: Path) -> None:
    sources = {p.relative_to(tool.PACKAGE) for p in tool.PACKAGE.rglob("*.py")}
    variants = sorted((repository / "build").iterdir())
    assert [v.name for v in variants] == ["torch-cpu", "torch-cuda", "torch-rocm", "torch-xpu"]
    for folder in variants:
        assert {p.relative_to(folder) for p in folder.rglob("*.py")} == sources
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["id"].isidentifier() and metadata["backend"]["type"] in folder.name


def test_what_is_there_is_not_overwritten(repository: Path, capsys: Any) -> None:
    assert tool.main([str(repository)]) == 2
    assert "exists already" in capsys.readouterr().err


BESIDE = """
import sys
from pathlib import Path
import kernels, torch
import hf_attn_kernels
q, k, v = (torch.randn(2, 9, 4, 16) for _ in range(3))
ours = hf_attn_kernels.flash_attn_func(q, k, v, causal=True)
published = kernels.get_local_kernel(Path(sys.argv[1]))
assert published.__name__ != "hf_attn_kernels"
assert published.flash_attn_func is not hf_attn_kernels.flash_attn_func
theirs = published.flash_attn_func(q, k, v, causal=True)
assert torch.equal(ours, theirs) and not torch.equal(ours, published.flash_attn_func(q, k, v))
latent, rope = torch.randn(2, 9, 32), torch.randn(2, 9, 8)
args = (torch.randn(2, 1, 4, 32), torch.randn(2, 1, 4, 8), latent, rope)
both = [m.mla_decode(*args, softmax_scale=0.2) for m in (hf_attn_kernels, published)]
assert torch.equal(*both)
"""


def test_a_published_copy_stands_beside_the_installed_one(
    repository: Path, fresh_python: Callable[..., Any]
) -> None:
    """Two copies in one process, whose operators must not meet in torch's registry."""
    fresh_python("-c", BESIDE, str(repository))


AS_ATTENTION = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    for p in model.parameters():
        p.normal_(std=0.1)
    ids = torch.randint(3, 60, (2, 17))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("org/hf-attn-kernels", allow_all_kernels=True)
    name = next(n for n in sys.modules if n.startswith("_hf_attn_kernels_cpu_") and "." not in n)
    backends, calls = sys.modules[name + ".dispatch"], []
    load = backends.load
    backends.load = lambda device: calls.append(device) or load(device)
    found = model(ids, attention_mask=mask).logits
assert len(calls) == config.num_hidden_layers
kept = mask.bool()
torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-4)
"""


def test_transformers_takes_it_as_an_attention_implementation(
    repository: Path, fresh_python: Callable[..., Any]
) -> None:
    from transformers.utils import is_kernels_available

    if not is_kernels_available():
        pytest.skip("transformers asks for another version of the kernels library")
    fresh_python(
        "-c", AS_ATTENTION, env={"LOCAL_KERNELS": f"org/hf-attn-kernels={repository / 'build'}"}
    )
