"""A patched model inside what people wrap around models: the same numbers as without it.

That the numbers themselves are right is shown elsewhere (test_models_*.py, test_swa.py), and so are
fullgraph compilation of an inference step, non-reentrant checkpointing, opcheck and gradcheck.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forked
from tiny_models import EVERY, TinyModel, assert_close, build, padded, tokens, worst
from torch import Tensor

from hf_attn_patch import configure_swa

NAMES = ("triton_fa2", "triton_swa")
SPECS = {spec.id: spec for spec in EVERY}
LLAMA = SPECS["llama"]


def patched(name: str, spec: TinyModel = LLAMA) -> Any:
    """A model of its own; with triton_swa its window is shorter than every text here."""
    # not the shared one: transformers hangs hooks on a model that was asked for its hidden states
    model = copy.deepcopy(build.__wrapped__(spec, name))
    if name == "triton_swa":
        configure_swa(model, window=5, sinks=2)
    return model


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def greedy(model: Any, ids: Tensor, new: int = 12) -> list[list[int]]:
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    return out[:, ids.shape[1] :].tolist()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        gap = float((ours[name] - gradient).abs().max())
        assert gap <= tolerance * max(float(gradient.abs().max()), 1.0), f"{name}: {gap:.1e}"


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- torch.compile --------------------------------------------------------------------------------


def test_a_compiled_training_step() -> None:
    """Forward and backward as one graph each."""
    model, inputs = patched("triton_swa"), padded("right")
    expected = gradients(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(gradients(compiled, inputs), {f"_orig_mod.{k}": v for k, v in expected.items()})


def test_compiled_for_any_length() -> None:
    """Dynamic shapes: one graph serves every length."""
    model = patched("triton_fa2")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch.no_grad():
        for length in (13, 17, 30, 41):
            ids = tokens(2, length)
            assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert counters["stats"]["unique_graphs"] == 1, counters["stats"]


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    """The default backend of torch.compile, which writes and builds C++."""
    model, ids = patched("triton_fa2"), tokens(2, 13)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


# --- dtypes and modes -----------------------------------------------------------------------------


# without gpt_oss: rounding turns its router over for single tokens, whatever computes the attention
@pytest.mark.parametrize("model_id", ["llama", "mistral", "gemma2", "t5", "bert"])
def test_autocast(model_id: str) -> None:
    """bfloat16 under autocast is as far from float32 as eager attention's under autocast."""
    spec = SPECS[model_id]
    inputs = padded("right")
    if spec.kind == "seq2seq":
        inputs["decoder_input_ids"] = tokens(3, 6)
    with torch.no_grad():
        exact = build(spec, "eager")(**inputs).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = (build(spec, n)(**inputs).logits for n in ("triton_fa2", "eager"))
    mask = inputs["attention_mask"] if spec.kind != "seq2seq" else None
    assert ours.dtype == theirs.dtype
    assert worst(ours.float(), exact, mask) < 2 * worst(theirs.float(), exact, mask) + 0.02


def test_training_under_autocast(name: str) -> None:
    """Weights stay float32 and so do their gradients."""
    model, inputs = patched(name), padded("right")
    exact = gradients(model, inputs)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, key
        likeness = torch.cosine_similarity(parameter.grad.flatten(), exact[key].flatten(), dim=0)
        assert float(likeness) > 0.98, f"{key}: {float(likeness):.3f}"


