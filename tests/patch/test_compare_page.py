"""The page: its structure, what it escapes, its records and plots, and how a browser shows it."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
from tiny_checkpoints import tiny_checkpoint

from hf_attn_converters import convert
from hf_attn_patch.compare import CompareOptions, Comparison, compare, markdown, report, table
from hf_attn_patch.compare.page import check_report, command, html, write_report
from hf_attn_patch.compare.page.key import model_key
from hf_attn_patch.compare.records import Record, read_record

SCRIPT = "<script>alert('prompt')</script> & <b>bold</b>"
VOID = {"meta", "link", "br", "img"}


class Tree(HTMLParser):
    """Tags in order, ids, references and text; says what is left open or closed twice."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.text, self._open = "", ["root"]
        self.feed(page)
        assert self._open == ["root"], f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.targets.append(value or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A source with itself, and with one KV head and records; a label and a prompt like HTML."""
    folder = tmp_path_factory.mktemp("page")
    source = tiny_checkpoint(folder / "source", kv_heads=2, tokenizer=True)
    one = folder / "one<i>head"
    convert(source, one, num_key_value_heads=1, method="mean")
    made = json.loads((one / "conversion.json").read_text())
    made["calibration"] = {"errors": [0.25, 0.5]}
    (one / "conversion.json").write_text(json.dumps(made))
    steps = [{"tokens": 1000 * i, "kl": 1 / (i + 1), "ppl": 9.0} for i in range(4)]
    trained = {"steps": steps, "recovered_percent": 87.25}
    (one / "uptrain.json").write_text(json.dumps(trained))
    (folder / "text.txt").write_text("the quick brown fox jumps over the dog.\n\n" * 20)
    (folder / "prompts.txt").write_text("\n".join([SCRIPT, *["the fox"] * 5]))
    options = CompareOptions(
        text=folder / "text.txt", prompts=folder / "prompts.txt", max_tokens=200, window=64,
        stride=32, new_tokens=8, context=40, more_contexts=(10, 20), batches=(1, 2),
        decode_tokens=4, rounds=1,
    )  # fmt: skip
    return compare(str(source), [str(source), str(one)], options)


@pytest.fixture(scope="module")
def page(result: Comparison) -> str:
    return html(result)


def test_what_the_page_says(page: str, result: Comparison) -> None:
    tree = Tree(page)
    assert "source #2 is identical to source." in tree.text
    for section in ("verdict", "measures", "plots", "texts", "again"):
        assert section in tree.ids
    for title in (
        "Quality against KV cache", "KL by position", "What the conversion left over, by layer",
        "How long greedy texts stay the source's", "Recovery by uptraining",
        "Decode speed by context", "Prefill speed by batch",
    ):  # fmt: skip
        assert title in tree.text
    assert tree.tags.count("svg") == tree.tags.count("figure") == 9
    assert "95%: " in tree.text
    assert tree.text.count("hf-attn compare source source") == 1
    assert result.provenance["torch"] in tree.text


def test_what_uptraining_recovered(page: str, result: Comparison) -> None:
    """On the page, in the table and in Markdown; not where no control run was made."""
    assert re.search(r"<td>87\.2%</td>", page)
    [cells] = [row[1:] for row in table(result)[1] if row[0] == "recovered"]
    assert cells == ["", "", "87.2%"]
    assert "| recovered | – | – | 87.2% |" in markdown(result)
    without = [dataclasses.replace(r, recovered_percent=None) for r in result.records]
    assert "recovered" not in markdown(dataclasses.replace(result, records=without))


def test_it_stands_alone(page: str) -> None:
    tree = Tree(page)
    assert "script" not in tree.tags and "iframe" not in tree.tags
    assert all(target.startswith(("#", "data:")) for target in tree.targets)
    assert not re.search(r"url\((?!#)", page) and "@import" not in page
    assert "default-src 'none'" in page
    assert len(tree.ids) == len(set(tree.ids)), "an id stands for two things"
    used = {t[1:] for t in tree.targets if t.startswith("#")} | set(
        re.findall(r"url\(#(.*?)\)", page)
    )
    assert used <= set(tree.ids)


def test_text_from_outside_is_escaped(page: str, result: Comparison) -> None:
    assert SCRIPT in Tree(page).text
    assert "<script" not in page and "<b>bold" not in page and "one<i>head" not in page
    label = dataclasses.replace(
        result,
        generation=[
            dataclasses.replace(g, texts=("</p><img src=x>",) * 6) for g in result.generation
        ],
        provenance={"<u>device": "</dl>"},
    )
    spoilt = html(label)
    assert "<img" not in spoilt and "<u>" not in spoilt
    marked = markdown(label)
    assert "\\<script>" in marked and not re.search(r"(?<!\\)<(script|b|i|img|/p)\b", marked)
    assert "</p><img src=x>" in Tree(spoilt).text


def test_control_an_unescaped_page_is_seen(page: str) -> None:
    assert "script" in Tree(page.replace("&lt;script&gt;", "<script></script>")).tags


def test_plots_take_their_colours_from_the_theme(page: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.search(r"(fill|stroke|color): ?#(?!f{3,6}\b)", drawn)
    for variable in set(re.findall(r"var\((--\w+)\)", page)):
        themes = page.count(f"{variable}: ")
        assert themes == 2, f"{variable} is defined {themes} times, not for light and dark"


def test_what_was_left_out_has_no_place(result: Comparison) -> None:
    bare = dataclasses.replace(result, quality=[], generation=[], speed=[], sweep=[], records=[])
    tree = Tree(html(bare))
    assert not {"measures", "plots", "texts"} & set(tree.ids)
    assert "was not judged against source" in tree.text


def test_the_command_is_the_one_that_was_asked(result: Comparison) -> None:
    line = command(result)
    assert "--max-tokens 200" in line and "--context 40 --context 10 --context 20" in line
    assert "--batch 1 --batch 2" in line and "--text text.txt" in line
    assert str(result.options.text.parent) not in line, "paths stay at home"
    import typer.main

    from hf_attn_patch.cli import app

    compare_command = typer.main.get_command(app).commands["compare"]  # type: ignore[attr-defined]
    parsed = compare_command.make_context("compare", shlex.split(line)[2:]).params
    asked = result.options
    assert (parsed["source"], len(parsed["candidates"])) == ("source", 2)
    assert parsed["context"] == [40, 10, 20] and parsed["batch"] == [1, 2]
    for name in ("max_tokens", "window", "stride", "new_tokens", "decode_tokens", "rounds"):
        assert parsed[name] == getattr(asked, name)


@pytest.mark.parametrize("name", ["report.pdf", "report", "absent/report.html"])
def test_reports_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--report"):
        check_report(tmp_path / name)


def test_both_forms(result: Comparison, tmp_path: Path) -> None:
    for name, begins in (("r.html", "<!doctype html>"), ("r.md", "# Report")):
        check_report(tmp_path / name)
        write_report(tmp_path / name, result)
        assert (tmp_path / name).read_text().lstrip().startswith(begins)


def test_letters_and_colours_for_many_models(result: Comparison) -> None:
    many = dataclasses.replace(result, candidates=tuple(f"m{i}" for i in range(40)))
    found = model_key(many)
    assert len({model.letter for model in found}) == 41
    assert (found[0].letter, found[25].letter, found[26].letter) == ("A", "Z", "A2")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"calibration": {"errors": ["x"]}, "steps": 3}', '{"steps": [3, {"kl": 1}]}',
     '{"calibration": 1, "kv_heads_before": "2", "steps": {}, "recovered_percent": "x"}'],
)  # fmt: skip
def test_records_of_another_form_count_for_none(content: str, tmp_path: Path) -> None:
    for name in ("conversion.json", "uptrain.json"):
        (tmp_path / name).write_text(content)
    assert read_record("m", str(tmp_path)) == Record(label="m")


def test_a_record_is_read(result: Comparison) -> None:
    record = result.records[2]
    assert record.layer_errors == (0.25, 0.5)
    assert (record.method, record.kv_heads) == ("mean", (2, 1))
    assert [point.tokens for point in record.recovery] == [0, 1000, 2000, 3000]
    assert result.records[0] == Record(label="source")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    with browser.tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def file(page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("open") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


@pytest.mark.skipif(browser.program() is None, reason="no chromium is installed")
class TestInABrowser:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [360, 390, 1280])
    def test_it_fits_and_is_quiet(
        self, width: int, scheme: str, tab: browser.Tab, file: Path, tmp_path: Path
    ) -> None:
        tab.open(file, width, scheme)
        assert tab.value("document.documentElement.scrollWidth") <= width
        assert tab.seen.errors == []
        assert tab.seen.requests == [file.as_uri()]
        assert tab.value("[...document.querySelectorAll('svg')].every(s => s.clientWidth > 250)")
        assert tab.value(CONTRAST) >= 4.5
        tab.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000

    def test_control_a_wide_page_and_an_error_are_seen(
        self, tab: browser.Tab, page: str, tmp_path: Path
    ) -> None:
        wide = page.replace("</body>", "<div style='width:2000px'>.</div><script>x</script></body>")
        (tmp_path / "wide.html").write_text(wide)
        tab.open(tmp_path / "wide.html", 390, "light")
        assert tab.value("document.documentElement.scrollWidth") > 390
        assert tab.seen.errors, "the policy forbids the script, and says so"


# The least contrast of text and its own background, as WCAG computes it.
CONTRAST = """
(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = c => {
    const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const found = rgb(getComputedStyle(e).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const of = e => {
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const ink = light(rgb(svg ? style.fill : style.color).slice(0, 3)), paper = light(behind(e));
    return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
  };
  const kinds = 'p, li, th, td, small, dt, dd, .chip, mark, svg text';
  const texts = [...document.querySelectorAll(kinds)];
  return Math.min(...texts.filter(e => e.textContent.trim()).map(of));
})()
"""


def test_empty_lines_and_numbers_are_said_in_words() -> None:
    assert report.folded("a\n\nb") == "a\n\nb"
    assert report.folded("\n" * 24 + "x") == "\n⏎ × 24\nx"
    assert report.counted(1, "round") == "1 round" and report.counted(0, "round") == "0 rounds"
