"""THE TABLE of stages, in run order, for every source but one.

A source of images, or of their URLs, is read image by image before anything is compared. Where the
source brings embeddings, rows are compared and chosen without an image; the stages marked
`needs_image_bytes` then come right after select, so that only the chosen images are fetched:

    url_table       ingest filter download drift embed centroids cluster forest dedup decontaminate
                    select assemble
    clip_retrieval  ingest filter centroids cluster forest dedup select download drift
                    decontaminate assemble

`run_order` is that rule. Everything else follows from it: a stage is identified by all stages
before it, and judges the rows that the one before it kept.

A new stage is one file in curate/ (a Strict config, `plan(view) -> list[Item]`,
`work(view, item) -> Output`), one row here, and its section in a recipe. One section may ask for
several stages: what changes less often comes first, and is kept when the rest is changed. Modules
are named, not imported, so that `warren --help` stays fast. Raise `version` whenever the same
config and input would give another result: the fingerprint then changes and nothing stale is
reused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from manifests.strict import Strict
from manifests.work import Item, Output, View

Shape = Literal["map", "group", "reduce"]


@dataclass(frozen=True, slots=True)
class Phase:
    """Items that may run side by side; the next phase starts when all are done.

    round: which repetition of a phase that a stage repeats; plan and work are told.
    """

    plan: str = "plan"
    work: str = "work"
    round: int | None = None

    @property
    def told(self) -> tuple[int, ...]:
        """Return what else plan and work are called with."""
        return () if self.round is None else (self.round,)


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the table.

    shape: map (part -> part), group (rows bucketed by cluster) or reduce (all -> one).
    phases_of: name of the module's function (config -> (plan, work, round) each), where the config
    says how many phases there are.
    section: the section of a recipe that asks for this stage; its own name by default.
    derive: name of the module's function (section, all sections -> config), where the stage's
    config is less than its section, so that a change of the rest makes nothing anew.
    identity: name of the module's function (config -> JSON) that says what outside files are read.
    warnings: name of the module's function (config, all sections -> texts) that says what a person
    should know of those files: shown before the stage runs, and kept in its record.
    wants_gpu: a worker gets a GPU where the cluster has any.
    caches_model: its workers keep a model in memory, so other stages get workers of their own.
    uses_seed: the recipe's seed changes the result, so it enters the fingerprint.
    needs_image_bytes: it comes after select where the source brings embeddings.
    """

    name: str
    module: str
    config: str
    output: str
    shape: Shape
    version: int = 1
    phases: tuple[Phase, ...] = (Phase(),)
    phases_of: str | None = None
    section: str | None = None
    derive: str | None = None
    identity: str | None = None
    warnings: str | None = None
    wants_gpu: bool = False
    caches_model: bool = False
    uses_seed: bool = False
    needs_image_bytes: bool = False

    def plan(self, phase: Phase, view: View) -> list[Item]:
        """Return the phase's items."""
        found: list[Item] = self.function(phase.plan)(view, *phase.told)
        return found

    def work(self, phase: Phase, view: View, item: Item) -> Output:
        """Do one item."""
        made: Output = self.function(phase.work)(view, item, *phase.told)
        return made

    def phases_for(self, config: Strict) -> Sequence[Phase]:
        """Return the phases of a run with this config."""
        if self.phases_of is None:
            return self.phases
        return [Phase(*one) for one in self.function(self.phases_of)(config)]

    @property
    def asked_by(self) -> str:
        """The section of a recipe that asks for this stage."""
        return self.section or self.name

    def config_from(self, sections: Mapping[str, Strict]) -> Strict:
        """Return the stage's config, from the sections of a recipe."""
        section = sections[self.asked_by]
        if self.derive is None:
            return section
        found: Strict = self.function(self.derive)(section, sections)
        return found

    def identify(self, config: Strict) -> Any:
        """Return what the outside files that this stage reads are, or None."""
        return self.function(self.identity)(config) if self.identity else None

    def warn(self, config: Strict, sections: Mapping[str, Strict]) -> list[str]:
        """Return what a person should know before this stage runs with this config."""
        return self.function(self.warnings)(config, sections) if self.warnings else []

    def function(self, name: str) -> Callable[..., Any]:
        """Return a function of the stage's module."""
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), name)
        return found


