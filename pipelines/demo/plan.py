"""Which row of the demo world is what: good pairs, and the junk planted among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.demo.seeds import rng_for

JUNK_SHARES = {
    "near_duplicate": 0.09,
    "placeholder": 0.08,
    "swapped_caption": 0.05,
    "cheater": 0.03,
    "exact_copy": 0.03,
    "noise": 0.02,
    "watermark": 0.02,
    "failed_download": 0.02,
    "empty": 0.015,
    "tiny": 0.015,
    "one_word": 0.015,
    "unsafe": 0.01,
    "extreme_aspect": 0.01,
    "long_caption": 0.01,
    "no_caption": 0.007,
    "broken_truncated": 0.005,
    "broken_empty_file": 0.005,
    "broken_html": 0.005,
}
"""Junk kind -> its share of all rows; the rest is good. Originals of duplicates count as good."""

MAX_COPIES = {"exact_copy": 4, "near_duplicate": 39}
"""Largest number of copies of one original; the numbers have a heavy tail, P(m) ~ m^-1.7."""


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """What one row is: its kind, the scene it shows, and its duplicate group.

    `serial` is unique in the world and seeds the row's own stream; copies share `scene_index` with
    their original, whose kind stays "good".
    """

    serial: int
    kind: str
    scene_index: int
    group: int | None = None


def plan_rows(seed: int, num_rows: int) -> list[PlannedRow]:
    """Return the `num_rows` rows of the world `seed`, shuffled: copies lie in any shard."""
    rng = rng_for(seed, "plan", 0)
    num_junk = {kind: round(share * num_rows) for kind, share in JUNK_SHARES.items()}
    num_good = num_rows - sum(num_junk.values())
    copies = _plan_copies(rng, num_junk, num_good)
    group_of = {scene: group for _, scene, group in copies}
    rows = [("good", scene, group_of.get(scene)) for scene in range(num_good)] + copies
    next_scene = num_good
    for kind, count in num_junk.items():
        if kind not in MAX_COPIES:
            group = 0 if kind == "placeholder" else None
            rows += [(kind, next_scene + i, group) for i in range(count)]
            next_scene += count
    return _shuffled(rng, rows)


def _shuffled(
    rng: np.random.Generator, rows: list[tuple[str, int, int | None]]
) -> list[PlannedRow]:
    order = rng.permutation(len(rows)).tolist()
    return [PlannedRow(serial, *rows[serial]) for serial in order]


def _plan_copies(
    rng: np.random.Generator, num_junk: dict[str, int], num_good: int
) -> list[tuple[str, int, int | None]]:
    """Return (kind, scene, group) of every copy; no scene has two groups, group 0 is none's."""
    sizes = [
        (kind, size)
        for kind, limit in MAX_COPIES.items()
        for size in _group_sizes(rng, num_junk[kind], limit)
    ]
    originals = rng.permutation(num_good)[: len(sizes)].tolist()
    if len(originals) < len(sizes):
        raise ValueError(f"{num_good} good rows are too few for {len(sizes)} duplicate groups")
    return [
        (kind, scene, group)
        for group, ((kind, size), scene) in enumerate(zip(sizes, originals, strict=True), start=1)
        for _ in range(size)
    ]


def _group_sizes(rng: np.random.Generator, total: int, limit: int) -> list[int]:
    """Return numbers of copies, 1 to `limit` each, that add up to `total`."""
    weights = np.arange(1, limit + 1, dtype=np.float64) ** -1.7
    draws = rng.choice(limit, size=total, p=weights / weights.sum()) + 1
    ends = np.cumsum(draws)
    num_groups = int(np.searchsorted(ends, total)) + 1 if total else 0
    sizes: list[int] = draws[:num_groups].tolist()
    if sizes:
        sizes[-1] -= int(ends[num_groups - 1]) - total
    return sizes
