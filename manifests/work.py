"""What a stage is given and what it returns: View in, Items planned, Output per item.

A stage's two functions, `plan(view) -> list[Item]` and `work(view, item) -> Output`, read inputs
through the view and return values; `commit` alone writes them, marker last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests import paths, store
from manifests.errors import PartDamaged
from manifests.ledger import Tally, kept_uids, tally
from manifests.schemas import QUARANTINE, UID_ROW_BITS, VERDICTS, conform
from manifests.store import Content, Written
from manifests.strict import Strict

MARKERS = "_done"
_OTHER_PARTS = ("dedup", "select")
"""Stages whose parts are not the source's: a row's verdict may lie in any of their files."""
RECORD = "record.json"


@dataclass(frozen=True, slots=True)
class Item:
    """One unit of work, retry, resume and accounting.

    `name` is unique in the stage and fit for a file name. `payload` is JSON: what `work` must know.
    `cost` is relative; items run longest first.
    """

    name: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 1.0


@dataclass(frozen=True, slots=True)
class Output:
    """What one item made.

    `files` maps a path in the stage directory to its content. `verdicts` has one VERDICTS row per
    input row (None when the item decides nothing). `notes` are figures for the record; they are
    read after the files are written, so what writes a file may add to them.
    """

    files: Mapping[str, Content] = field(default_factory=dict)
    verdicts: pa.Table | None = None
    quarantine: pa.Table | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageDir:
    """A stage's directory, finished or not."""

    stage: str
    path: str

    def record(self) -> dict[str, Any] | None:
        """Return the record, or None while the stage is unfinished."""
        found = store.read_json(paths.join(self.path, RECORD))
        return found if isinstance(found, dict) else None

    def files(self, folder: str = "", prefix: str = "part-") -> list[str]:
        """Return the paths of the tables in a folder of this directory, in part order."""
        base = paths.join(self.path, folder) if folder else self.path
        names = [name for name in paths.list_names(base, ".parquet") if name.startswith(prefix)]
        return [paths.join(base, name) for name in paths.shard_order(names)]

    def verdict_files(self) -> list[str]:
        """Return the VERDICTS parts: those in verdicts/, or the parts themselves."""
        return self.files("verdicts", prefix="") or self.files()

    def verdicts_of(self, part: int) -> pa.Table:
        """Return the VERDICTS of one part of a stage that keeps the source's parts."""
        name = f"{part_name(part)}.parquet"
        beside = paths.join(self.path, "verdicts", name)
        found = beside if paths.size_of(beside) is not None else paths.join(self.path, name)
        return store.read_table(found)

    def markers(self) -> list[dict[str, Any]]:
        """Return the markers of finished items, in item order."""
        folder = paths.join(self.path, MARKERS)
        found = [store.read_json(paths.join(folder, n)) for n in paths.list_names(folder, ".json")]
        return [marker for marker in found if isinstance(marker, dict)]


