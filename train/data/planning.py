"""What a run trains on: a subset of the rows, without those that its template refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from manifests.errors import UserError
from train.config import TrainConfig
from train.data.index import Index, read_subset, uids_hash
from train.data.lengths import exact_columns
from train.data.plan import Columns, Plan, make_plan, num_steps, plan_hash
from train.data.samples import RowMaker


@dataclass(frozen=True, eq=False)
class PlannedRows:
    """The rows of a run, and what its plans are made from.

    index: of the rows that are planned. columns: theirs. refused: rows of `chosen`, the index of
    all rows of the subset, that the template cannot write -> reason. subset: the SHA-256 of the
    subset's uids, in hex; None without one.
    """

    index: Index
    columns: Columns
    chosen: Index
    subset: str | None = None
    refused: dict[int, str] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        data_dirs: list[str],
        subset: str | None,
        make_row: RowMaker,
        config: TrainConfig,
        cache_dir: str,
        *,
        num_workers: int = 0,
    ) -> PlannedRows:
        """Return the rows of stage directories that a run trains on.

        Args:
            subset: a parquet file or folder of uids, see read_subset; None for all.
            cache_dir: where exact lengths are kept, and found again by a later call.
            num_workers: processes that tokenize.

        Raises: UserError when there is no row, or no row of the subset, that can be trained on.
        """
        index, digest = Index.load(data_dirs), None
        if subset is not None:
            uids = read_subset(subset)
            index, digest = index.subset(uids), uids_hash(uids)
        if config.plan.lengths == "estimate":
            return cls(index, index.columns(), index, digest)
        found = exact_columns(
            index, make_row.measure, cache_dir, key=make_row.measures_by, num_workers=num_workers
        )
        _check_sources(index, found.refused, config)
        return cls(found.rows, found.columns, index, digest, found.refused)

    def plan(self, config: TrainConfig, *, epoch: int, world_size: int) -> Plan:
        """Return an epoch's plan. Raises: as make_plan."""
        return make_plan(
            self.columns, seed=config.seed, epoch=epoch, config=config.plan, world_size=world_size
        )

    def plan_hash(self, config: TrainConfig) -> str:
        """Return what the plans of all epochs are known by, in hex."""
        return plan_hash(self.columns, seed=config.seed, config=config.plan)

    def num_steps(self, config: TrainConfig) -> int:
        """Return the number of steps of all epochs."""
        epochs = range(config.epochs)
        each = (
            num_steps(self.columns, seed=config.seed, epoch=one, config=config.plan)
            for one in epochs
        )
        return sum(each)


def _check_sources(index: Index, refused: Mapping[int, str], config: TrainConfig) -> None:
    """Check that something is left of each source that is drawn from. Raises: UserError."""
    rows = np.bincount(index.source, minlength=len(index.sources))
    lost = np.bincount(index.source[list(refused)], minlength=len(index.sources))
    for at in np.flatnonzero((rows == lost) & (rows > 0)):
        name = index.sources[at]
        if config.plan.weights.get(name, 1.0):
            reasons = Counter(why for row, why in refused.items() if index.source[row] == at)
            raise UserError(
                f"Of {rows[at]} rows of {name}, no token is trained.",
                f"Refused: {dict(reasons)}.",
                "Look at the rows with this template and max_length, or leave the source out: "
                f"plan.weights.{name}: 0.",
            )
