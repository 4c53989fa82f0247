"""A name that transformers takes for FlashAttention. Also run on transformers 5.17."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tiny_models import EVERY, build

import hf_attn_patch


@pytest.fixture
def registered_again() -> Iterator[None]:
    yield
    hf_attn_patch.register()


def test_flash_functions_are_ours_and_go_away_again(registered_again: None) -> None:
    from transformers import modeling_flash_attention_utils as utils

    import hf_attn_kernels

    functions, _ = utils.lazy_import_flash_attention("triton_paged_flash2")[:2]
    assert functions[:2] == (
        hf_attn_kernels.flash_attn_func,
        hf_attn_kernels.flash_attn_varlen_func,
    )
    hf_attn_patch.unregister(["triton_paged_flash2"])
    assert utils._lazy_imports.__module__ == utils.__name__
    assert utils._loaded_implementation is None
    with pytest.raises(Exception, match=r"triton_paged_flash2|kernels"):
        utils.lazy_import_flash_attention("triton_paged_flash2")


def test_other_flash_names_go_where_they_went() -> None:
    from transformers import modeling_flash_attention_utils as utils

    with pytest.raises(ImportError):  # transformers' own search for it, not installed here
        utils._lazy_imports("flash_attention_3")


def test_a_wrapper_around_ours_is_left_alone(registered_again: None) -> None:
    from transformers import modeling_flash_attention_utils as utils

    ours = utils._lazy_imports

    def around(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    utils._lazy_imports = around
    try:
        hf_attn_patch.unregister()
        assert utils._lazy_imports is around
        with pytest.raises(ImportError):
            utils._lazy_imports("flash_attention_3")
    finally:
        utils._lazy_imports = ours.theirs


def test_a_model_that_lists_its_flash_kernels(registered_again: None) -> None:
    """gpt_oss replaces any other name by one of its list."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel

    accepted = GptOssPreTrainedModel._compatible_flash_implementations
    assert accepted.count("triton_paged_flash2") == 1
    model = build(next(s for s in EVERY if s.id == "gpt_oss"), "triton_paged_flash2")
    assert model.config._attn_implementation == "triton_paged_flash2"
    hf_attn_patch.unregister()
    assert "triton_paged_flash2" not in accepted and len(accepted) > 0
