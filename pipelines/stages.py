"""THE TABLE of stages, in run order.

A new stage is one file in curate/ (a Strict config, `plan(view) -> list[Item]`,
`work(view, item) -> Output`), one row here, and its section in a recipe. Modules are named, not
imported, so that `warren --help` stays fast. Raise `version` whenever the same config and input
would give another result: the fingerprint then changes and nothing stale is reused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from manifests.strict import Strict
from manifests.work import Item, Output, View

Shape = Literal["map", "group", "reduce"]


@dataclass(frozen=True, slots=True)
class Phase:
    """Items that may run side by side; the next phase starts when all are done."""

    plan: str = "plan"
    work: str = "work"


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the table.

    shape: map (part -> part), group (rows bucketed by cluster) or reduce (all -> one).
    identity: name of the module's function (config -> JSON) that says what outside files are read.
    wants_gpu: a worker gets a GPU where the cluster has any.
    uses_seed: the recipe's seed changes the result, so it enters the fingerprint.
    """

    name: str
    module: str
    config: str
    output: str
    shape: Shape
    version: int = 1
    phases: tuple[Phase, ...] = (Phase(),)
    identity: str | None = None
    wants_gpu: bool = False
    uses_seed: bool = False

    def plan(self, phase: Phase, view: View) -> list[Item]:
        """Return the phase's items."""
        found: list[Item] = self.function(phase.plan)(view)
        return found

    def work(self, phase: Phase, view: View, item: Item) -> Output:
        """Do one item."""
        made: Output = self.function(phase.work)(view, item)
        return made

    def identify(self, config: Strict) -> Any:
        """Return what the outside files that this stage reads are, or None."""
        return self.function(self.identity)(config) if self.identity else None

    def function(self, name: str) -> Callable[..., Any]:
        """Return a function of the stage's module."""
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), name)
        return found


_ROWS = (
    Stage("ingest", "curate.sources", "SourceConfig", "SAMPLES", "map", identity="identity"),
    Stage("filter", "curate.rows.filters", "FilterConfig", "VERDICTS", "map"),
    Stage(
        "embed",
        "curate.vectors.embed",
        "EmbedConfig",
        "VECTORS",
        "map",
        identity="identity",
        wants_gpu=True,
    ),
    Stage(
        "cluster",
        "curate.vectors.cluster",
        "ClusterConfig",
        "ASSIGNMENTS",
        "map",
        phases=(Phase("plan_training", "train"), Phase()),
        identity="identity",
        uses_seed=True,
    ),
    Stage("dedup", "curate.duplicates.dedup_stage", "DedupConfig", "VERDICTS", "group", version=2),
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
)

STAGES: dict[str, Stage] = {row.name: row for row in _ROWS}