@dataclass(frozen=True, slots=True)
class View:
    """What a stage may see: its config, the source, and the finished stages before it, in order."""

    stage: str
    config: Strict
    source: Strict
    seed: int
    path: str
    before: Mapping[str, StageDir] = field(default_factory=dict)

    @property
    def own(self) -> StageDir:
        """This stage's directory, for phases that read what an earlier phase wrote."""
        return StageDir(self.stage, self.path)

    @property
    def previous(self) -> StageDir:
        """The stage whose kept rows are this stage's input rows."""
        return list(self.before.values())[-1]

    def kept_in_part(self, part: int) -> npt.NDArray[np.uint64]:
        """Return the uids of one part that the previous stage kept, ascending.

        After dedup or select all kept uids of that stage are held in memory, 8 bytes each.
        """
        if self.previous.stage not in _OTHER_PARTS:
            return np.sort(kept_uids(self.previous.verdicts_of(part)))
        kept = _all_kept(self.previous)
        low, high = np.searchsorted(kept, self._ends_of(part))
        return kept[low:high]

    def all_kept(self) -> npt.NDArray[np.uint64]:
        """Return all uids that the previous stage kept, ascending (8 bytes a row)."""
        return _kept_by(self.previous)

    def _ends_of(self, part: int) -> npt.NDArray[np.uint64]:
        """Return the first uid of a part, and the first after it."""
        payload = next(one for one in self.parts() if int(one["part"]) == part)
        first = int(payload["first_shard_index"])
        ends = np.array([first, first + len(payload["shards"])], np.uint64)
        return ends << np.uint64(UID_ROW_BITS)

    @property
    def described_by(self) -> StageDir:
        """The stage whose SAMPLES tell where the rows' images lie: download, else ingest."""
        return self.before.get("download") or self.before["ingest"]

    def samples(self, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the SAMPLES rows of one part that the previous stage kept, by ascending uid.

        Args: columns: those to read, with "uid" among them; None for all.
        """
        path = paths.join(self.described_by.path, f"{part_name(part)}.parquet")
        table = store.read_table(path, columns)
        if self.previous.stage == "ingest":
            return table
        return table.filter(pc.is_in(table.column("uid"), pa.array(self.kept_in_part(part))))

    def parts(self) -> list[dict[str, Any]]:
        """Return ingest's items, which every part-wise stage shares: {"part": n, ...} each."""
        return list(_parts_of(self.before["ingest"]))


def _kept_by(directory: StageDir) -> npt.NDArray[np.uint64]:
    files = directory.verdict_files()
    kept = [kept_uids(store.read_table(path, ["uid", "keep"])) for path in files]
    return np.sort(np.concatenate([np.zeros(0, np.uint64), *kept]))


@lru_cache(maxsize=1)
def _all_kept(finished: StageDir) -> npt.NDArray[np.uint64]:
    """Return all uids that a finished stage kept, ascending; read once, as it never changes."""
    kept = _kept_by(finished)
    kept.setflags(write=False)
    return kept


@lru_cache(maxsize=4)
def _parts_of(ingest: StageDir) -> tuple[dict[str, Any], ...]:
    """Return a finished ingest's payloads by part; read once, as a finished stage never changes."""
    found = [marker["payload"] for marker in ingest.markers()]
    return tuple(sorted(found, key=lambda payload: int(payload["part"])))


def part_name(part: int) -> str:
    """Return the file stem of a part. Example: 7 -> "part-00007"."""
    return f"part-{part:05d}"


def commit(view: View, item: Item, output: Output, *, seconds: float) -> dict[str, Any]:
    """Write an item's files, then its marker, and return the marker.

    Verdicts are the part itself, or go to verdicts/ where the part is another table; quarantine
    rows go to quarantine/. Writing the same item twice is harmless: the bytes are the same.
    """
    written = [
        store.write(view.path, name, content) for name, content in _all_files(view, item, output)
    ]
    counts = tally(output.verdicts) if output.verdicts is not None else Tally()
    marker = {
        "item": item.name,
        "payload": dict(item.payload),
        "files": [_as_json(one) for one in written],
        "counts": counts.as_json(),
        "notes": dict(output.notes),
        "seconds": round(seconds, 3),
    }
    store.write_json(view.path, f"{MARKERS}/{item.name}.json", marker)
    return marker


def finished(directory: StageDir, item: Item) -> dict[str, Any] | None:
    """Return the item's marker if it is whole, for this payload, and its files have their sizes."""
    marker = store.read_json(paths.join(directory.path, MARKERS, f"{item.name}.json"))
    if not isinstance(marker, dict) or marker.get("payload") != dict(item.payload):
        return None
    return marker if not missing_files(directory, marker) else None


def missing_files(directory: StageDir, marker: Mapping[str, Any]) -> list[str]:
    """Return the paths of a marker's files that are missing or have another size."""
    return [
        one["path"]
        for one in marker["files"]
        if paths.size_of(paths.join(directory.path, one["path"])) != one["bytes"]
    ]


def must_be_whole(directory: StageDir, record: Mapping[str, Any]) -> None:
    """Check that a finished stage still has every file of its record. Raises: PartDamaged."""
    for part in record["parts"]:
        marker = f"{MARKERS}/{part['item']}.json"
        lost = missing_files(directory, part)
        if paths.size_of(paths.join(directory.path, marker)) is None:
            lost.append(marker)  # later stages learn from the markers which parts there are
        if lost:
            raise PartDamaged(
                f"{paths.join(directory.path, lost[0])} is missing or cut, but its stage is "
                f"recorded as finished. Delete {directory.path} and run again to make it anew."
            )


def _all_files(view: View, item: Item, output: Output) -> Iterator[tuple[str, Content]]:
    yield from output.files.items()
    name = f"{item.name}.parquet"
    if output.verdicts is not None:
        is_part = item.name.startswith("part-") and name not in output.files
        folder = "" if is_part else "verdicts/"
        yield folder + name, conform(output.verdicts, VERDICTS)
    if output.quarantine is not None and output.quarantine.num_rows:
        yield f"quarantine/{name}", conform(output.quarantine, QUARANTINE)


def _as_json(one: Written) -> dict[str, Any]:
    return {"path": one.path, "bytes": one.num_bytes, "sha256": one.sha256, "rows": one.num_rows}
