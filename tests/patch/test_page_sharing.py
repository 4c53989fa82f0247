"""Pages are shared, and found again, only where they hold what the model would compute now.

Right is what eager attention gives with a DynamicCache; each test also has its control: plain rows
of equal tokens do share.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny_models import EVERY, LLAMA_LIKE, VOCAB, _fill, assert_close, build, tokens
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from hf_attn_patch import PagedCache
from hf_attn_patch.cache.inputs import CACHE_NAMES, cache_name

SPECS = {spec.id: spec for spec in EVERY}
LLAMA = SPECS["llama"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
PROMPT = tokens(1, 40)
TWICE, NEXT = PROMPT.expand(2, -1), tokens(2, 1, seed=9)


def pair(name: str = "llama", ours: str = "triton_fa2") -> tuple[Any, Any]:
    """(ours, eager), with the same weights and nobody else's."""
    spec = SPECS[name]
    return tuple(copy.deepcopy(build.__wrapped__(spec, n)) for n in (ours, "eager"))  # type: ignore[return-value]


def same_tokens(ours: Any, eager: Any, cache: PagedCache, inputs: dict[str, Any]) -> None:
    found = ours.generate(**inputs, past_key_values=cache, **GREEDY)
    assert torch.equal(found, eager.generate(**inputs, **GREEDY))


