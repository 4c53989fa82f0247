"""What calibration learns of attention, against the weights that transformers' eager returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_cases import CASES, Case
from tiny_checkpoints import tiny_checkpoint
from torch import Tensor

from hf_attn_converters.calibration.attention_maps import Attended, weights_of
from hf_attn_converters.calibration.statistics import DAMPING, Watch
from hf_attn_converters.conversion import Work
from hf_attn_converters.heads.plan import plan_conversion
from hf_attn_converters.layerwise import source_model

ONE_HEAD = ("falcon_mqa", "falcon_mqa_serial", "gpt_bigcode")  # nothing to merge
ALIBI = ("falcon_mha",)  # transformers' eager adds its bias twice
LENGTH = 40  # longer than the tiny models' windows


def eager_maps(work: Work, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The last layer's inputs ``[N, S, E]`` and weights ``[N, H, S, S]``, use by use."""
    query = next(slot for slot in work.family.layout.slots if "q" in slot.roles).module
    model = getattr(transformers, work.family.auto_class).from_pretrained(
        work.source.folder, attn_implementation="eager"
    )
    layer = model.get_submodule(work.family.layers_path)[-1]
    inputs: list[Tensor] = []
    maps: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        maps.append(output[1])

    layer.get_submodule(query).register_forward_pre_hook(lambda _, args: inputs.extend(args))
    layer.get_submodule(query.rpartition(".")[0]).register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=ids)
    return inputs, maps


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.tiny not in ONE_HEAD + ALIBI], ids=lambda case: case.tiny
)
def test_attended_is_what_transformers_weights_say(case: Case, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a", family=case.tiny, kv_heads=case.high)
    work = plan_conversion(folder, tmp_path / "b", num_key_value_heads=1, method="csvd")
    source = source_model(work, tokens_at_once=2 * LENGTH)
    ids = torch.randint(2, 300, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    *_, found = Watch(source, ids).layers()

    inputs, maps = eager_maps(work, ids)
    x = torch.cat([part.flatten(0, 1) for part in inputs]).double()
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)

    def moments(weights: Tensor) -> Tensor:
        total = (x * weights[:, None]).T @ x / weights.sum()
        total.diagonal().add_(DAMPING * total.diagonal().mean())
        return total

    weights = torch.cat([part.square().sum((1, 2)).flatten() for part in maps]).double()
    torch.testing.assert_close(found.attended, moments(weights), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.covariance, moments(torch.ones_like(weights)), rtol=1e-4, atol=1e-5
    )
    # The control: how much is attended at all gives another matrix, far off by the same measure.
    other = moments(torch.cat([part.sum((1, 2)).flatten() for part in maps]).double())
    assert (found.attended - other).abs().max() > 1e-3

    later = [torch.cat([torch.zeros_like(m[..., :1]), m[..., 1:]], dim=-1) for m in maps]
    wanted = [sum(m.diagonal(-d, 2, 3).sum().item() for m in later) for d in range(LENGTH)]
    torch.testing.assert_close(found.distances.float(), torch.tensor(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["causal", "boolean", "by head"])
def test_every_mask_that_torch_takes(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 12, 8, generator=draw)
    k, v = (torch.randn(2, 2, 12, 8, generator=draw) for _ in range(2))
    options: dict[str, Any] = {"enable_gqa": True, "scale": 0.3}
    if kind == "causal":
        options["is_causal"] = True
        added = torch.full((12, 12), -torch.inf).triu(1)[None, None]
    elif kind == "boolean":
        seen = torch.rand(2, 1, 12, 12, generator=draw) > 0.3
        seen.diagonal(dim1=-2, dim2=-1).fill_(True)
        options["attn_mask"] = seen
        added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    else:
        options["attn_mask"] = added = torch.randn(2, 4, 12, 12, generator=draw)
    keys = k.repeat_interleave(2, 1)
    weights = (0.3 * q @ keys.mT + added).softmax(-1)
    torch.testing.assert_close(
        weights @ v.repeat_interleave(2, 1),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, **options),
    )
    found = Attended.of(weights_of(q, k, v, **options))
    torch.testing.assert_close(found.received, weights.square().sum((1, 2)))
    torch.testing.assert_close(found.together, weights.sum(1))
