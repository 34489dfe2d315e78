"""The centroids stage: k-means on a seeded sample of all parts, every iteration saved.

    sample   each part gives its sampled rows; all of them stay resident in files
    rounds   one iteration each. lloyd: every shard of the sample adds up its rows, then the sums
             become centroids; sums are exact, so shards and workers change no bit. faiss: one item.
    finish   the last round's centroids

A round that is there is not made again, so a killed run goes on with the next one. Rounds end early
when nothing moves any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from curate.vectors import exact, kmeans, lloyd
from curate.vectors.exact import Float16Rows
from curate.vectors.lloyd import Sums
from curate.vectors.vector_parts import blocks_of
from manifests import ledger, paths, store
from manifests.errors import UserError
from manifests.strict import Strict
from manifests.work import Item, Output, StageDir, View, part_name

CENTROIDS = "centroids.npy"
ROWS_PER_CLUSTER = 20_000
FEWEST_CLUSTERS = 64
Grid = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class ClusterConfig(Strict):
    """How rows are grouped before near-duplicates are looked for within each group."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"centroids"})

    num_clusters: int | Literal["auto"] | None = None
    """Number of centroids, or auto: one per 20,000 rows, at least 64 where there are rows for them;
    the paper uses 100,000 for 2 billion rows."""
    centroids: str | None = None
    """An npy file [k, d] of finished centroids; nothing is trained then."""
    engine: Literal["lloyd", "faiss"] = "lloyd"
    """Who trains: lloyd gives the same bits on any machine and spreads over workers; faiss runs in
    one worker, and repeats exactly only with the same build of FAISS."""
    iterations: int = Field(default=20, ge=1)
    """Lloyd iterations, at most."""
    spherical: bool = False
    """Keep the centroids at norm 1, so that the nearest one has the largest cosine."""
    rows_per_centroid: int = Field(default=256, ge=1)
    """Training rows per centroid, about: a seeded sample of all parts."""
    min_rows_per_centroid: int = Field(default=39, ge=1)
    """Refuse to make more clusters than rows / this: they would be noise (FAISS warns too)."""
    training_shards: int = Field(default=4, ge=1)
    """Into how many items an iteration of lloyd is split; the result does not depend on it."""
    num_threads: int = Field(default=2, ge=1)
    """Threads of faiss; fixed here, not by the machine, for the same rounding everywhere."""

    @field_validator("num_clusters", mode="before")
    @classmethod
    def _is_a_number(cls, value: object) -> object:
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is None or value == "auto" or is_count:
            return value
        raise ValueError("Input should be a whole number of 1 or more, or auto")

    @model_validator(mode="after")
    def _says_which_clusters(self) -> Self:
        if self.num_clusters is None and self.centroids is None:
            raise ValueError(
                "one of num_clusters and centroids must be set, e.g. num_clusters: auto"
            )
        return self


def identity(config: ClusterConfig) -> str | None:
    """Return the digest of given centroids: another file is another input."""
    if config.centroids is None:
        return None
    return hashlib.sha256(_given(config).tobytes()).hexdigest()


def phases(config: ClusterConfig) -> list[tuple[Any, ...]]:
    """Return (plan, work, round) of every phase."""
    if config.centroids is not None:
        return [("plan_sample", "sample"), ("plan_finish", "finish")]
    rounds: list[tuple[Any, ...]] = [("plan_sample", "sample"), ("plan_first", "first")]
    for number in range(config.iterations):
        rounds += [("plan_sums", "sums", number), ("plan_means", "means", number)]
    return [*rounds, ("plan_finish", "finish")]


def plan_sample(view: View) -> list[Item]:
    """One item per source part."""
    config = _config(view)
    if config.centroids is None:
        checked_number(config, num_rows_of(view.previous))
    return [Item(part_name(one["part"]), {"part": one["part"]}) for one in view.parts()]


def sample(view: View, item: Item) -> Output:
    """Return one part's sampled rows, by uid; the stage keeps all rows."""
    part = item.payload["part"]
    kept = view.kept_in_part(part)
    verdicts = ledger.verdicts("centroids", kept, reasons=[""] * len(kept))
    if _config(view).centroids is not None:
        return Output(verdicts=verdicts)
    chosen = is_sampled(kept, *_sampling(view))
    found = [
        block.take(kept[chosen & np.isin(kept, block.uids)]) for block in blocks_of(view, part)
    ]
    rows = np.concatenate(found) if found else np.zeros((0, 1), np.float16)
    return Output({f"sample/{item.name}.npy": rows}, verdicts, notes={"training_rows": len(rows)})


def plan_first(view: View) -> list[Item]:
    """One item: which rows are the first centroids."""
    return [Item("first")]


