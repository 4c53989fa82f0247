"""Conversions to latents end to end: the command, its record, resuming, fitting, uptraining."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mla_conversions import EXACT, QUICK, distance, load, source, to_latents
from tiny_checkpoints import contents, edit_config, tiny_checkpoint, weights_of
from typer.testing import CliRunner

from hf_attn_converters import convert
from hf_attn_converters.calibration import Calibration
from hf_attn_converters.calibration.fit import FitSettings
from hf_attn_patch.cli import app

FIT = FitSettings(steps=128, step_tokens=64, attention_lr=5e-3, other_lr=1e-3)
WORDS = "".join(f"The {i}th line of a text that says little.\n" for i in range(200))


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def options(rank: int = 17, rope: int = 16) -> list[object]:
    return ["--to", "mla", "--kv-lora-rank", rank, "--qk-rope-head-dim", rope]


def test_the_command_with_text_fits_and_says_what_it_did(tmp_path: Path) -> None:
    folder = source(tmp_path / "a", tokenizer=True, shard_size="20KB")
    (tmp_path / "words.txt").write_text(WORDS)
    result = command(
        folder, tmp_path / "b", *options(9, 8), "--calibration-text", tmp_path / "words.txt",
        "--calibration-tokens", 1024, "--fit-steps", 2, "--verify", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["model_type_after"], told["method"]) == ("deepseek_v3", "mla+fit")
    assert (told["kv_lora_rank"], told["qk_rope_head_dim"]) == (9, 8)
    # two layers, float32: K and V of two heads of 8 before, 9 + 8 columns after
    assert told["kv_bytes_per_token_before"] == 2 * 4 * 32
    assert told["kv_bytes_per_token_after"] == 2 * 4 * 17
    weights = weights_of(tmp_path / "b")
    assert told["bytes_after"] == sum(x.nbytes for x in weights.values())
    assert told["tensors"] == len(weights)
    assert 0 < told["verification"]["kl"] < 1
    card = (tmp_path / "b" / "README.md").read_text()
    assert "2 → latents of 9 and rotated keys of 8 columns, for all heads together" in card
    assert "`llama` → `deepseek_v3`" in card and "256 → 136" in card
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()


def test_a_dry_run_tells_the_sizes_and_writes_nothing(tmp_path: Path) -> None:
    folder = source(tmp_path / "a", family="qwen2")
    dry = command(folder, tmp_path / "b", *options(), "--dry-run")
    assert dry.exit_code == 0 and "latent of 17, rotated key of 16" in dry.stdout
    told = json.loads(command(folder, tmp_path / "b", *options(), "--dry-run", "--json").stdout)
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.partial").exists()
    assert told["method"] == "mla" and told["dry_run"]
    to_latents(folder, tmp_path / "b", *EXACT.values())
    assert told["bytes_after"] == sum(x.nbytes for x in weights_of(tmp_path / "b").values())


@pytest.mark.parametrize("stop_at", ["survey of layer 1", "layer 0", "layer 1"])
@pytest.mark.parametrize("method", ["mla", "mla+fit"])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    method: str, stop_at: str, tmp_path: Path
) -> None:
    folder = source(tmp_path / "a", layers=3)
    how = {"method": method, "calibration": replace(QUICK, fit=replace(FIT, steps=3))}
    to_latents(folder, tmp_path / "one" / "b", 9, 8, **how)

    def stop(done: int, total: int, what: str) -> None:
        if what == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_latents(folder, tmp_path / "b", 9, 8, layer_progress=stop, **how)
    assert not (tmp_path / "b").exists()
    if stop_at.startswith("layer"):
        with pytest.raises(ValueError, match=r"latents: \[9, 8\] then, \[9, 6\] now"):
            to_latents(folder, tmp_path / "b", 9, 6, resume=True, **how)
    to_latents(folder, tmp_path / "b", 9, 8, resume=True, **how)
    assert contents(tmp_path / "b") == contents(tmp_path / "one" / "b")


def test_the_fit_comes_nearer(tmp_path: Path) -> None:
    folder = source(tmp_path / "a", kv_heads=4)
    settings = replace(QUICK, tokens=8192, fit=FIT)
    closed = to_latents(folder, tmp_path / "b", 9, 8)
    fitted = to_latents(
        folder, tmp_path / "c", 9, 8, method="mla+fit", calibration=settings, verify=True
    )
    assert distance(folder, fitted) < 0.9 * distance(folder, closed)
    record = json.loads((fitted / "conversion.json").read_text())
    assert all(0 < error < 1 for error in record["calibration"]["errors"])
    assert record["verification"]["round_trip"] == "none: heads became latents"


def test_the_result_can_be_uptrained(tmp_path: Path) -> None:
    """Only the attention's weights move, and the distance to the teacher falls."""
    from hf_attn_converters.uptrain import UptrainOptions, uptrain

    folder = source(tmp_path / "a", kv_heads=4, tokenizer=True)
    (tmp_path / "words.txt").write_text(WORDS)
    calibration = Calibration(text=tmp_path / "words.txt", tokens=1024, sequence_length=32)
    student = to_latents(folder, tmp_path / "b", 5, 4, calibration=calibration)
    done = uptrain(
        UptrainOptions(
            student=student, teacher=folder, text=(str(tmp_path / "words.txt"),),
            output=tmp_path / "c", tokens=4096, sequence_length=32, batch_size=4,
            learning_rate=3e-3, train="attention", evaluations=1, precision="float32",
        )
    )  # fmt: skip
    steps = done.record["steps"]
    assert steps[-1]["kl"] < 0.8 * steps[0]["kl"]
    before, after = weights_of(student), weights_of(tmp_path / "c")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("self_attn" in name for name in moved)
    assert {n.partition("self_attn.")[2] for n in moved} >= {
        "q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "o_proj.weight"
    }  # fmt: skip
    load(tmp_path / "c")


