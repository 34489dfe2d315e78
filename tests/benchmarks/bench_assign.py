"""The nearest centroid against FAISS's flat index, and k-means against FAISS's.

    python tests/benchmarks/bench_assign.py [--quick] [--out DIR]

Both sides of the search get their centroids ready before the clock starts, and FAISS its queries
as float32. K-means starts from the same rows on both sides; the objective is the mean |x - c|^2 of
rows held out, measured after each iteration while the clock stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import report
from alternatives import flat_index, flat_torch
from report import Options, Row
from synthetic import DIM, World

from curate.vectors import kmeans, lloyd
from curate.vectors.assign import assign, prepare

CHECKED_ROWS = 256
FAISS_ITERATIONS, MOST_ITERATIONS = 10, 40
SLACK = 1.005  # of FAISS's held-out objective


@dataclass(frozen=True, slots=True)
class Sizes:
    """Queries and numbers of centroids of the search; rows and clusters of k-means."""

    queries: int = 16_384
    centroids: tuple[int, ...] = (16_384, 1000)
    training_rows: int = 100_000
    held_out_rows: int = 20_000
    clusters: int = 1000
    dim: int = DIM


QUICK = Sizes(512, (300, 40), 2000, 500, 20, 64)


def compare(options: Options) -> Iterator[Row]:
    """Yield all rows."""
    sizes = QUICK if options.quick else Sizes()
    world = World.of(0, sizes.dim)
    for num_centroids in sizes.centroids:
        yield from searches(options, world, sizes.queries, num_centroids)
    yield from trainings(options, world, sizes)


def searches(options: Options, world: World, num_queries: int, count: int) -> Iterator[Row]:
    """Yield ratio and label errors beside a flat float32 search."""
    import torch

    queries = torch.from_numpy(world.rows(num_queries, part=99)).to(options.device)
    sample = world.parts(4 * count)
    centroids = lloyd.train(sample, num_clusters=count, iterations=2, seed=0)
    ready = prepare(centroids, _as_given(options, queries))
    what = f"{num_queries:,} rows x {count:,} centroids: assign"
    if options.device == "cuda":
        name, wide = "float32 products and argmax", queries.float()
        search = partial(flat_torch, wide, torch.from_numpy(centroids).to(wide.device))
    elif missing := report.skipped(f"{what} / IndexFlatL2", "faiss"):
        yield from missing
        return
    else:
        name, index, wide = "IndexFlatL2", flat_index(centroids), queries.float().numpy()
        search = lambda: index.search(wide, 1)[1][:, 0]  # noqa: E731 - beside the other one
    ours = partial(assign, _as_given(options, queries), ready)
    labels, theirs = ours().cluster, np.asarray(torch.as_tensor(search()).cpu())
    seconds = report.turns(options, {"ours": ours, "theirs": search})
    times = report.timed(seconds["ours"], seconds["theirs"])
    yield Row(f"{what} / {name}", **times, at_least=1.4)
    wrong = int((labels != exact_labels(queries.cpu().numpy(), centroids, labels)).sum())
    differ = f"{int((theirs != labels).sum())} of {num_queries:,} differ from ours"
    checked = f"{wrong} wrong of {min(num_queries, CHECKED_ROWS)} checked in float64"
    yield Row(f"{what}, labels", checked, f"{name}: {differ}", float(wrong), at_most=0.0)


def exact_labels(rows: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the labels with those of CHECKED_ROWS rows by definition, in exact float64."""
    found, wide = labels.copy(), centroids.astype(np.float64)
    chosen = np.random.default_rng(0).permutation(len(rows))[:CHECKED_ROWS]
    scores = rows[chosen].astype(np.float64) @ wide.T
    found[chosen] = ((wide * wide).sum(axis=1) - 2.0 * scores).argmin(axis=1)
    return found