def first(view: View, item: Item) -> Output:
    """Return the first centroids: a seeded sample of distinct rows."""
    config, rows = _config(view), _Sample.of(view)
    count = checked_number(config, num_rows_of(view.previous))
    chosen = lloyd.first_rows(rows.num_rows, count, view.seed, rows.at)
    made = lloyd.first_centroids(rows.at(chosen), spherical=config.spherical)
    return Output({_file(0): made}, notes={"training_rows": rows.num_rows})


def plan_sums(view: View, number: int) -> list[Item]:
    """One item per shard of the sample, where there are several."""
    shards = _Sample.of(view).shards(_config(view))
    if len(shards) == 1 or _has_converged(view, number):
        return []
    return [
        Item(f"sums-{number:03d}-{at:03d}", {"files": files}, cost=float(size))
        for at, (files, size) in enumerate(shards)
    ]


def sums(view: View, item: Item, number: int) -> Output:
    """Return what one shard adds to the next centroids, exactly."""
    rows = lloyd.on_own_device(_read(view, item.payload["files"]))
    found, _ = lloyd.step(rows, _centroids(view, number))
    figures = {"square_units": str(found.square_units)}
    files = {
        f"training/{item.name}.npy": found.sums,
        f"training/{item.name}.counts.npy": found.counts,
    }
    return Output(files, notes=figures)


def plan_means(view: View, number: int) -> list[Item]:
    """One item: the next centroids."""
    return [] if _has_converged(view, number) else [Item(f"round-{number:03d}")]


def means(view: View, item: Item, number: int) -> Output:
    """Return the centroids after this iteration, and the mean |x - c|^2 before it."""
    config, before = _config(view), _centroids(view, number)
    if config.engine == "faiss":
        rows = _read(view, _Sample.of(view).files)
        made, objective = kmeans.iterate(
            rows, before, num_threads=config.num_threads, spherical=config.spherical
        )
    else:
        found = _total(view, number, before)
        objective = found.objective(before)
        made = lloyd.next_centroids(found.sums, found.counts, spherical=config.spherical)
    notes = {"objective": objective, "has_converged": bool(np.array_equal(made, before))}
    return Output({_file(number + 1): made}, notes=notes)


def plan_finish(view: View) -> list[Item]:
    """One item: the centroids."""
    return [Item("centroids")]


def finish(view: View, item: Item) -> Output:
    """Return the centroids, float32 [k, d] on the grid 2^-24."""
    config = _config(view)
    if config.centroids is not None:
        given = _given(config)
        return Output({CENTROIDS: given}, notes={"clusters": len(given)})
    rounds = [one for one in view.own.markers() if one["item"].startswith("round-")]
    made = exact.round_to_grid(_centroids(view, len(rounds)))
    notes = {
        "clusters": len(made),
        "training_rows": _Sample.of(view).num_rows,
        "iterations": len(rounds),
        "objectives": [one["notes"]["objective"] for one in rounds],
    }
    return Output({CENTROIDS: made}, notes=notes)


