"""Conditions on instruction rows, as recipes write them, and how rows meet them.

Rows are frames with the columns key, num_images and first_image (null for text-only rows).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

import polars as pl
from pydantic import BeforeValidator, Field, model_validator

from curate.rows.id_lists import read_ids
from manifests.strict import Strict

WHERE = "recipe.mix: ids"
"""What names a list of row ids, for errors."""

_Text = Annotated[str, Field(min_length=1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[_Text], BeforeValidator(_as_list), Field(min_length=1)]
"""One text, or a list of which any will do."""


class Conditions(Strict):
    """What a row must be; all that are given must hold, and none given holds for every row."""

    has_image: bool | None = None
    """true: rows with images; false: text-only rows."""
    id_prefix: Texts | None = None
    """The row's id begins so, or with one of these."""
    id_not_prefix: Texts | None = None
    """The row's id begins with none of these."""
    image_under: _Text | None = None
    """The row's first image lies in this folder, as the row names it: "coco" means coco/..."""


class RowRule(Conditions):
    """Rows that a source's include or exclude means. Raises: an empty rule would mean all."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"ids"})

    ids: _Text | None = None
    """A text file of row ids, one a line, white space around them aside: the row is listed."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(value is None for _, value in self):
            raise ValueError(f"a rule needs a condition: {', '.join(type(self).model_fields)}")
        return self


class Where(Conditions):
    """Rows that a published count counts."""

    source: Texts | None = None
    """The row's source is this, or one of these."""

    @property
    def needs_the_row(self) -> bool:
        """Whether more than the source must be known, so that unreadable rows cannot be told."""
        return any(value is not None for name, value in self if name != "source")


def _as_wheres(value: Any) -> Any:
    return [value] if isinstance(value, Mapping | Where) else value


Wheres = Annotated[list[Where], BeforeValidator(_as_wheres), Field(min_length=1)]
"""One description of rows, or a list of which any will do."""


def meets_any(wheres: Sequence[Where]) -> pl.Expr:
    """Return whether a row meets one of the descriptions, never null."""
    return pl.any_horizontal(map(meets, wheres))


def meets(rule: Conditions) -> pl.Expr:
    """Return whether a row meets the rule, never null. Raises: UserError for unreadable ids.

    A `Where` with sources also reads the column source.
    """
    every_row = pl.repeat(True, pl.len())  # a lone literal would be one row
    return pl.all_horizontal(every_row, *_conditions(rule)).fill_null(False)


def _conditions(rule: Conditions) -> Iterator[pl.Expr]:
    key = pl.col("key")
    if rule.has_image is not None:
        yield (pl.col("num_images") > 0) == rule.has_image
    if rule.id_prefix is not None:
        yield _begins(key, rule.id_prefix)
    if rule.id_not_prefix is not None:
        yield ~_begins(key, rule.id_not_prefix)
    if rule.image_under is not None:
        yield pl.col("first_image").str.starts_with(rule.image_under.rstrip("/") + "/")
    if isinstance(rule, RowRule) and rule.ids is not None:
        yield key.is_in(pl.Series(read_ids(rule.ids, where=WHERE), dtype=pl.String).implode())
    if isinstance(rule, Where) and rule.source is not None:
        yield pl.col("source").is_in(rule.source)


def _begins(column: pl.Expr, prefixes: list[str]) -> pl.Expr:
    return pl.any_horizontal(column.str.starts_with(prefix) for prefix in prefixes)