def trainings(options: Options, world: World, sizes: Sizes) -> Iterator[Row]:
    """Yield the seconds to FAISS's objective after its iterations, and a little."""
    what = f"k-means, {sizes.training_rows:,} rows, {sizes.clusters:,} clusters"
    rows, held_out = world.parts(sizes.training_rows), world.rows(sizes.held_out_rows, part=98)
    if options.device == "cuda" or find_spec("faiss") is None:
        course = Course(options, held_out)
        our_iterations(rows, sizes.clusters, FAISS_ITERATIONS, course)
        words = (course.last(), "skipped: needs faiss, CPU")
        yield Row(f"{what}: {FAISS_ITERATIONS} iterations", *words)
        return
    theirs = Course(options, held_out)
    faiss_iterations(rows, sizes.clusters, theirs)
    ours = Course(options, held_out, enough=SLACK * theirs.objectives[-1])
    our_iterations(rows, sizes.clusters, MOST_ITERATIONS, ours)
    reached = ours.objectives[-1] <= ours.enough
    ratio = ours.seconds[-1] / theirs.seconds[-1] if reached else None
    name = f"{what}: seconds to FAISS's objective + 0.5%"
    yield Row(name, ours.last(), theirs.last(), ratio, at_most=0.65)
    first = next(at for at, one in enumerate(theirs.objectives) if one <= ours.enough)
    words = f"{theirs.seconds[first]:.4g} s ({first + 1} iterations)"
    ratio = ours.seconds[-1] / theirs.seconds[first] if reached else None
    yield Row(f"{name}, FAISS to there as well", ours.last(), words, ratio, at_most=0.65)


class EnoughError(Exception):
    """Raised to end a training that has reached its objective."""


@dataclass(slots=True)
class Course:
    """Objective on held-out rows and seconds used after each iteration; measuring costs none."""

    options: Options
    held_out: np.ndarray
    enough: float = -np.inf
    objectives: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _resumed: float = 0.0

    def start(self) -> None:
        """Let the clock run."""
        self._resumed = self.options.clock()

    def after_iteration(self, centroids: np.ndarray) -> None:
        """Stop the clock, measure, and let it run on. Raises: EnoughError."""
        used = self.options.clock() - self._resumed
        self.seconds.append(used + (self.seconds[-1] if self.seconds else 0.0))
        self.objectives.append(float(assign(self.held_out, centroids).d2.mean()))
        if self.objectives[-1] <= self.enough:
            raise EnoughError
        self.start()

    def last(self) -> str:
        """Return the last point in words."""
        count, objective = len(self.seconds), self.objectives[-1]
        return f"{self.seconds[-1]:.4g} s ({count} iterations, {objective:.4f})"


def faiss_iterations(rows: np.ndarray, count: int, course: Course) -> None:
    """Train as FAISS does, from the first centroids that Warren takes."""
    chosen = lloyd.first_rows(len(rows), count, 0, lambda at: rows[at])
    course.start()
    centroids, wide = rows[chosen].astype(np.float32), rows.astype(np.float32)
    for _ in range(FAISS_ITERATIONS):
        centroids, _ = kmeans.iterate(wide, centroids, num_threads=course.options.threads)
        course.after_iteration(centroids)


def our_iterations(rows: np.ndarray, count: int, iterations: int, course: Course) -> None:
    """Train as Warren does until the objective is reached."""
    import torch

    given = _as_given(course.options, torch.from_numpy(rows).to(course.options.device))
    course.start()
    with suppress(EnoughError):
        lloyd.train(
            given,
            num_clusters=count,
            iterations=iterations,
            seed=0,
            on_iteration=lambda _, __, centroids: course.after_iteration(centroids),
        )


def _as_given(options: Options, rows: Any) -> Any:
    """Return what Warren gets: an array on the CPU, a tensor where it is on a GPU."""
    return rows.numpy() if options.device == "cpu" else rows


if __name__ == "__main__":
    report.run(Path(__file__).stem, __doc__, compare, has_cuda=True)