def is_sampled(
    uids: npt.NDArray[np.uint64], num_wanted: int, num_rows: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Return which rows are trained on: those whose sample hash is in the wanted share of all.

    Each row is judged alone, so about `num_wanted` of `num_rows` are.
    """
    if num_wanted >= num_rows:
        return np.ones(len(uids), np.bool_)
    limit = np.uint64((num_wanted << 64) // num_rows)
    return np.asarray(exact.sample_hashes(uids, seed) < limit)


def is_trained_on(
    centroids: StageDir, seed: int
) -> Callable[[npt.NDArray[np.uint64]], npt.NDArray[np.bool_]]:
    """Return the function from uids to which of them a finished centroids stage trained on."""
    record = centroids.record() or {}
    config, num_rows = record["config"], int(record["rows_in"])
    if config.get("num_clusters") is None:
        return lambda uids: np.zeros(len(uids), np.bool_)
    clusters = int(record["notes"]["centroids"]["clusters"])
    wanted = clusters * int(config["rows_per_centroid"])
    return lambda uids: is_sampled(uids, wanted, num_rows, seed)


def num_rows_of(stage: StageDir) -> int:
    """Return how many rows a finished stage kept."""
    return int((stage.record() or {})["kept"])


class _Sample:
    """The sampled rows of all parts, in uid order, as files below the stage's directory."""

    def __init__(self, path: str, files: list[str], sizes: list[int]) -> None:
        self.path = path
        self.files = files
        self.sizes = sizes
        self.num_rows = sum(sizes)

    @classmethod
    def of(cls, view: View) -> _Sample:
        """Return the sample that the first phase made."""
        parts = [one for one in view.own.markers() if one["item"].startswith("part-")]
        found = [(one["item"], int(one["notes"]["training_rows"])) for one in parts]
        files = [(f"sample/{name}.npy", size) for name, size in found if size]
        if not files:
            raise _nothing_to_cluster()
        return cls(view.path, [name for name, _ in files], [size for _, size in files])

    def at(self, which: Ints) -> Float16Rows:
        """Return rows by number, ascending or not."""
        ends = np.cumsum(self.sizes)
        owner = np.searchsorted(ends, which, side="right")
        width = store.read_slice(paths.join(self.path, self.files[0]), 0, 0).shape[1]
        rows = np.empty((len(which), width), np.float16)
        for file in np.unique(owner):
            mine = np.flatnonzero(owner == file)
            array = store.read_array(paths.join(self.path, self.files[file]))
            rows[mine] = array[which[mine] - (ends[file] - self.sizes[file])]
        return rows

    def shards(self, config: ClusterConfig) -> list[tuple[list[str], int]]:
        """Return runs of files of about equal size: (paths, rows) each."""
        wanted = 1 if config.engine == "faiss" else min(config.training_shards, len(self.files))
        middle = np.cumsum(self.sizes) - np.array(self.sizes) / 2
        owner = (middle * wanted / self.num_rows).astype(int)
        runs = [np.flatnonzero(owner == shard) for shard in range(wanted)]
        return [
            ([self.files[at] for at in run], sum(self.sizes[at] for at in run))
            for run in runs
            if len(run)
        ]


def _total(view: View, number: int, before: Grid) -> Sums:
    """Return the sums of all shards of a round; of the whole sample, made here, for one shard."""
    shards = [one for one in view.own.markers() if one["item"].startswith(f"sums-{number:03d}-")]
    if not shards:
        rows = lloyd.on_own_device(_read(view, _Sample.of(view).files))
        return lloyd.step(rows, before)[0]
    return reduce(add, (_read_sums(view, one) for one in shards))


def _read_sums(view: View, marker: dict[str, Any]) -> Sums:
    base = paths.join(view.path, f"training/{marker['item']}")
    return Sums(
        np.asarray(store.read_array(f"{base}.npy")),
        np.asarray(store.read_array(f"{base}.counts.npy")),
        int(marker["notes"]["square_units"]),
    )


def _read(view: View, files: list[str]) -> Float16Rows:
    """Return the rows of some files in memory; of one file, mapped where it is local."""
    arrays = [store.read_array(paths.join(view.path, name)) for name in files]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _file(number: int) -> str:
    return f"training/centroids-{number:03d}.npy"


def _centroids(view: View, number: int) -> Grid:
    return np.asarray(store.read_array(paths.join(view.path, _file(number))), np.float32)


def _has_converged(view: View, number: int) -> bool:
    """Return whether an earlier round moved nothing, so that this one is not needed."""
    rounds = {one["item"]: one["notes"] for one in view.own.markers()}
    last = rounds.get(f"round-{number - 1:03d}")
    return number > 0 and (last is None or bool(last["has_converged"]))


def _sampling(view: View) -> tuple[int, int, int]:
    """Return (rows wanted, rows there are, seed)."""
    config, num_rows = _config(view), num_rows_of(view.previous)
    return checked_number(config, num_rows) * config.rows_per_centroid, num_rows, view.seed


def checked_number(config: ClusterConfig, num_rows: int) -> int:
    """Return the number of clusters for so many rows. Raises: UserError when it is too large."""
    if not num_rows:
        raise _nothing_to_cluster()
    most = max(1, num_rows // config.min_rows_per_centroid)
    if config.num_clusters == "auto":
        return min(most, max(FEWEST_CLUSTERS, num_rows // ROWS_PER_CLUSTER))
    assert isinstance(config.num_clusters, int), "the config was checked when it was read"
    if config.num_clusters > most:
        raise UserError(
            f"{config.num_clusters} clusters were asked for, from {num_rows} rows.",
            f"That is less than {config.min_rows_per_centroid} rows for each.",
            f"Set cluster.num_clusters to {most} or less, or lower cluster.min_rows_per_centroid.",
        )
    return config.num_clusters


def _nothing_to_cluster() -> UserError:
    return UserError(
        "No row is left to cluster.",
        "The stages before dropped all of them; `warren funnel` says why.",
        "Loosen their limits.",
    )


def _config(view: View) -> ClusterConfig:
    return ClusterConfig.model_validate(view.config)


def _given(config: ClusterConfig) -> Grid:
    path = config.centroids or ""
    try:
        array = np.asarray(store.read_array(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cluster.centroids {path!r} cannot be read.",
            f"{error}.",
            "Give the path of an npy file, relative to the folder where the command runs.",
        ) from error
    if array.ndim != 2 or array.dtype.kind != "f" or not np.isfinite(array).all() or not len(array):
        raise UserError(
            f"cluster.centroids {path!r} is {array.dtype} {array.shape}.",
            "Centroids are a finite float array [clusters, dimensions].",
            "Give another file.",
        )
    if config.num_clusters not in (None, "auto", len(array)):
        raise UserError(
            f"cluster.num_clusters is {config.num_clusters}, but {path!r} has {len(array)} rows.",
            "With given centroids the file decides.",
            "Remove num_clusters.",
        )
    return np.asarray(exact.round_to_grid(array), dtype=np.float32)
