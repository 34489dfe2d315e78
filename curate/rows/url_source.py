"""Tables of URLs -> SAMPLES, by shards of `rows_per_shard` rows, as img2dataset numbers them.

Each file is cut into slices of that many rows, the last may be smaller; slices are numbered on over
the files, in shard order. Slice n is img2dataset's shard n where it reads the files in the same
order (it sorts by name: the same for names whose numbers have leading zeros).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa

from curate.rows import laion, score_tables, table_files
from curate.rows.columns import URL_ALIASES, choose
from curate.rows.url_rows import Made, Place, samples_of
from curate.source_config import SourceConfig
from manifests import paths
from manifests.errors import PartDamaged, UserError
from manifests.schemas import QUARANTINE, SAMPLES, VERDICTS, empty
from manifests.strict import Strict
from manifests.work import Item, Output, part_name

_NOT_TABLES = "_stats.json"  # img2dataset's, beside its parquet files
_SHOWN_CHARACTERS = 500
_JSON = ("json", "jsonl")
_JSON_VERSION = 2
"""Raised whenever the same JSON files would give other rows: it makes them another input."""
_NO_CAPTIONS = (
    "{shown} has no column of captions (named {known}, in any case), so its captions are empty. "
    "Its columns: {columns}"
)


@lru_cache(maxsize=8)
def files_of(source: SourceConfig) -> tuple[str, tuple[str, ...]]:
    """Return (root, names below it in shard order) of a source's tables.

    Raises: UserError when there is none, or a folder has tables of several forms.
    """
    root, names = paths.expand(source.location, suffix=table_files.SUFFIXES)
    names = [name for name in names if not name.endswith(_NOT_TABLES)]
    forms = sorted({table_files.form_of(name) for name in names})
    fs, local = paths.filesystem(source.location)
    if len(forms) > 1 and fs.isdir(local):
        raise UserError(
            f"{source.location!r} holds files of several forms: {', '.join(forms)}.",
            "They may be the same table twice.",
            f"Say which: {paths.join(source.location, '*.' + forms[0])}, or a list with '::'.",
        )
    return root, tuple(names)


def identity(source: SourceConfig) -> list[list[Any]]:
    """Return [name, size, modification time] of each table, and of each that is joined."""
    files_of.cache_clear()
    names_in.cache_clear()
    first_names_in.cache_clear()
    table_files.close()
    root, names = files_of(source)
    found = [[name, *paths.identity_of(paths.join(root, name))] for name in names]
    if any(table_files.form_of(name) in _JSON for name in names):
        found.append(["json", _JSON_VERSION])
    return found + score_tables.identity(source.join)


@lru_cache(maxsize=1 << 16)
def names_in(path: str) -> tuple[str, ...]:
    """Return the names of a table's columns; of JSON none. Raises: UserError."""
    return tuple(table_files.column_names(path))


@lru_cache(maxsize=1 << 16)
def first_names_in(path: str) -> tuple[str, ...]:
    """Return the names of a table's columns; of JSON, of its first rows. Raises: UserError."""
    return tuple(table_files.first_names(path))


def plan(source: SourceConfig) -> list[Item]:
    """One item per part: `shards_per_part` consecutive slices, of one file or several.

    Raises: UserError for a file that cannot be read or has no URLs, and for what cannot be joined.
    """
    root, names = files_of(source)
    for name in names:
        _check_columns(source, paths.join(root, name))
    counts = [table_files.count_rows(paths.join(root, name)) for name in names]
    slices = list(_slices(names, counts, source.rows_per_shard))
    starts = range(0, len(slices), source.shards_per_part)
    if not slices:
        raise UserError(f"{source.location!r} has no rows.", "Its tables are empty.", "Check them.")
    step = source.shards_per_part
    return [_item(part, first, slices[first : first + step]) for part, first in enumerate(starts)]


def ingest_part(source: SourceConfig, payload: Mapping[str, Any]) -> Output:
    """Read one part. Raises: PartDamaged when a file is no longer what was planned."""
    made = list(_made(source, payload))
    samples = pa.concat_tables([empty(SAMPLES), *(one.samples for one in made)])
    counts = sum((one.counts for one in made), Counter[str]())
    samples, notes = score_tables.filled(samples, source, counts)
    return Output(
        files={f"{part_name(payload['part'])}.parquet": samples},
        verdicts=pa.concat_tables([empty(VERDICTS), *(one.verdicts for one in made)]),
        quarantine=pa.concat_tables([empty(QUARANTINE), *(one.quarantine for one in made)]),
        notes=notes,
    )


