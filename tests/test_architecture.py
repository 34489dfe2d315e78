"""The house rules that no linter knows: who imports whom, how fast `--help` is, how long code gets.

Source files are read, not imported; the command line is tried in new processes.
"""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import click
import pytest

from pipelines.cli import main
from pipelines.stages import STAGES

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "manifests": set(),
    "curate": {"manifests"},
    "train": {"manifests"},
    "pipelines": {"manifests", "curate", "train"},
}
HEAVY = {
    *("torch", "torchvision", "open_clip", "transformers", "faiss", "ray"),
    *("numpy", "pyarrow", "polars", "scipy", "sklearn", "datasets", "gradio"),
}
MAX_HELP_SECONDS = 0.5
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Declared for others: torchvision must match torch, and open_clip does not name transformers.
NOT_IMPORTED_BY_US = {"torchvision", "transformers"}  # open_clip: transforms, tokenizers
# Files whose imports an optional extra brings. They must tell who lacks it what to install.
OF_EXTRAS = {
    "train/serve/page.py": "demo",
    "train/benchmarks/xlsx.py": "eval",
    "pipelines/evaluating/lmms_plugin.py": "lmms",
}
# lmms-eval has 90 dependencies of its own; the tests that need it are skipped without.
NOT_IN_DEV = {"lmms"}

SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in SOURCES]
Function = ast.FunctionDef | ast.AsyncFunctionDef
every_source = pytest.mark.parametrize("source", SOURCES, ids=NAMES)


@cache
def tree_of(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"), filename=str(source))


def imported_packages(tree: ast.Module) -> set[str]:
    """Return the top-level names of all absolute imports, also of those inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def test_there_is_something_to_check_in_each_package() -> None:
    assert {name.partition("/")[0] for name in NAMES} == set(MAY_IMPORT)


@every_source
def test_imports_point_one_way(source: Path) -> None:
    package = source.relative_to(ROOT).parts[0]
    ours = imported_packages(tree_of(source)) & {*MAY_IMPORT, "tests", "conftest", "ray_env"}
    allowed = MAY_IMPORT[package] | {package}
    assert ours <= allowed, f"{package} may import only {sorted(allowed)} of ours"


@every_source
def test_imports_are_absolute(source: Path) -> None:
    relative = [
        node.lineno
        for node in ast.walk(tree_of(source))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative, f"relative imports in lines {relative} escape the import rule"


def test_every_folder_of_code_is_a_package() -> None:
    bare = {path.parent for path in SOURCES if not (path.parent / "__init__.py").exists()}
    assert not bare, "without __init__.py a folder's types and tests are not found everywhere"


def test_what_ships_declares_what_it_imports_and_no_more() -> None:
    needed = distributions([source for source in SOURCES if name_of(source) not in OF_EXTRAS])
    declared = requirements("dependencies")
    assert needed <= declared
    assert declared - needed <= NOT_IMPORTED_BY_US


@pytest.mark.parametrize(("name", "extra"), OF_EXTRAS.items())
def test_an_extra_is_what_its_one_file_imports_and_no_more(name: str, extra: str) -> None:
    needed, always = distributions([ROOT / name]), requirements("dependencies")
    assert needed - always == requirements(extra)
    assert (requirements(extra) <= requirements("dev")) == (extra not in NOT_IN_DEV)
    assert f"warren[{extra}]" in (ROOT / name).read_text(encoding="utf-8")


def test_the_dev_extra_is_enough_for_tests_and_benchmarks() -> None:
    rarely = set().union(*map(requirements, NOT_IN_DEV))
    assert distributions(TESTS) <= requirements("dependencies") | requirements("dev") | rarely


def distributions(sources: list[Path]) -> set[str]:
    """Return the names of the distributions that these files import, as this environment has it."""
    providers = packages_distributions()
    imported = set().union(*(imported_packages(tree_of(source)) for source in sources))
    ours = set(MAY_IMPORT) | {source.stem for source in TESTS}
    third_party = imported - set(sys.stdlib_module_names) - ours
    found = {normal(name) for module in third_party for name in providers.get(module, [module])}
    return {
        name.replace("faiss-gpu-cu12", "faiss-cpu") for name in found
    }  # one in place of the other


def name_of(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def requirements(group: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = {**project["optional-dependencies"], "dependencies": project["dependencies"]}[group]
    return {normal(re.split(r"[\[<>=~! ;]", line)[0]) for line in lines}


def test_every_stage_has_its_make_target() -> None:
    line = re.search(r"^STAGES := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line is not None
    assert line[1].split() == list(STAGES)


def normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def commands() -> list[list[str]]:
    assert isinstance(main, click.Group)
    return [[], *([name] for name in main.commands)]


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(["warren", *words]))
def test_help_imports_nothing_heavy_and_is_quick(words: list[str]) -> None:
    first, seconds = ask_for_help(words)
    heavy = HEAVY & set(first.rpartition("modules: ")[2].split())
    assert not heavy, f"`{' '.join(['warren', *words, '--help'])}` imports {sorted(heavy)}"
    assert first.startswith("Usage: ")
    best = min(seconds, ask_for_help(words)[1], ask_for_help(words)[1])
    assert best < MAX_HELP_SECONDS, f"--help took {best:.2f} s of CPU, best of three"


HELP = """
import sys
from pipelines.cli import main
main([*sys.argv[1:], "--help"], prog_name="warren", standalone_mode=False)
print("modules:", *{name.partition(".")[0] for name in sys.modules})
"""


def ask_for_help(words: list[str]) -> tuple[str, float]:
    """Return what `warren ... --help` prints, then its modules, and its seconds of CPU time.

    CPU time, not wall time: the machine may be busy with something else.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", HELP, *words]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return text, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("words", commands()[1:], ids=lambda words: words[0])
def test_every_command_explains_itself_with_an_example(words: list[str]) -> None:
    assert isinstance(main, click.Group)
    command = main.commands[words[0]]
    assert f"Example: warren {words[0]}" in (command.help or "")
    options = [
        one for one in command.params if isinstance(one, click.Option) and one.name != "as_json"
    ]
    assert len(options) <= 4, "what is a number of the recipe belongs behind --set"


@every_source
def test_no_file_is_too_long_to_read(source: Path) -> None:
    num_lines = len(source.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{num_lines} lines; split it by what it is about"


@every_source
def test_no_function_is_too_long_to_read(source: Path) -> None:
    lengths = {node.name: lines_of(node) for node in functions(tree_of(source))}
    too_long = {name: size for name, size in lengths.items() if size > MAX_FUNCTION_LINES}
    assert not too_long, f"over {MAX_FUNCTION_LINES} lines, decorators included: {too_long}"


def lines_of(node: Function) -> int:
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    return (node.end_lineno or first) - first + 1


@every_source
def test_everything_public_has_a_docstring(source: Path) -> None:
    tree = tree_of(source)
    silent = [name for name, node in public(tree) if not ast.get_docstring(node)]
    assert ast.get_docstring(tree), "the module does not say what it is for"
    assert not silent, f"without a docstring: {silent}"


def public(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Return the module's public functions and classes, and the public methods of those."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, Function) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner
