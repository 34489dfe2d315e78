"""From a recipe to the chain of stage directories that it means, without running anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manifests import paths
from manifests.record import directory_name, fingerprint
from manifests.strict import Strict
from manifests.work import StageDir, View
from pipelines.recipe import Recipe
from pipelines.stages import Stage


@dataclass(frozen=True, slots=True)
class Link:
    """One stage of a run: what it is, what it may see, and the fingerprint of its result."""

    stage: Stage
    view: View
    mark: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def directory(self) -> StageDir:
        """Where its result lies or will lie."""
        return self.view.own


def build(recipe: Recipe, out: str, *, until: str | None = None) -> list[Link]:
    """Return the links of a run, in order. Raises: UserError for missing input files."""
    links: list[Link] = []
    for stage in recipe.stages(until):
        links.append(_link(stage, recipe, out, links))
    return links


def canonical(stage: Stage, config: Strict, seed: int) -> dict[str, Any]:
    """Return what of the recipe decides this stage's result."""
    return config.canonical() | ({"seed": seed} if stage.uses_seed else {})


def _link(stage: Stage, recipe: Recipe, out: str, links: list[Link]) -> Link:
    config = recipe.configs[stage.name].located()
    inputs = {link.stage.name: link.mark for link in links}
    decided = canonical(stage, config, recipe.seed)
    mark = fingerprint(
        stage.name,
        stage.version,
        config=decided,
        identity=stage.identify(config),
        inputs=inputs,
    )
    path = paths.join(out, directory_name(stage.name, mark))
    before = {link.stage.name: link.directory for link in links}
    source = recipe.source.located()
    view = View(stage.name, config, source, recipe.seed, path, before)
    return Link(stage, view, mark, decided, inputs)
