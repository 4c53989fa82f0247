"""Small parts of a comparison: specs, prompts, first differences, numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_attn_patch.compare import ModelSpec, parse_spec
from hf_attn_patch.compare.format import number
from hf_attn_patch.compare.generation import first_difference
from hf_attn_patch.compare.text import read_prompts
from hf_attn_patch.loading import labels


class TestSpecs:
    def test_forms(self) -> None:
        assert parse_spec("a/b") == ModelSpec(path="a/b")
        assert parse_spec("a/b@sdpa") == ModelSpec(path="a/b", implementation="sdpa")
        spec = parse_spec("m@triton_swa:window=256:sinks=4")
        assert spec == ModelSpec(path="m", implementation="triton_swa", window=256, sinks=4)
        assert spec.label == "m@triton_swa:window=256:sinks=4"

    def test_a_folder_with_an_at_sign(self, tmp_path: Path) -> None:
        folder = tmp_path / "model@v2"
        folder.mkdir()
        assert parse_spec(str(folder)) == ModelSpec(path=str(folder))
        assert parse_spec(f"{folder}@sdpa") == ModelSpec(path=str(folder), implementation="sdpa")

    @pytest.mark.parametrize(
        "text",
        ["m@", "@sdpa", "m@triton_swa:window", "m@triton_swa:width=3", "m@triton_swa:window=-1",
         "m@sdpa:window=3", "m@triton_swa:sinks=3"],
    )  # fmt: skip
    def test_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"m@|@sdpa"):
            parse_spec(text)

    def test_labels_differ(self) -> None:
        specs = [ModelSpec(path=p) for p in ("a/m", "b/m", "c/m")]
        assert labels(specs) == ["m", "m #2", "m #3"]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1,), 1), ((), (), None), ((), (4,), 0)],
)
def test_first_difference(a: tuple[int, ...], b: tuple[int, ...], expected: int | None) -> None:
    assert first_difference(a, b) == first_difference(b, a) == expected


def test_prompts_one_per_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n  two  \n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (1e-9, "<1e-6"), (2e-5, "2.0e-05"), (0.1234, "0.123"),
     (9.957, "9.957"), (138240.0, "138,240"), (float("inf"), "inf")],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text
