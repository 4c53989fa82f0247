"""The house rules: what an import pulls in, who may import whom, what a wheel carries."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "hf_attn_patch": ROOT / "hf_attn_patch",
    "hf_attn_kernels": ROOT / "kernels" / "hf_attn_kernels",
    "hf_attn_converters": ROOT / "converters" / "hf_attn_converters",
}
SCRIPTS = sorted(
    path.relative_to(ROOT / "scripts").as_posix()
    for pattern in ("*.py", "experiments/[!_]*.py")
    for path in (ROOT / "scripts").glob(pattern)
)

# --- what an import pulls in ----------------------------------------------------------------------

WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"  # importing it raises ImportError
NO_TRITON_CAME = (
    "\nimport sys\nfound = sorted(m for m in sys.modules if m.split('.')[0] == 'triton'"
    " and sys.modules[m] is not None)\nassert not found, found\n"
)
ALL_HELPS = """
import typer.main, typer.testing
from hf_attn_patch.cli import app

def commands(command, words=()):
    yield words
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from commands(child, (*words, name))

for words in commands(typer.main.get_command(app)):
    result = typer.testing.CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, (words, result.output)
    assert "Usage" in result.output, words
    print(" ".join(words))
"""


@pytest.mark.parametrize("prepare", ["", WITHOUT_TRITON], ids=["triton-there", "triton-absent"])
@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_no_triton(fresh_python, package, prepare):
    fresh_python(f"{prepare}import {package}{NO_TRITON_CAME}")


@pytest.mark.parametrize("prepare", ["", WITHOUT_TRITON], ids=["triton-there", "triton-absent"])
def test_every_help_works_and_imports_no_triton(fresh_python, prepare):
    done = fresh_python(f"{prepare}{ALL_HELPS}{NO_TRITON_CAME}")
    commands = {"list", "check", "generate", "convert", "compare", "bench attention", "bench short"}
    assert commands <= set(done.stdout.splitlines())


def test_the_probe_sees_triton_when_it_comes(fresh_python):
    done = fresh_python(f"import triton{NO_TRITON_CAME}", check=False)
    assert done.returncode != 0 and "AssertionError" in done.stderr


def test_attention_on_the_cpu_needs_no_triton(fresh_python):
    fresh_python(
        WITHOUT_TRITON + "import torch, hf_attn_kernels as h\n"
        "q = torch.randn(1, 5, 2, 16, requires_grad=True)\n"
        "out = h.flash_attn_func(q, q, q, causal=True)\n"
        "out.sum().backward()\n"
        "assert out.isfinite().all() and q.grad.isfinite().all()" + NO_TRITON_CAME
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(fresh_python, script):
    assert "usage" in fresh_python(f"scripts/{script}", "--help").stdout.lower()


# --- who may import whom --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImportRule:
    """Absolute imports of one part of the tree; relative ones stay inside a package anyway."""

    part: str  # folder or file below ROOT
    only: frozenset[str] | None = None  # third-party names it may import, any when None
    never: frozenset[str] = frozenset()
    lazily: frozenset[str] = frozenset()  # only inside functions, or under TYPE_CHECKING


OURS = frozenset(PACKAGES)
KERNELS = "kernels/hf_attn_kernels"
RULES = (
    # the oracle writes dropout's generator again in numpy, so that it shares nothing with ours
    ImportRule(part=f"{KERNELS}/reference.py", only=frozenset({"torch", "numpy"})),
    ImportRule(part=f"{KERNELS}/triton", only=frozenset({"torch", "triton"})),
    ImportRule(part=KERNELS, only=frozenset({"torch"}), lazily=frozenset({"triton"})),
    ImportRule(part="converters", never=OURS - {"hf_attn_converters"} | {"triton"}),
    ImportRule(part="hf_attn_patch/cli", lazily=OURS - {"hf_attn_patch"} | {"torch", "triton"}),
    # the encoder classes that converted folders carry are theirs
    ImportRule(
        part="hf_attn_patch/registration/auto_classes.py",
        never=frozenset({"triton"}),
        lazily=frozenset({"hf_attn_converters"}),
    ),
    ImportRule(  # what it measures
        part="hf_attn_patch/bench/convert.py",
        never=frozenset({"triton"}),
        lazily=frozenset({"hf_attn_converters"}),
    ),
    *(  # ask it which dtypes the device multiplies fast, and what it does to read a checkpoint
        ImportRule(
            part=f"hf_attn_patch/{file}.py",
            never=frozenset({"triton"}),
            lazily=frozenset({"hf_attn_converters"}),
        )
        for file in (
            *("loading", "compare/text", "compare/encoders", "compare/generation"),
            *("estimate/shape", "bench/options"),
        )
    ),
    ImportRule(part="scripts/bench/fa1.py", only=frozenset({"torch", "triton", "hf_attn_patch"})),
    ImportRule(part="hf_attn_patch", never=frozenset({"hf_attn_converters", "triton"})),
    ImportRule(part="scripts/aot", only=frozenset({"torch", "triton", "hf_attn_kernels"})),
    ImportRule(part="scripts", lazily=frozenset({"triton", "transformers"})),
)


@dataclass(frozen=True)
class Import:
    name: str  # top-level package
    line: int
    lazy: bool


def absolute_imports(source: str) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(a.name.split(".")[0], node.lineno, lazy) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(Import((node.module or "").split(".")[0], node.lineno, lazy))
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or inside or typing_only)

    visit(ast.parse(source), lazy=False)
    return found


def violations(rule: ImportRule, source: str, where: str) -> list[str]:
    wrong = []
    for item in absolute_imports(source):
        allowed = None if rule.only is None else rule.only | rule.lazily | sys.stdlib_module_names
        if item.name in rule.never or (allowed is not None and item.name not in allowed):
            wrong.append(f"{where}:{item.line} imports {item.name}")
        elif item.name in rule.lazily and not item.lazy:
            wrong.append(f"{where}:{item.line} imports {item.name} outside a function")
    return wrong


def rule_of(path: str) -> ImportRule:
    return next(rule for rule in RULES if path == rule.part or path.startswith(rule.part + "/"))


def test_packages_import_only_what_they_may():
    wrong, seen = [], 0
    for folder in ("kernels", "converters", "hf_attn_patch", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            wrong += violations(rule_of(where), path.read_text(), where)
            seen += 1
    assert seen > 30 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "path,source,complaint",
    [
        (f"{KERNELS}/api.py", "import transformers", "transformers"),
        (f"{KERNELS}/api.py", "import triton", "triton outside a function"),
        (
            f"{KERNELS}/api.py",
            "from hf_attn_kernels import validation as checks",
            "hf_attn_kernels",
        ),
        (f"{KERNELS}/cpu/flash.py", "import numpy", "numpy"),
        ("converters/hf_attn_converters/x.py", "def f():\n    import hf_attn_patch", "patch"),
        ("hf_attn_patch/x.py", "from hf_attn_converters import convert", "hf_attn_converters"),
        ("hf_attn_patch/cli/x.py", "import torch", "torch outside a function"),
    ],
)
def test_the_import_rule_can_be_broken(path, source, complaint):
    [found] = violations(rule_of(path), source, path)
    assert complaint in found


@pytest.mark.parametrize(
    "path,source",
    [
        (
            f"{KERNELS}/api.py",
            "def f():\n    import triton\nfrom . import checks\nimport torch, os",
        ),
        (f"{KERNELS}/api.py", "if TYPE_CHECKING:\n    import triton"),
        ("hf_attn_patch/cli/x.py", "def f():\n    import torch, hf_attn_converters"),
    ],
    ids=["in-a-function", "for-types", "in-a-command"],
)
def test_the_import_rule_allows(path, source):
    assert violations(rule_of(path), source, path) == []


# --- the folder called kernels --------------------------------------------------------------------

TINY_LOAD = """
import kernels
assert hasattr(kernels, "get_kernel"), kernels
import torch, transformers, hf_attn_patch
config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1,
)
transformers.LlamaForCausalLM(config).save_pretrained("{folder}")
model = transformers.AutoModelForCausalLM.from_pretrained(
    "{folder}", attn_implementation="triton_fa2"
)
assert model(torch.arange(6)[None]).logits.isfinite().all()
"""


@pytest.mark.parametrize(
    "folder", ["kernels", "converters", "tests", "tests/kernels", "tests/converters"]
)
def test_source_roots_are_no_packages(folder):
    assert (ROOT / folder).is_dir() and not (ROOT / folder / "__init__.py").exists()


def test_hugging_faces_kernels_library_is_not_shadowed(fresh_python, tmp_path):
    assert metadata.version("kernels")  # a development requirement: without it nothing is proven
    fresh_python(TINY_LOAD.format(folder=tmp_path), cwd=ROOT)


def test_a_kernels_package_would_shadow_it(fresh_python, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    done = fresh_python(TINY_LOAD.format(folder=tmp_path), cwd=tmp_path, check=False)
    assert done.returncode != 0 and "kernels" in done.stderr


# --- the distribution -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, fresh_python) -> Path:
    """Made from the sdist, which is made from a copy so that the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("hf_attn_patch", "kernels", "converters", "tests", "scripts"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    # without an option `build` makes the wheel from the sdist, not from the folder
    fresh_python("-m", "build", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    [built], [_] = out.glob("*.whl"), out.glob("*.tar.gz")
    return built


def test_the_wheel_carries_three_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for package, folder in PACKAGES.items():
        assert f"{package}/py.typed" in names
        files = {f"{package}/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*.py")}
        assert files <= names, files - names
    assert {f"hf_attn_patch/compare/page/{n}" for n in ("page.html.j2", "page.css")} <= names


def test_the_wheel_installs_into_a_clean_environment(wheel, fresh_python, tmp_path):
    """By pip, with torch and the rest borrowed from this environment."""
    env = tmp_path / "env"
    fresh_python("-m", "venv", str(env))
    python = env / "bin" / "python"
    [site] = env.glob("lib/python*/site-packages")
    command = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, cwd=tmp_path)
    # a path in a .pth is searched, but the .pth files in it, this checkout's among them, are not
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "".join(
        f"import {package}; assert {package}.__file__.startswith({str(site)!r})\n"
        for package in PACKAGES
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run([python, "-c", code + NO_TRITON_CAME], check=True, cwd=tmp_path, env=clean)
    listed = subprocess.run(
        [env / "bin" / "hf-attn", "list", "--json"],
        check=True, cwd=tmp_path, env=clean, capture_output=True, text=True,
    )  # fmt: skip
    assert "triton_fa2" in listed.stdout


# --- versions -------------------------------------------------------------------------------------


def quoted(section: str, text: str) -> list[str]:
    """The strings of the TOML list called `section` (tomllib is not in Python 3.10)."""
    listed = re.search(rf"^{section} = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
    assert listed, section
    return re.findall(r'"([^"]+)"', listed[1])


@pytest.mark.parametrize(
    "constraints", [("cpu.txt",), ("oldest.txt", "oldest-triton.txt")], ids=["newest", "oldest"]
)
def test_the_pins_lie_inside_the_supported_ranges(constraints):
    text = (ROOT / "pyproject.toml").read_text()
    pins = {}
    for line in "".join((ROOT / "constraints" / n).read_text() for n in constraints).splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            [exact] = pin.specifier
            pins[pin.name.replace("_", "-")] = exact.version
    sections = ["dependencies", "gpu"] + (["compare", "dev"] if "cpu.txt" in constraints else [])
    for wanted in (Requirement(q) for section in sections for q in quoted(section, text)):
        assert wanted.name in pins, f"{constraints} does not pin {wanted.name}"
        assert wanted.specifier.contains(pins[wanted.name]), (str(wanted), pins[wanted.name])


def test_one_version_number():
    import hf_attn_patch

    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and hf_attn_patch.__version__ == version[1]
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()
