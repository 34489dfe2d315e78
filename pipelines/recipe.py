"""Recipes: one YAML file holds every number of a run; unknown keys are refused.

warren run pipelines/recipes/demo.yaml --out runs/demo --set dedup.similarity_above=0.9
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from curate.contamination.config import check_needs
from curate.source_config import SourceConfig
from manifests import paths, store
from manifests.errors import UserError
from manifests.strict import Strict, unknown_key
from pipelines.stages import STAGES, Stage, run_order

_PLAIN_KEYS = ("seed", "max_quarantine_fraction", "item_timeout_seconds", "source")
# a date such as 2024-99-99 is a ValueError, thousands of brackets a RecursionError
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
_MERGE_TAG = "tag:yaml.org,2002:merge"
SECTIONS = {stage.asked_by: stage for stage in STAGES.values() if stage.name != "ingest"}
"""Section -> a stage that it asks for; all of one section have the section's config class."""
_NEEDS_IMAGES = ("embed", "assemble")
_OF_PAIRS = (
    *("filter", "download", "drift", "embed", "cluster"),
    *("dedup", "decontaminate", "select", "assemble"),
)
_OF_CONVERSATIONS = ("clean", "resolve", "mix")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole run.

    sections: section -> its config, as the recipe has it. configs: stage name -> its config, in run
    order; a stage whose section the recipe does not have is skipped. max_quarantine_fraction:
    largest share of bad rows per stage; it decides whether a stage is accepted, not what it makes,
    so it enters no fingerprint. item_timeout_seconds: an item that runs longer on a Ray worker is
    stopped and tried again; None waits for ever.
    """

    seed: int
    max_quarantine_fraction: float
    item_timeout_seconds: float | None
    source: SourceConfig
    sections: Mapping[str, Strict]
    configs: Mapping[str, Strict]

    def stages(self, until: str | None = None) -> list[Stage]:
        """Return the stages to run, in order, up to and including `until`.

        Raises: UserError when the recipe does not name `until`.
        """
        names = list(self.configs)
        if until is not None and until not in names:
            raise UserError(
                f"The recipe has no stage {until!r}.",
                f"It runs: {', '.join(names)}.",
                "Add that section to the recipe, or stop at another stage.",
            )
        last = len(names) if until is None else names.index(until) + 1
        return [STAGES[name] for name in names[:last]]

    def as_mapping(self) -> dict[str, Any]:
        """Return the resolved recipe, defaults included, as it is saved beside the results."""
        found: dict[str, Any] = {
            "seed": self.seed,
            "max_quarantine_fraction": self.max_quarantine_fraction,
            "item_timeout_seconds": self.item_timeout_seconds,
            "source": self.source.model_dump(mode="json"),
        }
        return found | {name: one.model_dump(mode="json") for name, one in self.sections.items()}


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a YAML file with "stage.key=value" overrides applied.

    Raises: UserError for a missing file, bad YAML, an unknown key (with the nearest valid one) or
    a value of the wrong type.
    """
    values = read_yaml(path)
    for override in overrides:
        apply_setting(values, override)
    return parse(values)


