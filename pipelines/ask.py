"""Questions about a run, answered from its files: they work while it runs and after a crash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from manifests import paths, store
from manifests.errors import UserError
from manifests.ledger import Tally
from manifests.record import read_latest, total
from manifests.work import StageDir
from pipelines.chain import Link, build
from pipelines.recipe import Recipe, parse, read_yaml
from pipelines.run import ITEMS

PROBED_MARGIN = 0.04
PROBED_ROWS_PER_BLOCK = 1 << 16
PROBED_PER_SAMPLED = 20
"""Rows that may be compared with all, for each that was sampled."""


@dataclass(frozen=True, slots=True)
class StageStatus:
    """How far one stage is. state: "finished", "unfinished" or "new"."""

    stage: str
    directory: str
    state: str
    items_done: int
    items: int | None
    counts: Tally
    seconds: float | None

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "stage": self.stage,
            "directory": self.directory,
            "state": self.state,
            "items_done": self.items_done,
            "items": self.items,
            "seconds": self.seconds,
            **self.counts.as_json(),
        }


def chain_of(out: str) -> dict[str, StageDir]:
    """Return the newest finished chain of a run directory. Raises: UserError when there is none."""
    chain = read_latest(out)
    if "ingest" not in chain:
        raise UserError(
            f"{out!r} holds no finished stage.",
            "It has no latest.json, which a run writes after each stage.",
            "Give the --out of a run; see `warren status` for how far it is.",
        )
    return chain


def recipe_of(out: str) -> Recipe:
    """Return the resolved recipe of the last run. Raises: UserError when there is none."""
    path = paths.join(out, "recipe.yaml")
    if paths.size_of(path) is None:
        raise UserError(
            f"{out!r} is no run directory.", "It has no recipe.yaml.", "Check the path."
        )
    return parse(read_yaml(path))


def plan(recipe: Recipe, out: str | None, *, until: str | None = None) -> list[StageStatus]:
    """Return what a run would find finished, go on with or make; without `out` all is new.

    The items of ingest are planned anew, which checks the headers of embedding files; how many
    items later stages have is known once ingest is finished.
    """
    links = build(recipe, out or "", until=until)
    found = [_status(link.directory) if out else _new(link) for link in links]
    if found[0].items is None:
        (phase,) = links[0].stage.phases_for(links[0].view.config)
        found[0] = replace(found[0], items=len(links[0].stage.plan(phase, links[0].view)))
    return found


def status(out: str) -> list[StageStatus]:
    """Return how far the last run is, stage by stage."""
    names = [stage.name for stage in recipe_of(out).stages()]
    found = read_latest(out) | read_latest(out, "planned")
    return [_status(found.get(name) or StageDir(name, "")) for name in names]


def probe(out: str, *, num_sampled: int) -> dict[str, Any]:
    """Return what the run's dedup misses, and with which settings; see curate/duplicates/probe.py.

    Raises: UserError when the run has no rows by cluster.
    """
    from curate.dedup_config import DedupConfig
    from curate.duplicates.probe import probe as compare
    from curate.vectors.centroids import CENTROIDS
    from curate.vectors.grouped import Grouped

    recipe, chain = recipe_of(out), chain_of(out)
    dedup = recipe.sections.get("dedup")
    if not isinstance(dedup, DedupConfig) or "cluster" not in chain:
        raise UserError(
            f"{out!r} has no clusters to look for near-duplicates in.",
            "Its recipe has no dedup section, or the run has not come to it.",
            "Run a recipe with cluster and dedup sections first.",
        )
    margin = PROBED_MARGIN if dedup.ghost_margin is None else dedup.ghost_margin
    groups = Grouped.at(chain["cluster"].path)
    found = compare(
        lambda: groups.stream(PROBED_ROWS_PER_BLOCK),
        store.read_array(paths.join(chain["centroids"].path, CENTROIDS)),
        similarity_above=dedup.similarity_above,
        ghost_margin=margin,
        ghost_cap=dedup.ghost_cap,
        num_sampled=num_sampled,
        most_rows=PROBED_PER_SAMPLED * num_sampled,
        seed=recipe.seed,
    )
    settings = {"similarity_above": dedup.similarity_above, "ghost_cap": dedup.ghost_cap}
    return found.as_json() | settings | {"ghost_margin": margin}


def funnel(chain: Mapping[str, StageDir]) -> list[dict[str, Any]]:
    """Return one row per finished stage: in, kept, dropped and quarantined by reason."""
    rows = []
    for directory in chain.values():
        record = directory.record()
        if record is not None:
            counts = Tally.from_json(record)
            rows.append(
                {"stage": directory.stage, **counts.as_json(), "seconds": record["seconds"]}
            )
    return rows


def counts(out: str) -> dict[str, list[dict[str, Any]]]:
    """Return what became of each source's rows, and the published counts beside the found ones.

    Works from when ingest is finished. Raises: UserError for a run of image-text pairs.
    """
    from curate.rows import mix_counts
    from curate.rows.mix_config import MixConfig

    recipe, chain = recipe_of(out), chain_of(out)
    if recipe.source.files is None:
        raise UserError(
            f"{out!r} has no instruction rows.",
            f"Its source is of kind {recipe.source.kind}.",
            "Ask `warren funnel`.",
        )
    mix = recipe.sections.get("mix")
    published = mix.published if isinstance(mix, MixConfig) else []
    sources = mix_counts.count_sources(chain, list(recipe.source.files))
    return {
        "sources": [one.as_json() for one in sources],
        "published": [one.as_json() for one in mix_counts.compare(chain, published)],
    }


def adds_up(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether each stage accounts for its rows and begins with what the one before kept."""
    tallies = [Tally.from_json(row) for row in rows]
    linked = all(
        after.rows_in == before.kept for before, after in zip(tallies, tallies[1:], strict=False)
    )
    return linked and all(one.adds_up for one in tallies)


def _status(directory: StageDir) -> StageStatus:
    name = paths.name_of(directory.path)
    planned = store.read_json(paths.join(directory.path, ITEMS)) if directory.path else None
    if not isinstance(planned, dict):
        return StageStatus(directory.stage, name, "new", 0, None, Tally(), None)
    markers = directory.markers()
    record = directory.record()
    return StageStatus(
        directory.stage,
        name,
        "unfinished" if record is None else "finished",
        len(markers),
        len(planned["items"]),
        total(markers),
        None if record is None else record["seconds"],
    )


def _new(link: Link) -> StageStatus:
    name = paths.name_of(link.directory.path)
    return StageStatus(link.stage.name, name, "new", 0, None, Tally(), None)