def found_again(ours: Any, eager: Any, cache: PagedCache, ids: Tensor = PROMPT) -> int:
    """Columns that start() finds of a prompt, whose tokens are then eager's."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    column = cache.start(**inputs)
    same_tokens(ours, eager, cache, inputs)
    return column


def test_nothing_else_means_shared() -> None:
    """Control for all that follows."""
    ours, eager = pair()
    cache = PagedCache(ours)
    same_tokens(ours, eager, cache, {"input_ids": TWICE})
    assert cache.stats().shared == 2
    assert found_again(ours, eager, cache) == 32
    # what was generated is found too
    longer = torch.cat([eager.generate(PROMPT, max_new_tokens=30, min_new_tokens=30), PROMPT], 1)
    ours.generate(PROMPT, past_key_values=PagedCache(ours), **GREEDY)
    cache.start(input_ids=PROMPT)
    ours.generate(PROMPT, past_key_values=cache, max_new_tokens=30, min_new_tokens=30)
    assert found_again(ours, eager, cache, longer) == 64


# -- what comes in beside ids ---------------------------------------------------------------------

ROPE_LATER = torch.stack([torch.arange(40), torch.arange(40) + 50])
LEFT = torch.zeros(2, 45, dtype=torch.long)
LEFT[0, 5:] = LEFT[1, 3:43] = 1
LEFT[1, 43:] = 1
SHIFTED = torch.zeros(2, 45, dtype=torch.long)
SHIFTED[0, 5:], SHIFTED[1, 3:43], SHIFTED[1, 43:] = PROMPT[0], PROMPT[0], tokens(1, 2, seed=4)[0]
LONGER = torch.cat([LEFT, torch.ones(2, 1, dtype=torch.long)], 1)

TWO_STEPS: dict[str, tuple[str, dict[str, Tensor], dict[str, Tensor]]] = {
    "positions": (
        "llama",
        {"input_ids": TWICE, "position_ids": ROPE_LATER},
        {"input_ids": NEXT, "position_ids": ROPE_LATER[:, -1:] + 1},
    ),
    "columns are positions": (
        "llama",
        {"input_ids": SHIFTED, "attention_mask": LEFT},
        {"input_ids": NEXT, "attention_mask": LONGER},
    ),
    "columns are learned positions": (
        "gpt2",
        {"input_ids": SHIFTED, "attention_mask": LEFT},
        {"input_ids": NEXT, "attention_mask": LONGER},
    ),
    "token types": (
        "gpt2",
        {"input_ids": TWICE, "token_type_ids": torch.tensor([[3], [9]]).expand(-1, 40)},
        {"input_ids": NEXT, "token_type_ids": torch.tensor([[3], [9]])},
    ),
}


@pytest.mark.parametrize("case", TWO_STEPS)
def test_two_rows_of_one_text(case: str) -> None:
    name, prompt, step = TWO_STEPS[case]
    ours, eager = pair(name)
    for given in (prompt, {k: x[:, : x.shape[1]] for k, x in prompt.items()}):
        caches = (PagedCache(ours), DynamicCache())
        with torch.no_grad():
            for model, cache in zip((ours, eager), caches, strict=True):
                model(**given, past_key_values=cache, use_cache=True)
            logits = [
                model(**step, past_key_values=cache, use_cache=True).logits
                for model, cache in zip((ours, eager), caches, strict=True)
            ]
        assert_close(*logits)
        assert caches[0].stats().shared == 0  # type: ignore[attr-defined]
        assert caches[0].start(input_ids=PROMPT) == 0  # type: ignore[attr-defined]


def test_embeddings_of_the_caller() -> None:
    """Without ids nothing is known, and with ids beside earlier ones nothing is found."""
    ours, eager = pair()
    states = torch.randn(2, 40, 48, generator=torch.Generator().manual_seed(0))
    caches = (PagedCache(ours), DynamicCache())
    with torch.no_grad():
        for model, cache in zip((ours, eager), caches, strict=True):
            model(inputs_embeds=states, past_key_values=cache, use_cache=True)
        logits = [
            m(NEXT, past_key_values=c).logits for m, c in zip((ours, eager), caches, strict=True)
        ]
    assert_close(*logits)
    assert caches[0].start(input_ids=PROMPT) == 0  # type: ignore[attr-defined]


def test_encoders_and_equal_decoder_prompts() -> None:
    ours, eager = pair("bart")
    logits = []
    for model in (ours, eager):
        inner = PagedCache(model) if model is ours else DynamicCache()
        cache = EncoderDecoderCache(inner, DynamicCache())
        with torch.no_grad():
            first = model(
                input_ids=tokens(2, 9, seed=5), decoder_input_ids=TWICE, past_key_values=cache
            )
            states = (first.encoder_last_hidden_state,)
            step = model(encoder_outputs=states, decoder_input_ids=NEXT, past_key_values=cache)
        logits.append(step.logits)
    assert_close(*logits)


def llava(name: str) -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=4, projection_dim=32,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**LLAMA_LIKE | {"vocab_size": 64}),
        image_token_index=63, image_token_id=63, vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration._from_config(
        config, attn_implementation=name, dtype=torch.float32
    )
    _fill(model)
    return model.eval()


def test_images_under_one_text() -> None:
    ours, eager = llava("triton_fa2"), llava("eager")
    ids = torch.cat([tokens(1, 5, seed=2), torch.full((1, 16), 63), tokens(1, 12, seed=3)], 1)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2
    both = {"input_ids": ids.expand(2, -1), "pixel_values": images}
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    same_tokens(ours, eager, PagedCache(ours), both)
    cache = PagedCache(ours)
    for row in (0, 1):
        one = {name: x[row : row + 1] for name, x in both.items()}
        assert cache.start(**one) == 0
        same_tokens(ours, eager, cache, one)
    # text of the same model is found again, but not for a call that brings an image
    text = {"input_ids": ids.clamp(max=VOCAB - 1)}
    for column in (0, 32):
        assert cache.start(**text) == column
        same_tokens(ours, eager, cache, text)
    assert cache.start(**text) == 32
    with pytest.raises(ValueError, match="brings pixel_values"), torch.no_grad():
        ours(text["input_ids"][:, 32:], pixel_values=images[:1], past_key_values=cache)


# -- the model's state ----------------------------------------------------------------------------


def shift(model: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def by_data(model: Any) -> None:  # leaves the version counters as they are
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def other_data(model: Any) -> None:
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.data = weight.data * 1.5


def other_parameter(model: Any) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5)


def loaded(model: Any) -> None:
    model.load_state_dict({name: x * 1.1 for name, x in model.state_dict().items()})


def attribute(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 0.7


def hooked(model: Any) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.register_forward_hook(lambda module, args, out: out * 1.5)


def pre_hooked(model: Any) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def other_forward(model: Any) -> None:
    layer = model.model.layers[0].mlp
    forward = type(layer).forward
    layer.forward = lambda x: forward(layer, x) * 1.5


def buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def new_buffer(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.register_buffer("inv_freq", rotary.inv_freq * 0.5, persistent=False)


CHANGES = (
    shift, by_data, other_data, other_parameter, loaded, attribute, hooked, pre_hooked,
    other_forward, buffer, new_buffer,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_was_changed(change: Callable[[Any], None]) -> None:
    ours, eager = pair()
    cache = PagedCache(ours)
    assert found_again(ours, eager, cache) == 0
    assert found_again(ours, eager, cache) == 32
    for model in (ours, eager):
        change(model)
    with torch.no_grad():
        assert found_again(ours, eager, cache) == 0


@pytest.mark.parametrize("change", CHANGES[:5], ids=lambda change: change.__name__)
def test_a_model_changed_between_start_and_generate(change: Callable[[Any], None]) -> None:
    ours, _ = pair()
    cache = PagedCache(ours)
    ours.generate(PROMPT, past_key_values=cache, **GREEDY)
    assert cache.start(input_ids=PROMPT) == 32
    change(ours)
    if change in (by_data, other_data):  # no counter tells: only start() looks at values
        return
    with pytest.raises(ValueError, match="changed since"):
        ours.generate(PROMPT, past_key_values=cache, **GREEDY)


def test_rows_whose_model_changes_on_the_way() -> None:
    """What both states have made is never found, not even by the state that began it."""
    ours, eager = pair()
    cache = PagedCache(ours)
    ids = tokens(1, 80)
    weight = ours.model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        ours(ids[:, :20], past_key_values=cache)
        weight.mul_(2)
        for part in ids[:, 20:60].split(1, 1):
            ours(part, past_key_values=cache)
        weight.div_(2)
        ours(ids[:, 60:], past_key_values=cache)
    cache.start(input_ids=ids)
    assert torch.equal(
        ours.generate(ids, past_key_values=cache, **GREEDY), eager.generate(ids, **GREEDY)
    )


def test_an_adapter_for_one_step_on_the_way() -> None:
    """PEFT's switches are attributes: they are looked at after every step."""
    ours, _ = pair()
    layer = ours.model.layers[0].self_attn.k_proj
    layer._disable_adapters, layer._active_adapter = False, ["a"]
    cache = PagedCache(ours)
    with torch.no_grad():
        ours(PROMPT, past_key_values=cache)
        for number, part in enumerate(tokens(1, 30).split(1, 1)):
            layer._active_adapter = ["b"] if number == 7 else ["a"]
            ours(part, past_key_values=cache)
    assert cache.start(input_ids=torch.cat([PROMPT, tokens(1, 30), PROMPT], 1)) == 32


