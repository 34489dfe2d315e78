"""The dedup section of a recipe, and what of it each of its stages needs.

cluster   groups the rows, ghosts with them     ghost_margin, ghost_cap
forest    finds which rows are alike            floor, whether there are ghosts
dedup     cuts the forest and keeps a row       similarity_above, keep
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from manifests.strict import Strict


class DedupConfig(Strict):
    """What counts as a near-duplicate, and which one stays."""

    similarity_above: float = Field(default=0.86, ge=-1.0, le=1.0)
    """Rows of one cluster whose exact similarity is above this (strictly) are joined; the paper's
    value, with ViT-L/14 embeddings."""
    keep: Literal["middle", "far", "near", "clip_max", "inner_middle"] = "middle"
    """Which row of a component stays, by distance to the cluster's centroid: the upper median (the
    paper's), the farthest, the nearest; or the largest clip score; or the median by distance to the
    component's mean (rounded, so the one policy that is not exact)."""
    floor: float | None = Field(default=None, ge=-1.0, le=1.0)
    """Similarities above this are stored, so that any similarity_above from here on is a cut of
    what is there, without another look at the embeddings. None: similarity_above."""
    ghost_margin: float | None = Field(default=None, ge=0.0, le=2.0)
    """Rows at most this far (L2) from the border of a neighbouring cluster are compared with its
    rows too; 0.04 finds most of the pairs that k-means cuts. None (the paper's way): they are
    not."""
    ghost_cap: int | None = Field(default=3, ge=1)
    """In how many other clusters a row may be compared at most; None for no limit."""

    @model_validator(mode="after")
    def _floor_is_below(self) -> Self:
        if self.floor is not None and self.floor > self.similarity_above:
            raise ValueError(
                f"dedup.floor {self.floor} is above similarity_above {self.similarity_above}: "
                "nothing is stored between the two"
            )
        return self


class ForestConfig(Strict):
    """What the forest holds."""

    floor: float
    """Edges have a similarity above this."""
    has_ghosts: bool
    """Whether rows of different clusters are compared, where they are ghosts."""

    @classmethod
    def of(cls, dedup: DedupConfig) -> ForestConfig:
        """Return what the section says of the forest."""
        floor = dedup.similarity_above if dedup.floor is None else dedup.floor
        return cls(floor=floor, has_ghosts=dedup.ghost_margin is not None)