def test_inference_mode_and_training_after_it(name: str) -> None:
    """Nothing made in inference mode is kept where a later backward would meet it."""
    model, inputs = patched(name), padded("left")
    with torch.no_grad():
        expected = model(**inputs).logits
    fresh = gradients(patched(name), inputs)
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, expected)
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (3, 15)
    same(gradients(model, inputs), fresh, tolerance=0.0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, inputs = patched(name).train(), padded("right")
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    same(gradients(model, inputs), expected, tolerance=0.0)


# --- threads and processes ------------------------------------------------------------------------


def test_four_threads_generate_at_once(name: str) -> None:
    """One model, four prompts of their own lengths, again and again."""
    model = patched(name)
    prompts = [tokens(1, length, seed=length) for length in (3, 9, 14, 22)]
    expected = [greedy(model, prompt) for prompt in prompts]
    found: list[list[Any]] = [[] for _ in prompts]
    start = threading.Barrier(len(prompts))

    def serve(number: int) -> None:
        start.wait()
        for _ in range(3):
            found[number].append(greedy(model, prompts[number]))

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert found == [[answer] * 3 for answer in expected]


def test_after_a_fork(name: str) -> None:
    """A child made after the model ran in its parent, as data loaders make them."""
    model, prompt = patched(name), tokens(1, 11)
    expected = greedy(model, prompt)

    def child() -> None:
        assert greedy(model, prompt) == expected

    ended = forked(child)
    assert (ended.signal, ended.error) == (0, ""), ended.said
    assert greedy(model, prompt) == expected


# A process of its own that knows nothing but a pickle, as multiprocessing's spawn makes them.
SPAWNED = """
import pickle, sys, torch
import hf_attn_patch
with open(sys.argv[1], "rb") as file:
    models, prompt, expected = pickle.load(file)
for model, answer in zip(models, expected, strict=True):
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12,
                           min_new_tokens=12, do_sample=False)[:, prompt.shape[1]:].tolist()
    assert found == answer, (model.config._attn_implementation, found, answer)
"""


def test_in_a_spawned_process(
    tmp_path: Path, fresh_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    prompt = tokens(1, 11)
    models = [patched("triton_fa2", SPECS["falcon_gqa"]), patched("triton_swa")]
    file, code = tmp_path / "model.pickle", tmp_path / "child.py"
    file.write_bytes(pickle.dumps((models, prompt, [greedy(model, prompt) for model in models])))
    code.write_text(SPAWNED)
    fresh_python(str(code), str(file))


# One of two processes: DDP over its half of the batch; the first saves the gradients.
REPLICA = """
import pickle, sys, torch
import hf_attn_patch
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
with open(sys.argv[1], "rb") as file:
    models, ids = pickle.load(file)
found = []
for model in models:
    half = ids.chunk(2)[rank]
    replicated = torch.nn.parallel.DistributedDataParallel(model)
    replicated(half, labels=half, use_cache=False).loss.backward()
    found.append({name: p.grad for name, p in model.named_parameters()})
if rank == 0:
    torch.save(found, sys.argv[2])
torch.distributed.destroy_process_group()
"""


def test_two_replicas(
    tmp_path: Path, fresh_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """DDP's averaged gradients are those of the whole batch in one process."""
    ids, models = tokens(4, 12), [patched(name).train() for name in NAMES]
    file, out, code = (tmp_path / name for name in ("models.pickle", "gradients.pt", "child.py"))
    file.write_bytes(pickle.dumps((models, ids)))
    code.write_text(REPLICA)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    fresh_python(*torchrun, str(code), str(file), str(out), env={"CUDA_VISIBLE_DEVICES": ""})
    for model, found in zip(models, torch.load(out, weights_only=True), strict=True):
        whole = gradients(model, {"input_ids": ids})
        same(found, whole)
        with pytest.raises(AssertionError):  # what one process alone would have found
            same(gradients(model, {"input_ids": ids.chunk(2)[0]}), whole)


# --- copies ---------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # of our own making


COPIES["torch.save"] = through_a_file


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("triton_fa2", "llama"),
        ("triton_swa", "llama"),
        ("triton_fa2", "falcon_gqa"),
        ("triton_swa", "falcon_mqa"),
        ("triton_paged_flash2", "gpt_oss"),
        ("triton_mla", "deepseek_v3"),
    ],
)
def test_a_copy_does_what_the_model_does(name: str, model_id: str, how: str) -> None:
    """Before its first call and after it; the window of triton_swa goes along."""
    spec = SPECS[model_id]
    model, prompt = patched(name, spec), tokens(2, 14)
    early = COPIES[how](model)
    expected = greedy(model, prompt)
    assert greedy(early, prompt) == expected
    assert greedy(COPIES[how](model), prompt) == expected
    assert greedy(model, prompt) == expected
    if name == "triton_swa":  # or the window would not have mattered here
        assert expected != greedy(build(spec, "triton_fa2"), prompt)