def warnings(source: SourceConfig, sections: Mapping[str, Strict]) -> list[str]:
    """Return what a person should know of these tables before they are used."""
    root, names = files_of(source)
    tables = {name: names_in(paths.join(root, name)) for name in names}
    found = []
    old = [name for name in names if laion.is_withdrawn(first_names_in(paths.join(root, name)))]
    if old:
        found.append(laion.WITHDRAWN.format(shown=_shown(old)))
    untold = [name for name, columns in tables.items() if _lacks_captions(name, columns)]
    if untold and _judges_captions(sections):
        columns = ", ".join(tables[untold[0]])[:_SHOWN_CHARACTERS]
        known = " or ".join(URL_ALIASES["caption"])
        found.append(_NO_CAPTIONS.format(shown=_shown(untold), known=known, columns=columns))
    return found + score_tables.punsafe_warnings(list(tables.values()), source, sections)


def _shown(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _lacks_captions(name: str, columns: tuple[str, ...]) -> bool:
    """Tell whether a table has no captions; of JSON each row has its own columns."""
    return table_files.form_of(name) not in _JSON and "caption" not in choose(columns)


def _judges_captions(sections: Mapping[str, Strict]) -> bool:
    """Tell whether anything becomes of a row by its caption."""
    rules = sections.get("filter")
    limits = ("min_caption_chars", "min_caption_words")
    return "embed" in sections or any(getattr(rules, one, 0) for one in limits)


def _made(source: SourceConfig, payload: Mapping[str, Any]) -> Iterator[Made]:
    root, names = files_of(source)
    for name, first_row, num_rows, shard_index in payload["spans"]:
        if name not in names:
            raise PartDamaged(f"{name} is gone from the source.")
        row, path = first_row, paths.join(root, name)
        swapped = _sizes_are_swapped(source, path)
        for batch in table_files.read_rows(path, first_row, num_rows):
            shard = shard_index + (row - first_row) // source.rows_per_shard
            place = Place(name, row, shard, source.rows_per_shard)
            yield samples_of(batch, place, source, sizes_are_swapped=swapped)
            row += batch.num_rows


def _sizes_are_swapped(source: SourceConfig, path: str) -> bool:
    """Tell whether the width of a table is to be read from its height."""
    swapped = source.swapped_sizes
    return laion.has_swapped_sizes(first_names_in(path)) if swapped == "auto" else swapped


def _check_columns(source: SourceConfig, path: str) -> None:
    """Check that a table has URLs, and what the joins need. Raises: UserError."""
    if table_files.form_of(path) in _JSON:
        return  # each row has its own
    names = names_in(path)
    columns = choose(names, URL_ALIASES)
    if "url" not in columns:
        fix = f"Name one of them {' or '.join(URL_ALIASES['url'])}, in any case."
        if any("://" in name for name in names):
            fix = "These are a row's values: write a line of names above it, such as url,caption."
        raise UserError(
            f"{path} has no column of URLs.",
            f"Its columns: {', '.join(names)[:_SHOWN_CHARACTERS]}.",
            fix,
        )
    score_tables.must_have_hash(path, names, source)


def _slices(
    names: tuple[str, ...], counts: list[int], rows_per_shard: int
) -> Iterator[tuple[str, int, int]]:
    """Yield (file, first row, rows) of each slice."""
    for name, count in zip(names, counts, strict=True):
        for first in range(0, count, rows_per_shard):
            yield name, first, min(rows_per_shard, count - first)


def _item(part: int, first_shard: int, slices: list[tuple[str, int, int]]) -> Item:
    """Return the item of consecutive slices; those of one file are read as one span."""
    spans: dict[str, list[Any]] = {}
    for at, (name, first, rows) in enumerate(slices):
        span = spans.setdefault(name, [name, first, 0, first_shard + at])
        span[2] += rows
    payload = {
        "part": part,
        "first_shard_index": first_shard,
        "shards": [name for name, _, _ in slices],
        "spans": list(spans.values()),
    }
    return Item(part_name(part), payload, float(sum(rows for _, _, rows in slices)))
