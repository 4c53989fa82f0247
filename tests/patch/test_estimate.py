"""The estimate: parameters and caches against real models, formulas by hand, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import TINY, tiny_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

from hf_attn_converters import convert
from hf_attn_patch.cli import app
from hf_attn_patch.compare.speed import cache_bytes
from hf_attn_patch.estimate import (
    DEVICES,
    Device,
    Layer,
    Shape,
    beside,
    estimate,
    find_device,
    kv_head_choices,
    read_shape,
)

CHIP = Device(
    name="chip", title="Chip", tflops=100, float32_tflops=10, gbytes_s=1000, gbytes=10, source="-"
)
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "dtype": "float32",
}  # fmt: skip
DECODERS = [
    name
    for name, tiny in TINY.items()
    if tiny.auto == "AutoModelForCausalLM" and name not in ("falcon_mha", "falcon_mha_parallel")
]


def saved(folder: Path, model_type: str, **values: Any) -> Path:
    AutoConfig.for_model(model_type, **(SMALL | values)).save_pretrained(folder)
    return folder


TOWER: dict[str, Any] = {
    "depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
}  # fmt: skip


def test_qwen2_vl_has_a_cache_and_a_tower(tmp_path: Path) -> None:
    """Of its decoder the cache, and the weights that a token reads; all weights take memory."""
    text = SMALL | {"num_hidden_layers": 28, "num_key_value_heads": 4, "head_dim": 8}
    config = AutoConfig.for_model(
        "qwen2_vl", text_config=text, vision_config=TOWER, dtype="float32"
    )
    config.save_pretrained(tmp_path)
    found = read_shape(str(tmp_path))
    assert found.kv_bytes_per_token == 28 * 2 * 4 * 8 * 4
    model = AutoModelForImageTextToText.from_config(config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.model.visual.parameters()) > 1000
    decoder = sum(p.numel() for p in model.model.language_model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    assert found.layer_parameters == decoder - embedding
    assert found.model_type == "qwen2_vl" and not found.left_out


def test_qwen2_vl_of_7b(tmp_path: Path) -> None:
    text = {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
        "tie_word_embeddings": False,
    }  # fmt: skip
    config = AutoConfig.for_model(
        "qwen2_vl", text_config=text, vision_config={"hidden_size": 3584}, dtype="bfloat16",
        tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = read_shape(str(tmp_path), "bfloat16")
    assert found.kv_bytes_per_token == 57_344
    assert found.parameters == 8_291_375_616  # as the Hub counts Qwen2-VL-7B


@torch.inference_mode()
def test_layers_of_different_heads(tmp_path: Path) -> None:
    """gemma4's full layers have wider heads; cache and arithmetic follow layer by layer."""
    config = AutoConfig.for_model(
        "gemma4_text", **SMALL, sliding_window=16, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        layer_types=["sliding_attention"] * 3 + ["full_attention"], global_head_dim=24,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = read_shape(str(tmp_path))
    model = AutoModelForCausalLM.from_config(config)
    cache = model(torch.arange(8)[None]).past_key_values
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert found.kv_bytes(8) == held
    widths = [layer.k_dim + layer.v_dim for layer in found.layers]
    assert widths == [16, 16, 16, 48]
    products = 2 * 4 * 100 * sum(widths[:3]) * 0.16 + 2 * 4 * 100 * 48
    others = 2 * (found.layer_parameters + found.head_parameters)
    assert estimate(found, CHIP, batch=1, context=100).decode.flops == others + products


def test_layers_that_read_images_cache_no_text(tmp_path: Path) -> None:
    saved(tmp_path, "mllama_text_model", cross_attention_layers=[1], pad_token_id=0)
    whole = AutoConfig.for_model(
        "mllama",
        text_config=json.loads((tmp_path / "config.json").read_text()),
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 16,
            "intermediate_layers_indices": [0],
        },
    )  # fmt: skip
    whole.save_pretrained(tmp_path)
    found = read_shape(str(tmp_path))
    assert [layer.cached for layer in found.layers] == [32, 0, 32, 32]


