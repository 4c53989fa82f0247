"""What stands beside the code: workflows, hooks, templates, citation, CONTRIBUTING.md's tree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()
AUTHORS = "hf-attn-patch contributors"


PACKAGES = ("hf_attn_patch", "kernels/hf_attn_kernels", "converters/hf_attn_converters")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in load(workflow)["jobs"].values() for step in job["steps"]]


def test_ci_runs_the_same_as_anybody_can() -> None:
    commands = [step["run"] for step in steps(ROOT / ".github/workflows/ci.yml") if "run" in step]
    assert commands == ["bash .ci/run"] and (ROOT / ".ci" / "run").is_file()


def test_the_wheel_is_built_with_the_pinned_tools_and_kept() -> None:
    wheels = steps(ROOT / ".github/workflows/wheels.yml")
    commands = "\n".join(step.get("run", "") for step in wheels)
    assert "python -m build" in commands
    [packages] = re.findall(r"pip install -c constraints/cpu\.txt (.+)", commands)
    pins = (ROOT / "constraints" / "cpu.txt").read_text()
    for package in packages.split():
        assert re.search(rf"^{package}==", pins, re.MULTILINE), package
    kept = next(step for step in wheels if "upload-artifact" in step.get("uses", ""))
    assert "dist/*" in kept["with"]["path"] and kept["with"]["if-no-files-found"] == "error"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_only_read(workflow: Path) -> None:
    found = load(workflow)
    assert found["permissions"] == {"contents": "read"}
    assert True in found  # `on:`, which YAML 1.1 takes for a truth value
    assert "secrets." not in workflow.read_text()
    for job in found["jobs"].values():
        assert job["timeout-minutes"] <= 60 and "permissions" not in job


def test_the_hooks_run_what_make_check_runs() -> None:
    [repo] = load(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: hook["entry"] for hook in repo["hooks"]}
    assert repo["repo"] == "local" and list(hooks) == ["ruff-format", "ruff-check", "mypy"]
    makefile = (ROOT / "Makefile").read_text()
    for entry in hooks.values():
        program, *arguments = entry.split()
        assert program == ".venv/bin/python" and "VENV := .venv\n" in makefile
        command = " ".join(word for word in arguments if not word.startswith("--"))
        assert f"$(BIN) {command}" in makefile, entry


def test_the_citation_is_of_this_version() -> None:
    citation = load(ROOT / "CITATION.cff")
    [version] = re.findall(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)
    [names] = re.findall(r"^authors = \[(.+)\]$", PYPROJECT, re.MULTILINE)
    assert citation["version"] == version and citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": AUTHORS}] and names == f'{{ name = "{AUTHORS}" }}'


def test_issue_templates_say_what_they_are_for() -> None:
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert len(templates) >= 3
    for template in templates:
        _, head, body = template.read_text().split("---\n", 2)
        assert {"name", "about", "labels"} <= set(yaml.safe_load(head)) and body.strip()


def test_the_site_searches_from_disk_and_loads_nothing_from_elsewhere() -> None:
    """Without a file of that name the offline plugin has every page load one from a CDN."""
    site = load(ROOT / "mkdocs.yml")
    assert site["theme"]["font"] is False
    assert {"search", "offline"} <= {name for name in site["plugins"] if isinstance(name, str)}
    assert any("iframe-worker" in script for script in site["extra"]["polyfills"])
    for file in (*site["extra"]["polyfills"], *site["extra_css"]):
        assert (ROOT / "docs" / file).is_file(), file


@pytest.mark.parametrize("package", PACKAGES)
def test_contributing_shows_every_room(package: str) -> None:
    """Folders and files directly in a package, none missing and none that is gone."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    [tree] = re.findall(rf"^{package}/ .*\n((?:  .+\n)+)", text, re.MULTILINE)
    named = set(re.findall(r"(?<![\w/])[a-z_0-9]+(?:\.py|/)(?=[\s,])", tree))
    folder = ROOT / package
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    rooms = {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    assert named == files | rooms
