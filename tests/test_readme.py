"""The READMEs stay true: trees name what is there, commands parse, targets and recipes exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from manifests.schemas import TABLES
from pipelines.cli import main
from pipelines.stages import STAGES

ROOT = Path(__file__).parents[1]
PACKAGES = ("manifests", "curate", "train", "pipelines")
READMES = ("README.md", *(f"{name}/README.md" for name in PACKAGES))

_BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
_ENTRY = re.compile(r"^([\w/]+(?:\.py|/))\s{2,}", re.MULTILINE)


def _blocks(name: str) -> list[tuple[str, str]]:
    return _BLOCK.findall((ROOT / name).read_text())


def _commands() -> list[str]:
    lines = [
        line
        for name in READMES
        for kind, text in _blocks(name)
        if kind == "sh"
        for line in text.splitlines()
    ]
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_tree_names_exactly_what_is_in_the_package(package: str) -> None:
    """A folder is listed alone, or with every file in it."""
    listed = set(_ENTRY.findall(_blocks(f"{package}/README.md")[0][1]))
    here = ROOT / package
    folders = {f"{p.name}/" for p in here.iterdir() if p.is_dir() and p.name != "__pycache__"}
    opened = {name.split("/")[0] for name in listed if name.endswith(".py") and "/" in name}
    files = {
        str(path.relative_to(here))
        for folder in (here, *(here / name for name in opened))
        for path in folder.glob("*.py")
        if path.name != "__init__.py"
    }
    assert listed == files | folders


@pytest.mark.parametrize("command", [c for c in _commands() if c.startswith("make")])
def test_every_make_command_has_its_target(command: str) -> None:
    target = shlex.split(command)[1]
    known = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    names = {name for line in known for name in line.split()} | set(STAGES)
    assert target in names


@pytest.mark.parametrize("command", [c for c in _commands() if c.startswith("warren")])
def test_every_warren_command_parses(command: str) -> None:
    words = shlex.split(command)[1:]
    found = main.get_command(click.Context(main), words[0])
    assert found is not None, words[0]
    found.make_context(words[0], words[1:])  # raises for an option or argument that is not known


def test_every_recipe_that_a_readme_names_is_there() -> None:
    text = "".join((ROOT / name).read_text() for name in READMES)
    named = set(re.findall(r"pipelines/recipes/\w+\.yaml", text))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_stage_table_of_the_readme_is_the_stage_table() -> None:
    text = (ROOT / "README.md").read_text()
    tables = "|".join(TABLES)
    rows = re.findall(rf"^\| `(\w+)` \|.*?\| ({tables})", text, re.MULTILINE)
    assert rows == [(stage.name, stage.output) for stage in STAGES.values()]


def test_every_link_to_a_file_of_this_repository_leads_somewhere() -> None:
    for name in READMES:
        folder = (ROOT / name).parent
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert (folder / target).exists(), f"{name}: {target}"