def test_rotations_that_turn_by_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    arguments = LLAMA_LIKE | {"rope_parameters": rope, "max_position_embeddings": 32}
    models = []
    for name in ("triton_fa2", "eager"):
        config = transformers.LlamaConfig(**arguments)
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=name)
        _fill(model)
        models.append(model.eval())
    cache = PagedCache(models[0])
    for ids in (tokens(1, 70), PROMPT, tokens(1, 90), tokens(1, 70)):
        assert found_again(*models, cache, ids) == 0


def test_training_mode_shares_nothing() -> None:
    ours, _ = pair()
    ours.train()
    cache = PagedCache(ours)
    with torch.no_grad():
        ours(TWICE, past_key_values=cache)
    assert cache.stats().shared == 0
    assert cache.start(input_ids=PROMPT) == 0


def test_weights_without_a_version() -> None:
    """Made under inference_mode: rows of one batch share, nothing is found later."""
    with torch.inference_mode():
        ours, eager = pair()
        cache = PagedCache(ours)
        same_tokens(ours, eager, cache, {"input_ids": TWICE})
        assert cache.stats().shared == 2
        assert found_again(ours, eager, cache) == 0


def test_adapters_of_peft() -> None:
    """Two adapters, none, one merged; each finds its own pages again."""
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "k_proj"], "init_lora_weights": False}
    models = []
    for model in pair():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings), adapter_name="a")
        wrapped.add_adapter("b", peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(7)
        for name, x in wrapped.named_parameters():
            if "lora_" in name:
                x.data = torch.randn(x.shape, generator=generator) * 0.5
        models.append(wrapped.eval())
    # without a limit the pool gives up old pages before it grows
    cache = PagedCache(models[0].base_model.model, max_bytes=1 << 20)
    for adapter, column in (("a", 0), ("b", 0), ("a", 32), ("b", 32)):
        for model in models:
            model.set_adapter(adapter)
        assert found_again(*models, cache) == column
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert found_again(*models, cache) == 0
    assert found_again(*models, cache) == 32
    for model in models:
        model.merge_adapter()
    assert found_again(*models, cache) == 0


def test_prompt_learning_of_peft() -> None:
    """A prefix is a cache of PEFT's own: refused. A prompt is embeddings: served, never found."""
    peft = pytest.importorskip("peft")
    for kind in (peft.PrefixTuningConfig, peft.PromptTuningConfig):
        bare, models = pair()[0], []
        cache = PagedCache(bare)
        bare.generate(PROMPT, past_key_values=cache, **GREEDY)
        for model in (bare, pair()[1]):
            torch.manual_seed(0)
            settings = kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
            models.append(peft.get_peft_model(model, settings).eval())
        inputs = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
        assert cache.start(**inputs) == 32
        with pytest.raises(ValueError, match="PEFT's virtual tokens"):
            models[0].generate(**inputs, past_key_values=cache, **GREEDY)
        cache.reset()
        if kind is peft.PrefixTuningConfig:
            with pytest.raises(ValueError, match="PREFIX_TUNING brings keys and values"):
                models[0].generate(**inputs, past_key_values=cache, **GREEDY)
        else:
            models[0].prompt_encoder.load_state_dict(models[1].prompt_encoder.state_dict())
            same_tokens(*models, cache, inputs)


# -- how the cache comes in -----------------------------------------------------------------------


def test_every_way_to_pass_the_cache() -> None:
    ours, _ = pair()
    mask, places = torch.ones_like(PROMPT), torch.arange(40)[None]
    ways: dict[str, Callable[[PagedCache], Any]] = {
        "keyword": lambda c: ours(PROMPT, **{cache_name(ours): c}),
        "position": lambda c: ours(PROMPT, mask, places, c),
        "generate": lambda c: ours.generate(PROMPT, past_key_values=c, **GREEDY),
    }
    assert cache_name(ours) in CACHE_NAMES
    for name, call in ways.items():
        cache = PagedCache(ours)
        with torch.no_grad():
            call(cache)
        assert cache.start(input_ids=PROMPT) == 32, name


def test_calls_that_the_hook_does_not_see() -> None:
    """The decoder called by itself: right, and found by nobody; after a find it is refused."""
    ours, _ = pair()
    cache = PagedCache(ours)
    with torch.no_grad():
        ours.model(PROMPT, past_key_values=cache)
        assert cache.start(input_ids=PROMPT) == 0
        ours(PROMPT, past_key_values=cache)
        assert cache.start(input_ids=PROMPT) == 32
        with pytest.raises(ValueError, match="no hook of this cache has seen"):
            ours.model(PROMPT[:, 32:], past_key_values=cache)


def test_a_hook_does_not_outlive_its_call() -> None:
    """What a call that failed was given is not taken for what the next one gets."""
    ours, _ = pair()
    cache = PagedCache(ours)
    with torch.no_grad():
        handle = ours.model.embed_tokens.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours(PROMPT, past_key_values=cache)
        handle.remove()
        ours.model(tokens(1, 40, seed=8), past_key_values=cache)
    assert cache.start(input_ids=PROMPT) == 0


def test_a_copied_cache_is_a_cache_of_its_own() -> None:
    ours, eager = pair()
    cache = PagedCache(ours)
    with torch.no_grad():
        ours(PROMPT, past_key_values=cache)
        twin = copy.deepcopy(cache)
        longer = torch.cat([PROMPT, tokens(1, 9)], 1)
        for one in (twin, cache):
            out = ours.generate(longer, past_key_values=one, **GREEDY)
            assert torch.equal(out, eager.generate(longer, **GREEDY))
            assert found_again(ours, eager, one) == 32
