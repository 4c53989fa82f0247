"""BERT, RoBERTa and ALBERT with fewer KV heads: from the folder alone, and registered."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    assert_same_logits,
    load,
    logits_of,
    some_tokens,
    tiny_checkpoint,
)
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

import hf_attn_patch  # noqa: F401  (registers the classes)
from hf_attn_converters import convert
from hf_attn_converters.models import ENCODERS

each_family = pytest.mark.parametrize("family", sorted(ENCODERS))


@pytest.fixture(scope="module", params=sorted(ENCODERS))
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four query heads and two KV heads, and its source beside it as `source`."""
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny_checkpoint(folder / "source", family=request.param, tokenizer=True)
    convert(source, folder / "gqa", num_key_value_heads=2, method="mean")
    return folder / "gqa"


FRESH = """
import sys, torch, transformers
assert not any(name.startswith("hf_attn") for name in sys.modules)
model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert not any(name.startswith("hf_attn") for name in sys.modules)
ids = torch.tensor([[2, 7, 11, 13]])
with torch.inference_mode():
    print(model(ids).logits.double().sum().item())
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert tokenizer("abc").input_ids
model.save_pretrained(sys.argv[2])
again = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[2], trust_remote_code=True)
with torch.inference_mode():
    assert torch.equal(model(ids).logits, again(ids).logits)
"""


def test_from_the_folder_alone(converted: Path, fresh_python, tmp_path: Path) -> None:
    """A process that cannot import this project loads it, saves it, and loads it again."""
    script = tmp_path / "alone.py"
    script.write_text(FRESH)
    env = {"PYTHONPATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = fresh_python(
        "-I", str(script), str(converted), str(tmp_path / "again"), env=env, cwd=tmp_path
    )
    with torch.inference_mode():
        ours = load(converted)(torch.tensor([[2, 7, 11, 13]])).logits.double().sum().item()
    assert abs(float(done.stdout.split()[-1]) - ours) < 1e-4


