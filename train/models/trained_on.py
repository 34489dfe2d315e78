"""Was this sample, or this very image, trained on? Asked of a model or of a run.

A name is a sample's key, its uid, or the path of an image file. An image is met only where shards
hold exactly its bytes: those of equal size are read and compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests import paths, store
from manifests.errors import UserError
from train.data.cuts import Ints
from train.data.index import Index
from train.learn.run import INPUTS
from train.models.draws import Draw, Draws
from train.models.finished_run import FinishedRun
from train.models.provenance import TRAINING, runs_in, unknown_parts

_MAX_UID = 2**64
_UID = re.compile("0|[1-9][0-9]{0,19}")  # shards number keys with zeros in front: 000000016


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one row of a run's data; or, without a key, why a run cannot tell.

    run: "pretrain" or "finetune"; run_dir: its folder; directory: of the row's shards.
    trained: None where it cannot be told. why: of a row that was not trained on, or a run that
    cannot tell. draws: when it was learned from. warnings: what speaks against this answer.
    """

    run: str
    run_dir: str
    directory: str = ""
    key: str = ""
    uid: int | None = None
    source: str = ""
    trained: bool | None = None
    why: str = ""
    draws: tuple[Draw, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {
            "draws": [one._asdict() for one in self.draws],
            "warnings": list(self.warnings),
        }


def trained_on(model_dir: str, name: str) -> list[Finding]:
    """Return every row that a name means, in all runs that a model was made by; [] for none.

    Args:
        model_dir: an exported or averaged model, or the folder of a finished run.
        name: a sample's key in the shards, a uid, or the path of an image file.

    A run whose data are gone or changed gives one finding whose `trained` is None.
    Raises: UserError when the directory is neither, or an unfinished run.
    """
    runs, silent = _runs_of(model_dir)
    found = [one for run in runs for one in _found_in(run, name)]
    return [*found, *(Finding("unknown", one, why="it has no training.json") for one in silent)]


def _runs_of(model_dir: str) -> tuple[list[FinishedRun], list[str]]:
    """Return the runs, and the directories of averaged models that do not tell theirs."""
    training = store.read_json(paths.join(model_dir, TRAINING))
    if training is not None:
        return [FinishedRun.from_json(one) for one in runs_in(training)], unknown_parts(training)
    if paths.exists(paths.join(model_dir, INPUTS)):
        run = FinishedRun.read(model_dir)
        base = store.read_json(paths.join(run.model_dir, TRAINING))
        return [*map(FinishedRun.from_json, runs_in(base)), *run.earlier()], []
    raise UserError(
        f"{model_dir} has neither {TRAINING} nor {INPUTS}.",
        "They tell what a model, or a run, was made of.",
        "Name a directory that export or average wrote, or the folder of a training run.",
    )


def _found_in(run: FinishedRun, name: str) -> Iterator[Finding]:
    try:
        draws = Draws.of(run)
    except UserError as error:
        yield Finding(run.role, run.path, why=f"{error.what} {error.why}")
        return
    for row in _rows_named(draws.index, name):
        yield _finding(draws, int(row))


def _finding(draws: Draws, row: int) -> Finding:
    index, drawn = draws.index, tuple(draws.of_row(row))
    why = _why_not(draws, row, drawn)
    return Finding(
        run=draws.run.role,
        run_dir=draws.run.path,
        directory=index.directory[index.shard[row]],
        key=index.key[row].as_py(),
        uid=int(index.uid[row]),
        source=index.sources[index.source[row]],
        trained=not why,
        why=why,
        draws=() if why else drawn,
        warnings=draws.warnings,
    )


def _why_not(draws: Draws, row: int, drawn: tuple[Draw, ...]) -> str:
    """Return why a row was not trained on, or ""."""
    if not draws.is_chosen[row]:
        return f"not in the subset {draws.run.subset}"
    if row in draws.reasons:
        return f"dropped: {draws.reasons[row]}"
    if drawn:
        return ""
    weights = draws.run.config.plan.weights
    source = draws.index.sources[draws.index.source[row]]
    if weights.get(source, 1) < 1:
        return f"never drawn: its source {source} has the weight {weights[source]:g}"
    return "never drawn: it was left over when the last step was full (keep_last: false)"


def _rows_named(index: Index, name: str) -> Ints:
    """Return the rows that a key, a uid or an image file means, ascending."""
    found = [
        np.flatnonzero(pc.equal(index.key, pa.scalar(name, pa.large_string())).to_numpy(False))
    ]
    if _UID.fullmatch(name) and int(name) < _MAX_UID:
        found.append(np.flatnonzero(index.uid == np.uint64(int(name))))
    if Path(name).is_file():
        found.append(_rows_with_image(index, Path(name).read_bytes()))
    rows: Ints = np.unique(np.concatenate(found))
    return rows


def _rows_with_image(index: Index, image: bytes) -> Ints:
    """Return the rows, of which an image is exactly these bytes."""
    of_size = np.flatnonzero(index.image_size == len(image))
    rows = np.searchsorted(index.image_starts, of_size, side="right") - 1
    equal = [
        index.files.read(index.shards[index.shard[row]], int(index.image_offset[at]), len(image))
        == image
        for at, row in zip(of_size, rows, strict=True)
    ]
    found: Ints = rows[np.array(equal, np.bool_)]
    return found