BAD_SIZES = {
    "rank-too-large": ((26, 8), "possible with qk_rope_head_dim 8: 2 to 25"),
    "rank-of-one": ((1, 8), "2 to 25"),
    "rope-too-large": ((9, 18), "even numbers from 2 to 16"),
    "rope-odd": ((9, 7), "even numbers from 2 to 16"),
    "rope-of-none": ((9, 0), "even numbers from 2 to 16"),
}


@pytest.mark.parametrize("name", BAD_SIZES)
def test_sizes_that_cannot_be(name: str, tmp_path: Path) -> None:
    sizes, says = BAD_SIZES[name]
    result = command(source(tmp_path / "a"), tmp_path / "b", *options(*sizes))
    assert result.exit_code == 2 and says in result.stderr, result.output
    assert not (tmp_path / "b").exists()


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "latents-already": (
        {"model_type": "deepseek_v3", "kv_lora_rank": 512}, "caches latents already"
    ),
    "unknown-family": ({"model_type": "bloom"}, "possible: llama, mistral, qwen2"),
    "mlp-bias": ({"mlp_bias": True}, "mlp_bias=True"),
    "dynamic-rope": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"
    ),
    "longrope": ({"rope_scaling": {"type": "longrope"}}, "'longrope'"),
    "heads-that-do-not-divide": ({"num_attention_heads": 3, "num_key_value_heads": 2}, "divide"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_sources_that_cannot_be_converted(name: str, tmp_path: Path) -> None:
    changes, says = BAD_CONFIGS[name]
    folder = tiny_checkpoint(tmp_path / "a", **({"heads": 3} if "divide" in name else {}))
    edit_config(folder, **changes)
    before = contents(folder)
    result = command(folder, tmp_path / "b", *options(9, 8))
    assert result.exit_code == 2, result.output
    assert says in result.stderr, result.output
    assert contents(folder) == before and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        pytest.param("qwen3", {}, "qwen3 cannot take latents", id="key-norms"),
        pytest.param("mistral", {"sliding_window": 8}, "sliding_window=8", id="window"),
        pytest.param("qwen2", {"use_sliding_window": True}, "use_sliding_window=True", id="qwen2"),
    ],
)
def test_families_and_windows_that_have_no_latents(
    family: str, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "a", family=family, **settings)
    result = command(folder, tmp_path / "b", *options(9, 8))
    assert result.exit_code == 2 and says in result.stderr, result.output
    assert "convert its KV heads instead: --num-key-value-heads" in result.stderr
    if family == "mistral":  # absent, transformers takes a window of 4096
        edit_config(folder, drop=("sliding_window",))
        assert "sliding_window=4096" in command(folder, tmp_path / "b", *options(9, 8)).stderr


MISUSE: dict[str, tuple[list[object], str]] = {
    "neither": ([], "--to mla"),
    "no-sizes": (["--to", "mla"], "needs --kv-lora-rank and --qk-rope-head-dim"),
    "no-rope": (["--to", "mla", "--kv-lora-rank", 9], "needs --qk-rope-head-dim"),
    "sizes-without-mla": (["-n", 1, "--kv-lora-rank", 9], "--kv-lora-rank goes with --to mla"),
    "heads-with-mla": ([*options(), "-n", 1], "--num-key-value-heads goes with --to heads"),
    "grouping": ([*options(), "--group-heads"], "--group-heads goes with --to heads"),
    "method-of-heads": ([*options(), "--method", "csvd"], "possible: mla, mla+fit"),
    "method-of-latents": (["-n", 1, "--method", "mla"], "unknown merge method 'mla'"),
    "another-form": (["--to", "gqa"], "possible: 'heads', 'mla'"),
    "devices": ([*options(), "--tensor-parallel-size", 3], "4 query heads cannot be split"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_options_that_do_not_go_together(name: str, tmp_path: Path) -> None:
    arguments, says = MISUSE[name]
    result = command(source(tmp_path / "a"), tmp_path / "b", *arguments, "--dry-run")
    assert result.exit_code == 2 and says in result.stderr, result.output


def test_convert_refuses_the_same(tmp_path: Path) -> None:
    folder = source(tmp_path / "a")
    with pytest.raises(ValueError, match="needs --kv-lora-rank"):
        convert(folder, tmp_path / "b", to="mla")