def test_without_remote_code_where_hf_attn_patch_is(converted: Path, tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(converted)
    assert type(model).__module__.startswith("hf_attn_converters.models.")
    assert model.config.num_key_value_heads == 2
    model.save_pretrained(tmp_path / "again")
    assert_same_logits(logits_of(tmp_path / "again"), logits_of(converted))
    # saved again, it still takes its code along
    code = {path.name for path in (tmp_path / "again").glob("*.py")}
    assert code == {path.name for path in converted.glob("*.py")}


IMPORTS = {
    "ours-then-config-table": "import hf_attn_patch\nfrom transformers import AutoConfig",
    "ours-then-bert": "import hf_attn_patch\nfrom transformers import BertForMaskedLM",
    "bert-then-ours": "from transformers import BertForMaskedLM\nimport hf_attn_patch",
}


@pytest.mark.parametrize("imports", IMPORTS)
def test_registration_survives_any_order_of_imports(imports: str, fresh_python) -> None:
    """transformers imports its tables halfway through BERT's file: no class may be needed then."""
    use = """
import transformers
for name in ("bert_gqa", "roberta_gqa", "albert_gqa"):
    config = transformers.AutoConfig.for_model(
        name, num_attention_heads=4, num_key_value_heads=2, hidden_size=8, vocab_size=9,
        intermediate_size=4, num_hidden_layers=1)
    model = transformers.AutoModelForTokenClassification.from_config(config)
    [weight] = [w for n, w in model.named_parameters() if "key.weight" in n]
    assert weight.shape == (4, 8) and 0.005 < weight.std() < 0.04, weight.std()
"""
    fresh_python(f"{IMPORTS[imports]}\n{use}")


def test_importing_hf_attn_patch_imports_no_torch(fresh_python) -> None:
    fresh_python("import hf_attn_patch, sys; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("implementation", ["sdpa", "triton_fa2"])
def test_every_attention_agrees_with_eager(implementation: str, converted: Path) -> None:
    """With padding, and with weights on request: transformers' own switches all work."""
    ids, mask = some_tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    mask[2, 1:] = 0
    eager = load(converted, attn_implementation="eager")
    other = load(converted, attn_implementation=implementation)
    with torch.inference_mode():
        expected = eager(ids, attention_mask=mask, output_attentions=True)
        got = other(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected.logits[mask.bool()], atol=2e-5, rtol=0)
    assert len(expected.attentions) == 2
    assert all(weights.shape == (3, 4, 12, 12) for weights in expected.attentions)


def test_the_attention_is_grouped(converted: Path) -> None:
    """Each KV head is read by its own two neighbours: the same as the stock class on all heads."""
    ours = load(converted)
    convert(converted, converted.parent / "all", num_key_value_heads=4)
    stock = load(converted.parent / "all")
    assert type(stock).__module__.startswith("transformers.models.")
    ids = some_tokens()
    with torch.inference_mode():
        assert_same_logits(ours(ids).logits, stock(ids).logits)
        crossed = copy.deepcopy(ours)  # control: KV heads exchanged
        for name, parameter in crossed.named_parameters():
            if ".key." in name:
                parameter.copy_(parameter.unflatten(0, (2, 8)).flip(0).flatten(0, 1))
        assert (crossed(ids).logits - stock(ids).logits).abs().max() > 1e-3


def test_there_and_back_is_stock_again(converted: Path, tmp_path: Path) -> None:
    """All KV heads again: transformers' model_type and class, none of our files."""
    convert(converted, tmp_path / "stock", num_key_value_heads=4)
    source = json.loads((converted.parent / "source" / "config.json").read_text())
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config == source | {"tokenizer_class": config["tokenizer_class"]}
    names = {path.name for path in (tmp_path / "stock").iterdir()}
    origin = {path.name for path in (converted.parent / "source").iterdir()}
    assert names - origin <= {"conversion.json", "README.md"}
    before = load_file(converted.parent / "source" / "model.safetensors")
    after = load_file(tmp_path / "stock" / "model.safetensors")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}


def test_ours_to_ours(converted: Path, tmp_path: Path) -> None:
    convert(converted, tmp_path / "one", num_key_value_heads=1, method="mean")
    model = load(tmp_path / "one")
    keys = [p for n, p in model.named_parameters() if "key.weight" in n]
    assert keys and all(key.shape == (8, 32) for key in keys)
    assert {p.name for p in converted.glob("*.py")} == {p.name for p in tmp_path.glob("one/*.py")}


def test_training_reaches_the_new_projections(converted: Path) -> None:
    model = load(converted).train()
    ids = some_tokens()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if ".key.weight" in name or ".value.weight" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_bert_used_as_a_decoder_keeps_a_narrow_cache(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", family="bert", is_decoder=True)
    convert(source, tmp_path / "b", num_key_value_heads=1, method="mean")
    model = AutoModel.from_pretrained(tmp_path / "b", add_pooling_layer=False)
    ids = some_tokens(1, 8)
    with torch.inference_mode():
        whole = model(ids).last_hidden_state
        first = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert rest.past_key_values.layers[0].keys.shape == (1, 1, 8, 8)
    torch.testing.assert_close(rest.last_hidden_state, whole[:, 5:], atol=1e-5, rtol=1e-5)


@each_family
def test_every_head_of_the_table(family: str, tmp_path: Path) -> None:
    """Each class: saved by transformers, converted, mapped, loaded by its auto class."""
    encoder = ENCODERS[family]
    base = tiny_checkpoint(tmp_path / "base", family=family)
    config = AutoConfig.from_pretrained(base, num_labels=3)
    autos = {ours: auto for auto, ours in encoder.auto_classes.items()}
    for stock, ours in encoder.architectures.items():
        model = getattr(transformers, stock)._from_config(config)
        model.save_pretrained(tmp_path / stock)
        plan = convert(tmp_path / stock, tmp_path / ours, num_key_value_heads=2, method="mean").plan
        assert plan.model_type_after == encoder.ours
        written = json.loads((tmp_path / ours / "config.json").read_text())
        assert written["architectures"] == [ours]
        loaded, info = getattr(transformers, autos[ours]).from_pretrained(
            tmp_path / ours, output_loading_info=True
        )
        assert type(loaded).__name__ == ours
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@each_family
def test_the_code_imports_nothing_of_ours(family: str) -> None:
    from hf_attn_converters.models import source_of

    files = ENCODERS[family].files
    for file in files:
        lines = [line for line in source_of(file).splitlines() if "import" in line.split()]
        assert lines and not any("hf_attn" in line for line in lines)
    assert not any("hf_attn" in source_of(file) for file in files)


def test_tokenizer_where_nothing_names_its_class(tmp_path: Path) -> None:
    """Old BERT folders leave it to model_type, which is ours now."""
    source = tiny_checkpoint(tmp_path / "a", family="bert")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    (source / "vocab.txt").write_text("\n".join(words))
    expected = AutoTokenizer.from_pretrained(source)("abc de")
    convert(source, tmp_path / "b", num_key_value_heads=1, method="mean")
    found = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert found("abc de").input_ids == expected.input_ids
    assert type(found) is type(AutoTokenizer.from_pretrained(source))


def test_a_config_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="num_key_value_heads=3 cannot serve"):
        AutoConfig.for_model("bert_gqa", num_attention_heads=4, num_key_value_heads=3)


def test_old_albert_checkpoints_with_a_tied_copy(tmp_path: Path) -> None:
    """The decoder's copy of the embeddings, which transformers 3 saved, does no harm."""
    source = tiny_checkpoint(tmp_path / "a", family="albert")
    tensors = load_file(source / "model.safetensors")
    embeddings = tensors["albert.embeddings.word_embeddings.weight"]
    tensors["predictions.decoder.weight"] = embeddings.clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "b", num_key_value_heads=2, method="mean")
    convert(tmp_path / "b", tmp_path / "c", num_key_value_heads=4)
    assert_same_logits(logits_of(tmp_path / "c"), logits_of(tmp_path / "b"))