_ROWS = (
    Stage(
        "ingest",
        "curate.sources",
        "SourceConfig",
        "SAMPLES",
        "map",
        version=2,
        identity="identity",
        warnings="warnings",
    ),
    Stage("filter", "curate.rows.filters", "FilterConfig", "VERDICTS", "map"),
    Stage(
        "download",
        "curate.download.stage",
        "DownloadConfig",
        "SAMPLES",
        "map",
        version=2,
        phases=(Phase(), Phase("plan_totals", "work_totals")),
        identity="identity",
        needs_image_bytes=True,
    ),
    Stage(
        "drift",
        "curate.vectors.drift",
        "DriftConfig",
        "VERDICTS",
        "map",
        identity="identity",
        wants_gpu=True,
        caches_model=True,
        needs_image_bytes=True,
    ),
    Stage(
        "embed",
        "curate.vectors.embed",
        "EmbedConfig",
        "VECTORS",
        "map",
        identity="identity",
        wants_gpu=True,
        caches_model=True,
    ),
    Stage(
        "centroids",
        "curate.vectors.centroids",
        "ClusterConfig",
        "VERDICTS",
        "reduce",
        phases_of="phases",
        section="cluster",
        identity="identity",
        wants_gpu=True,
        uses_seed=True,
    ),
    Stage(
        "cluster",
        "curate.vectors.cluster",
        "ClusterConfig",
        "ASSIGNMENTS",
        "map",
        version=2,
        phases=(Phase(), Phase("plan_quality", "quality")),
        derive="assignment",
        wants_gpu=True,
    ),
    Stage(
        "forest",
        "curate.duplicates.forest_stage",
        "DedupConfig",
        "FOREST",
        "group",
        phases=(Phase(), Phase("plan_merges", "merge")),
        section="dedup",
        derive="forest_of",
        wants_gpu=True,
    ),
    Stage("dedup", "curate.duplicates.dedup_stage", "DedupConfig", "VERDICTS", "group", version=2),
    Stage(
        "decontaminate",
        "curate.contamination.decontaminate",
        "DecontaminateConfig",
        "VERDICTS",
        "map",
        version=2,
        phases=(Phase("plan_sets", "work_set"), Phase()),
        derive="with_model",
        identity="identity",
        wants_gpu=True,
        caches_model=True,
        needs_image_bytes=True,
    ),
    Stage(
        "select",
        "curate.rows.select_stage",
        "SelectConfig",
        "VERDICTS",
        "reduce",
        version=2,
        phases=(Phase("plan_cuts", "work_cuts"), Phase(), Phase("plan_coreset", "work_coreset")),
        uses_seed=True,
    ),
    Stage(
        "assemble",
        "curate.media.assemble",
        "AssembleConfig",
        "TRAIN_INDEX",
        "reduce",
        phases=(Phase(), Phase("plan_index", "work_index")),
        uses_seed=True,
    ),
    Stage("clean", "curate.rows.clean", "CleanConfig", "CLEANED", "map", identity="identity"),
    Stage(
        "resolve",
        "curate.media.resolve",
        "ResolveConfig",
        "RESOLVED",
        "map",
        phases=(Phase("plan_places", "list_place"), Phase()),
        identity="identity",
    ),
    Stage(
        "mix",
        "curate.media.mix",
        "MixConfig",
        "TRAIN_INDEX",
        "reduce",
        phases=(
            Phase("plan_order", "work_order"),
            Phase("plan_rows", "work_rows"),
            Phase("plan_shards", "work_shard"),
            Phase("plan_index", "work_index"),
        ),
        derive="with_places",
        identity="identity",
        uses_seed=True,
    ),
)

STAGES: dict[str, Stage] = {row.name: row for row in _ROWS}


def run_order(*, brings_embeddings: bool) -> list[Stage]:
    """Return all stages in the order in which a run has those that its recipe asks for."""
    rows = list(STAGES.values())
    if not brings_embeddings:
        return rows
    late = [row for row in rows if row.needs_image_bytes]
    early = [row for row in rows if not row.needs_image_bytes]
    after_select = early.index(STAGES["select"]) + 1
    return [*early[:after_select], *late, *early[after_select:]]
