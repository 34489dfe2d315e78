"""The turns and images of many conversations, flat: one entry a turn, row after row.

Rules then look at whole columns instead of at one conversation after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from curate.media.llava_rows import IMAGE_PLACEHOLDER
from manifests.schemas import CONVERSATIONS, TURN, conform

SYSTEM, HUMAN, GPT, UNKNOWN = range(4)
ROLES = ("system", "human", "gpt")
"""Role of each code but UNKNOWN."""

BLANK = rf"\A(?:\s|{IMAGE_PLACEHOLDER})*\z"
"""Regular expression of a text that is white space once its placeholders are taken out."""

Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Flat:
    """Entries of n rows, one row after another; row r has entries starts[r] to starts[r + 1].

    starts: int64 [n + 1], the first is 0.
    """

    starts: Ints

    @property
    def num_rows(self) -> int:
        """Number of rows n."""
        return len(self.starts) - 1

    @property
    def counts(self) -> Ints:
        """Entries of each row, int64 [n]."""
        return np.diff(self.starts)

    @property
    def row(self) -> Ints:
        """Row of each entry, int64 [entries]."""
        return np.repeat(np.arange(self.num_rows), self.counts)

    def sums(self, values: npt.NDArray[np.generic]) -> Ints:
        """Return the sum of each row's values, int64 [n]. Args: values: numbers [entries]."""
        running = np.zeros(len(values) + 1, np.int64)
        np.cumsum(values, out=running[1:])
        return np.diff(running[self.starts])

    def any(self, mask: Mask) -> Mask:
        """Return which rows have a marked entry, bool [n]. Args: mask: bool [entries]."""
        return self.sums(mask) > 0


@dataclass(frozen=True, slots=True)
class Images(Flat):
    """The images of n rows. path: String [entries], as given."""

    path: pl.Series

    @classmethod
    def of(cls, conversations: pa.Table) -> Self:
        """Return those of a CONVERSATIONS table."""
        starts, paths = _flattened(conversations, "images")
        return cls(starts, pl.Series("path", paths, pl.String))


@dataclass(frozen=True, slots=True)
class Turns(Flat):
    """The turns of n conversations. role, text: String [turns]; code: the role's, uint8 [turns]."""

    role: pl.Series
    text: pl.Series
    code: Codes

    @classmethod
    def of(cls, conversations: pa.Table) -> Self:
        """Return those of a CONVERSATIONS table."""
        starts, turns = _flattened(conversations, "turns")
        role = pl.Series("role", turns.field("role"), pl.String)
        text = pl.Series("text", turns.field("text"), pl.String)
        return cls(starts, role, text, _codes(role))

    @property
    def has_system(self) -> Mask:
        """Which conversations begin with a system turn, bool [n]."""
        found = self.counts > 0
        found[found] = self.code[self.starts[:-1][found]] == SYSTEM
        return found

    def is_blank(self) -> Mask:
        """Return which turns say nothing, placeholders aside, bool [turns]."""
        return self.text.str.contains(BLANK).to_numpy()

    def num_placeholders(self) -> Ints:
        """Return how many images stand in each turn's text, int64 [turns]."""
        return _ints(self.text.str.count_matches(IMAGE_PLACEHOLDER, literal=True))

    def num_chars(self) -> Ints:
        """Return the characters of each turn's text, placeholders included, int64 [turns]."""
        return _ints(self.text.str.len_chars())

    def only(self, mask: Mask) -> Turns:
        """Return the same conversations with the marked turns alone. Args: mask: bool [turns]."""
        starts = np.concatenate([[0], np.cumsum(self.sums(mask))])
        marked = pl.Series(mask)
        return Turns(starts, self.role.filter(marked), self.text.filter(marked), self.code[mask])

    def with_text(self, text: pl.Series) -> Turns:
        """Return the same turns with another text. Args: text: String [turns]."""
        return Turns(self.starts, self.role, text, self.code)

    def put_into(self, conversations: pa.Table) -> pa.Table:
        """Return the CONVERSATIONS table with these turns in place of its own."""
        columns = [as_strings(self.role), as_strings(self.text)]
        values = pa.StructArray.from_arrays(columns, fields=list(TURN))
        kind = CONVERSATIONS.field("turns")
        starts = pa.array(self.starts, pa.int32())
        turns = pa.ListArray.from_arrays(starts, values, type=kind.type)
        at = conversations.schema.get_field_index("turns")
        return conform(conversations.set_column(at, kind, turns), CONVERSATIONS)


def as_strings(series: pl.Series) -> pa.Array:
    """Return a String series as an arrow string array in one piece."""
    found = series.to_arrow(compat_level=pl.CompatLevel.oldest())
    return found.cast(pa.string())


def _flattened(conversations: pa.Table, column: str) -> tuple[Ints, pa.Array]:
    """Return (starts, all entries) of a list column."""
    lists = conversations.column(column).combine_chunks()
    counts = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]), lists.flatten()


def _codes(role: pl.Series) -> Codes:
    found = np.full(len(role), UNKNOWN, np.uint8)
    for code, name in enumerate(ROLES):
        found[(role == name).to_numpy()] = code
    return found


def _ints(series: pl.Series) -> Ints:
    found: Ints = series.to_numpy().astype(np.int64)
    return found
