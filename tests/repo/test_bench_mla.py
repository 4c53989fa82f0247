"""The benchmark of a latent layer's decoding step: what is timed is right, rows say what it was."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import bench_mla
import pytest
import torch

from hf_attn_patch.bench import mla

TINY: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}


def test_every_contender_gives_the_same_step() -> None:
    step = mla.make_step(33, torch.float32, **TINY)
    with torch.inference_mode():
        for method in (step.attention, step.layer):
            ours, *others = (method(name) for name in (mla.OURS, *mla.PEERS))
            assert ours.abs().max() > 1e-3
            for other in others:
                torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)


def test_rows(tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "rows.csv"
    rows = mla.run(keys=(20, 40), dtypes=("bf16",), out=out, budget_s=0.05, say=said.append, **TINY)
    assert len(said) == 4 and said[0].startswith("bf16 20 keys, attention: ")
    assert [(row["impl"], row["seq_k"]) for row in rows[:3]] == [
        (name, "20") for name in (mla.OURS, *mla.PEERS)
    ]
    assert len(rows) == 12 and all(float(row["p50_ms"]) > 0 for row in rows)
    # 24 latents and 8 rotated numbers of 2 bytes
    assert {row["extra"] for row in rows} == {
        f"MLA {what}; cache 64 B/token" for what in ("attention", "layer")
    }
    with out.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mla.Step.attention

    def off(self: mla.Step, name: str) -> torch.Tensor:
        return right(self, name) * (1.001 if name == mla.OURS else 1.0)

    monkeypatch.setattr(mla.Step, "attention", off)
    with pytest.raises(RuntimeError, match="not timed: error"):
        mla.run(keys=(20,), dtypes=("fp32",), budget_s=0.05, **TINY)


def test_the_script_refuses_an_unknown_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_mla.main(["--dtypes", "fp8"]) == 2
    assert "dtype 'fp8' is not possible; possible: fp32, bf16" in capsys.readouterr().err