def test_a_tower_that_needs_another_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder alone is estimated then, and that is said."""
    text = AutoConfig.for_model("llama", **SMALL)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    AutoConfig.for_model("llava", text_config=text, vision_config=tower).save_pretrained(tmp_path)
    whole = read_shape(str(tmp_path))

    def absent(*args: Any, **options: Any) -> None:
        raise ImportError("needs the timm library")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_config", absent)
    found = read_shape(str(tmp_path))
    assert found.parameters < whole.parameters
    assert found.layer_parameters == whole.layer_parameters
    assert found.left_out == "needs the timm library"
    result = CliRunner().invoke(app, ["estimate", str(tmp_path)])
    assert "the decoder's weights only: needs the timm library" in result.stdout


@pytest.mark.parametrize("model_type", ["mamba", "rwkv", "blt"])
def test_models_without_attention_heads(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no decoder with attention"):
        read_shape(str(tmp_path))


def shape(**changes: Any) -> Shape:
    """Two layers of 4 query and 2 KV heads, 1000 parameters in layers, 100 in the head."""
    values: dict[str, Any] = {
        "name": "m", "model_type": "llama", "dtype": "bfloat16", "element_size": 2,
        "query_heads": 4, "qk_dim": 8, "v_dim": 8, "hidden": 32,
        "layers": (Layer(kv_heads=2, k_dim=8, v_dim=8),) * 2, "latent": False,
        "parameters": 1100, "layer_parameters": 1000, "head_parameters": 100,
        "expert_parameters": 0, "experts": 0, "experts_used": 0,
    }  # fmt: skip
    return Shape(**(values | changes))


@pytest.mark.parametrize("family", DECODERS)
def test_parameters_and_cache_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / family, family=family)
    found = read_shape(str(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if family != "gemma3":  # whose images count for its class, not for its text
        assert found.parameters == sum(p.numel() for p in model.parameters())
    out = model(torch.arange(2, 9)[None], use_cache=True)
    held = cache_bytes(out.past_key_values)
    if family.startswith("falcon"):  # transformers keeps Falcon's heads repeated
        assert held is not None and found.kv_bytes(7) <= held
    else:
        assert found.kv_bytes(7) == held


@pytest.mark.parametrize(
    ("model_type", "values", "windows"),
    [
        ("llama", {}, [None] * 4),
        ("mistral", {"sliding_window": 5}, [5] * 4),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": False}, [None] * 4),
        ("gemma2", {"sliding_window": 5}, [5, None, 5, None]),
        ("gpt_oss", {"sliding_window": 6, "num_local_experts": 4}, [6, None, 6, None]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_windows_by_layer(
    model_type: str, values: dict[str, Any], windows: list[int | None], tmp_path: Path
) -> None:
    found = read_shape(str(saved(tmp_path, model_type, **values)))
    assert [layer.window for layer in found.layers] == windows
    per_token = 2 * 2 * 8 * found.element_size
    seen = sum(20 if w is None else w for w in windows)
    assert found.kv_bytes(20) == per_token * seen


def test_layers_that_share_keys_and_values(tmp_path: Path) -> None:
    sizes = {"num_kv_shared_layers": 2, "sliding_window": 5, "vocab_size_per_layer_input": 64,
             "hidden_size_per_layer_input": 8, "laurel_rank": 4,
             "layer_types": ["sliding_attention", "full_attention"] * 2,
             "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4}  # fmt: skip
    found = read_shape(str(saved(tmp_path, "gemma3n_text", **sizes)))
    assert [layer.shared for layer in found.layers] == [False, False, True, True]
    assert found.kv_bytes(20) == 4 * 2 * 2 * 8 * (5 + 20)


def test_a_latent_cache_is_counted_as_one(tmp_path: Path) -> None:
    sizes = {
        "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "q_lora_rank": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    }  # fmt: skip
    found = read_shape(str(saved(tmp_path, "deepseek_v3", **sizes)))
    assert found.latent and kv_head_choices(found) == []
    assert found.kv_bytes_per_token == 4 * 4 * (16 + 4)  # layers, float32
    assert (found.experts, found.experts_used) == (4, 2)
    assert found.expert_parameters == 3 * 4 * 3 * 32 * 16  # MoE layers, experts, matrices


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_other_numbers_of_kv_heads_are_what_a_conversion_writes(heads: int, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", kv_heads=2)
    imagined = read_shape(str(source)).with_kv_heads(heads)
    if heads == 2:
        assert imagined == read_shape(str(source))
        return
    convert(source, tmp_path / "out", num_key_value_heads=heads)
    real = read_shape(str(tmp_path / "out"))
    assert (imagined.parameters, imagined.layers) == (real.parameters, real.layers)
    assert imagined.layer_parameters == real.layer_parameters


class TestFormulas:
    def test_decode(self) -> None:
        e = estimate(shape(), CHIP, batch=3, context=10).decode
        assert e.flops == 3 * (2 * 1100 + 2 * 4 * 16 * 10 * 2)
        assert e.bytes == 2 * 1100 + 3 * 2 * (2 * 2 * 16) * 10
        assert e.compute_seconds == pytest.approx(e.flops / 100e12)
        assert e.memory_seconds == pytest.approx(e.bytes / 1e12)
        assert e.seconds == e.memory_seconds and e.bound == "memory"
        assert e.intensity == e.flops / e.bytes and e.tokens == 3

    def test_prefill(self) -> None:
        e = estimate(shape(), CHIP, batch=1, context=10).prefill
        assert e.flops == 2 * 1000 * 10 + 2 * 100 + 2 * 4 * 16 * 55 * 2
        assert e.bytes == 2 * 1100 + 2 * 64 * 10

    @pytest.mark.parametrize("window", [1, 3, 10, 50])
    def test_a_window_bounds_pairs_and_cache(self, window: int) -> None:
        layers = (Layer(kv_heads=2, k_dim=8, v_dim=8, window=window),) * 2
        e = estimate(shape(layers=layers), CHIP, batch=1, context=10)
        pairs = sum(min(i, window) for i in range(1, 11))
        assert e.prefill.flops == 2 * 1000 * 10 + 200 + 2 * 4 * 16 * pairs * 2
        assert e.kv_bytes == 2 * 64 * min(window, 10)

    def test_shared_layers_hold_nothing_and_read(self) -> None:
        own = Layer(kv_heads=2, k_dim=8, v_dim=8)
        layers = (own, Layer(kv_heads=2, k_dim=8, v_dim=8, shared=True))
        e = estimate(shape(layers=layers), CHIP, batch=1, context=10)
        alone = estimate(shape(layers=(own,)), CHIP, batch=1, context=10)
        assert e.kv_bytes == alone.kv_bytes == 10 * e.kv_bytes_per_token
        assert e.decode.bytes == alone.decode.bytes + e.kv_bytes

    def test_experts_are_read_once_met(self) -> None:
        moe = shape(expert_parameters=800, experts=8, experts_used=2)
        one, many = (estimate(moe, CHIP, batch=b, context=1).decode for b in (1, 200))
        cache = 2 * 64
        assert one.bytes == pytest.approx(2 * (1100 - 600) + cache)
        assert many.bytes == pytest.approx(2 * 1100 + 200 * cache)
        assert one.flops == 2 * (1000 - 600 + 100) + 2 * 4 * 16 * 2

    def test_the_largest_batch_is_the_last_that_fits(self) -> None:
        e = estimate(shape(parameters=10**9, hidden=1), CHIP, batch=1, context=10_000)
        room = 0.9 * 10e9 - 2e9
        assert e.largest_batch * e.kv_bytes <= room < (e.largest_batch + 1) * e.kv_bytes
        assert estimate(shape(parameters=10**10), CHIP, batch=1, context=10).largest_batch == 0

    def test_fewer_heads_are_never_slower(self) -> None:
        found = [estimate(shape().with_kv_heads(n), CHIP, batch=8, context=100) for n in (4, 2, 1)]
        steps = [e.decode.seconds for e in found]
        assert steps == sorted(steps, reverse=True) and len(set(steps)) == 3

    @pytest.mark.parametrize("sizes", [{"batch": 0, "context": 1}, {"batch": 1, "context": 0}])
    def test_nothing_to_estimate(self, sizes: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="1 or more"):
            estimate(shape(), CHIP, **sizes)


class TestDevices:
    def test_the_table_is_sound(self) -> None:
        for name, device in DEVICES.items():
            assert name == device.name and device.source
            assert device.tflops > device.float32_tflops > 1
            assert 100 < device.gbytes_s < 20_000 and 10 < device.gbytes < 500
            assert device.flops_s(2) == 1e12 * device.tflops
            assert device.flops_s(4) == 1e12 * device.float32_tflops

    def test_a_cpu_is_measured(self) -> None:
        found = find_device("cpu")
        assert found.source == "measured now"
        assert 0.001 < found.float32_tflops < 100 and 0.5 < found.gbytes_s < 5000

    def test_an_unknown_one_lists_the_known(self) -> None:
        with pytest.raises(ValueError, match=r"'h1000' is unknown; possible: .*mi300x, cpu"):
            find_device("h1000")


class TestRefused:
    @pytest.mark.parametrize("family", ["bert", "t5"])
    def test_what_has_no_decoder(self, family: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="decoder"):
            read_shape(str(tiny_checkpoint(tmp_path / family, family=family)))

    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot read"):
            read_shape(str(tmp_path / "ghost"))

    def test_layers_that_cache_something_else(self, tmp_path: Path) -> None:
        folder = saved(tmp_path, "qwen2")
        config = json.loads((folder / "config.json").read_text())
        config["layer_types"] = ["full_attention"] * 3 + ["heavily_compressed_attention"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="heavily_compressed_attention"):
            read_shape(str(folder))

    def test_unknown_dtype(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="float7"):
            read_shape(str(saved(tmp_path, "llama")), "float7")


RUN = {"label": "m@sdpa", "batch": 2, "context": 10, "new_tokens": 4, "prefill_tokens_s": 50.0,
       "decode_tokens_s": 20.0}  # fmt: skip


class TestBeside:
    def write(self, tmp_path: Path, value: object) -> Path:
        (tmp_path / "run.json").write_text(json.dumps(value))
        return tmp_path / "run.json"

    def test_the_same_batch_and_context(self, tmp_path: Path) -> None:
        others = [RUN | {"label": "m2"}, RUN | {"decode_tokens_s": None}]
        [row] = beside(shape(), CHIP, self.write(tmp_path, {"sweep": [RUN, *others]}))
        assert (row.batch, row.context, row.decode_measured) == (2, 10, 20.0)
        expected = estimate(shape(), CHIP, batch=2, context=12).decode.tokens_s
        assert row.decode_estimated == expected

    @pytest.mark.parametrize(
        ("value", "says"),
        [([], "no output of"), ({"sweep": [{}]}, "no output of"), ({"sweep": []}, "none at all"),
         ({"sweep": [RUN | {"label": "other"}]}, "it has other")],
    )  # fmt: skip
    def test_other_files(self, value: object, says: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=says):
            beside(shape(), CHIP, self.write(tmp_path, value))

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="does not exist"):
            beside(shape(), CHIP, tmp_path / "run.json")


class TestCommand:
    def run(self, *words: object) -> str:
        result = CliRunner().invoke(app, ["estimate", *map(str, words)])
        assert result.exit_code == 0, result.output
        return result.stdout

    def test_without_weights(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "m", "gemma2", sliding_window=5)
        assert [path.name for path in folder.iterdir()] == ["config.json"]
        text = self.run(folder, "--device", "h200", "--context", 100)
        assert "2 with a window of 5" in text and "2 (now)" in text and "H200" in text
        assert self.run(folder / "config.json").splitlines()[0] == text.splitlines()[0]

    def test_json(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "m", "llama")
        run = tmp_path / "run.json"
        run.write_text(json.dumps({"sweep": [RUN]}))
        data = json.loads(self.run(folder, "--batch", 2, "--measured", run, "--json"))
        assert [e["kv_heads"] for e in data["estimates"]] == [4, 2, 1]
        assert data["model"]["kv_heads"] == 2 and data["batch"] == 2
        assert data["estimates"][1]["decode"]["seconds"] > 0
        assert data["measured"][0]["decode_measured"] == 20

    def test_misuse(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["estimate", str(tmp_path / "ghost")])
        assert result.exit_code == 2 and "cannot read" in result.stderr