def parse(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe that a parsed YAML mapping means. Raises: UserError."""
    known = [*_PLAIN_KEYS, *SECTIONS]
    for name in values:
        if name not in known:
            raise unknown_key(str(name), known, where="recipe")
    if "source" not in values:
        raise UserError(
            "recipe.source is missing.", "It says where the pairs are.", "Add source: ..."
        )
    source = SourceConfig.load(values["source"], where="recipe.source")
    sections: dict[str, Strict] = {}
    for name, stage in SECTIONS.items():
        if name in values:
            given = {} if values[name] is None else values[name]
            sections[name] = config_class(stage).load(given, where=f"recipe.{name}")
    _check_pairs(source, sections)
    configs: dict[str, Strict] = {"ingest": source}
    for stage in run_order(brings_embeddings=source.is_embeddings):
        if stage.asked_by in sections:
            configs[stage.name] = stage.config_from(sections)
    return Recipe(_seed(values), _fraction(values), _timeout(values), source, sections, configs)


def config_class(stage: Stage) -> type[Strict]:
    """Return the config model of a stage, which stands beside the function it drives."""
    found: type[Strict] = getattr(importlib.import_module(stage.module), stage.config)
    return found


def read_yaml(path: str) -> dict[str, Any]:
    """Return a YAML file's mapping. Raises: UserError when it is missing or not a mapping."""
    try:
        text = store.read_bytes(paths.resolve_resource(path))
        values = yaml.load(text, Loader=_NoDuplicates)  # noqa: S506 - it is a SafeLoader
    except FileNotFoundError as error:
        raise UserError(f"Recipe {path!r} does not exist.", "", "Check the path.") from error
    except OSError as error:
        raise UserError(f"Recipe {path!r} cannot be read.", f"{error}.", "Check it.") from error
    except _NOT_YAML as error:
        raise UserError(f"Recipe {path!r} is not YAML.", str(error), "Correct it there.") from error
    if not isinstance(values, dict):
        raise UserError(f"Recipe {path!r} is not a mapping.", "", "Write it as keys and values.")
    return values


class _NoDuplicates(yaml.SafeLoader):
    """Refuses a key that is written twice; YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key for key, _ in node.value if key.tag != _MERGE_TAG]
        keys = [self.construct_object(key, deep=True) for key in written]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} is written twice, {node.start_mark}")
        return super().construct_mapping(node, deep=deep)


def apply_setting(values: dict[str, Any], override: str) -> None:
    """Put a "section.key=value" into a parsed recipe. Raises: UserError."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(f"--set {override!r} is not key=value.", "", "Write e.g. dedup.keep=far.")
    *sections, key = name.split(".")
    try:
        value = yaml.safe_load(text)
    except _NOT_YAML as error:
        raise UserError(f"--set {override!r} has no YAML value.", str(error)) from error
    for section in sections:
        inner = values.get(section)
        values[section] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[section]
    values[key] = value


def _check_pairs(source: SourceConfig, configs: Mapping[str, Strict]) -> None:
    """Check that each stage gets what it needs, before anything runs. Raises: UserError."""
    _check_rows(source, configs)
    _check_images(source, configs)
    has = {*configs, *(("embed",) if source.is_embeddings else ())}
    check_needs(
        configs.get("decontaminate"),
        has_images=source.brings_images or "download" in configs,
        has_embeddings="embed" in has,
        has_model="embed" in configs,
    )
    for asking, needed in _needs(configs):
        if needed not in has:
            raise UserError(
                f"recipe.{asking} needs recipe.{needed}.",
                f"It works on what the {needed} stage makes.",
                f"Add a section {needed}: ... to the recipe.",
            )


def _check_images(source: SourceConfig, configs: Mapping[str, Strict]) -> None:
    """Check that images are fetched where they are needed, and only there. Raises: UserError."""
    if source.is_conversations:
        return
    if source.brings_images:
        _check_not_fetched(source, configs)
        return
    if source.is_embeddings and "embed" in configs:
        raise UserError(
            "recipe.embed needs images before anything is selected.",
            "A clip_retrieval source brings embeddings; images are fetched after select, if at "
            "all.",
            "Remove recipe.embed. To compare fetched images with their published embeddings, add "
            "a section drift: ...",
        )
    brought = "embeddings" if source.is_embeddings else "URLs"
    for name in _NEEDS_IMAGES:
        if name in configs and "download" not in configs:
            raise UserError(
                f"recipe.{name} needs images.",
                f"A {source.kind} source brings {brought}, and no images.",
                f"Add a section download: ... to fetch them, or remove recipe.{name}.",
            )
    if getattr(configs.get("filter"), "drop_below_pixel_std", None):
        raise UserError(
            "recipe.filter.drop_below_pixel_std needs images.",
            f"A {source.kind} source brings {brought}; the filter judges rows before any image is "
            "fetched.",
            "Remove it, or run the filter on the fetched shards: they are a source of kind "
            "img2dataset.",
        )


def _check_not_fetched(source: SourceConfig, configs: Mapping[str, Strict]) -> None:
    """Check that a source that has its images does not ask for them. Raises: UserError."""
    for name in ("download", "drift"):
        if name in configs:
            raise UserError(
                f"recipe.{name} has nothing to fetch.",
                f"A {source.kind} source brings its images.",
                f"Remove recipe.{name}, or give a source of kind url_table or clip_retrieval.",
            )


def _check_rows(source: SourceConfig, configs: Mapping[str, Strict]) -> None:
    """Check that each stage works on what the source brings. Raises: UserError."""
    wrong = _OF_PAIRS if source.is_conversations else _OF_CONVERSATIONS
    for name in wrong:
        if name not in configs:
            continue
        if source.is_conversations:
            why = "A llava_json source brings instruction rows, which are not compared or ranked."
            others = ", ".join(_OF_CONVERSATIONS)
            fix = f"Remove recipe.{name}; the sections for instruction rows are {others}."
        else:
            why = f"A {source.kind} source brings image-text pairs."
            fix = f"Remove recipe.{name}, or give a source of kind llava_json."
        wanted = "image-text pairs" if source.is_conversations else "instruction rows"
        raise UserError(f"recipe.{name} needs {wanted}.", why, fix)


def _needs(configs: Mapping[str, Strict]) -> Iterator[tuple[str, str]]:
    """Yield (what asks, the stage that it needs)."""
    if "resolve" in configs:
        yield "resolve", "clean"
    if "mix" in configs:
        yield "mix", "clean"
        yield "mix", "resolve"
    if "drift" in configs:
        yield "drift", "download"
    if "cluster" in configs:
        yield "cluster", "embed"
    if "dedup" in configs:
        yield "dedup", "cluster"
    select = configs.get("select")
    policy = getattr(select, "policy", None)
    if getattr(select, "clip_band", None) or policy == "top_clip":
        yield "select", "embed"
    if getattr(select, "centroid_band", None) or policy == "balanced":
        yield "select", "cluster"


def _seed(values: Mapping[str, Any]) -> int:
    seed = values.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        raise UserError(f"recipe.seed is {seed!r}.", "It is an integer from 0 to 2^31 - 1.")
    return seed


def _timeout(values: Mapping[str, Any]) -> float | None:
    seconds = values.get("item_timeout_seconds")
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise UserError(
            f"recipe.item_timeout_seconds is {seconds!r}.",
            "It is a number of seconds above 0.",
            "Correct it, or remove it to wait for ever.",
        )
    return float(seconds)


def _fraction(values: Mapping[str, Any]) -> float:
    share = values.get("max_quarantine_fraction", 0.05)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise UserError(f"recipe.max_quarantine_fraction is {share!r}.", "It is a number in 0..1.")
    return float(share)
