"""The mix section of a recipe: which rows of which source, how often, and what counts to expect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from curate.rows.id_lists import digest_of
from curate.rows.row_rules import WHERE, RowRule, Texts, Wheres
from manifests.errors import UserError
from manifests.strict import Strict, nearest

MAX_COPIES = 1000
MAX_SAMPLES = 10**9


class SourceMix(Strict):
    """Which rows of one source are taken, and how often. The default takes each row once."""

    include: list[RowRule] = []
    """A row must meet one of these, if there are any."""
    exclude: list[RowRule] = []
    """A row must meet none of these."""
    weight: float = Field(default=1.0, ge=0, le=MAX_COPIES)
    """Samples per row left: 0.5 takes half of the rows, 2.5 each row twice and half of them once
    more. Samples are weight times rows, rounded to the nearest, halves up."""
    num_rows: int | None = Field(default=None, ge=0, le=MAX_SAMPLES)
    """Samples in all, in place of weight: of fewer rows, all are taken as often as they fit in, and
    some once more."""

    @model_validator(mode="after")
    def _says_how_many_once(self) -> Self:
        if self.num_rows is not None and self.weight != 1:
            raise ValueError("weight and num_rows both say how many; give one of them")
        return self


class Replace(Strict):
    """Text-only rows that another source's rows stand for.

    Bunny's rule: the ShareGPT rows of SVIT-mix-665K are left out and WizardLM's 70,000 are taken
    (arXiv:2402.11530, section 2.2).
    """

    text_only_of: Texts
    """The source, or sources, whose rows without image are dropped."""
    substitute: Annotated[str, Field(min_length=1, alias="with")]
    """The source taken in their place, under its own rules."""

    @model_validator(mode="after")
    def _has_two_sources(self) -> Self:
        if self.substitute in self.text_only_of:
            raise ValueError("a source cannot stand for its own rows, which are dropped")
        return self


class Published(Strict):
    """A count that somebody published of rows as they come, to compare with; it changes nothing."""

    name: str
    rows: int = Field(ge=0)
    """Rows that were published."""
    where: Wheres
    """Which rows were counted, or several kinds of which any will do; {} means all rows."""
    origin: str
    """Where the number is from."""


class MixConfig(Strict):
    """Which rows are written, how often and in which order.

    A row is judged by `replace`, then by its source's include and exclude, then as a duplicate;
    of what is left, weight or num_rows of its source sample.
    """

    replace: Replace | None = None
    """Text-only rows to leave out for those of another source."""
    sources: dict[str, SourceMix] = {}
    """Name of a source in source.files -> its rules; a source not named is taken whole."""
    dedup: Literal["all", "none"] = "all"
    """all: of rows with the same images and turns, in whichever source, only the first is taken:
    the order is that of source.files, then of the file. none: all are."""
    shuffle: bool = True
    """By the recipe's seed. Otherwise rows come as in the files, copies one after the other."""
    samples_per_shard: int = Field(default=10_000, ge=1)
    """Samples of one tar; the last has the rest. Readers want several shards per worker."""
    published: list[Published] = []
    """Counts to compare with what came in: `warren counts` does."""


def check_names(config: MixConfig, names: Sequence[str]) -> None:
    """Check that the section names only sources that there are.

    Args: names: the keys of source.files.
    Raises: UserError, with the nearest name.
    """
    for place, name in _named(config):
        if name not in names:
            guess = nearest(name, list(names))
            raise UserError(
                f"recipe.mix.{place} names {name!r}, which is not a source.",
                f"recipe.source.files has: {', '.join(names)}.",
                f"Did you mean {guess!r}?" if guess else "Add it there, or remove it here.",
            )


def identity(config: MixConfig) -> dict[str, Any]:
    """Return the digests of the files of ids, in the order of the rules that name them.

    Raises: UserError when one is missing.
    """
    return {
        name: {"include": _digests(one.include), "exclude": _digests(one.exclude)}
        for name, one in config.sources.items()
        if any(rule.ids is not None for rule in [*one.include, *one.exclude])
    }


def _named(config: MixConfig) -> Iterator[tuple[str, str]]:
    """Yield (place in the section, source named there)."""
    if config.replace is not None:
        for name in config.replace.text_only_of:
            yield "replace.text_only_of", name
        yield "replace.with", config.replace.substitute
    for name in config.sources:
        yield "sources", name
    for at, one in enumerate(config.published):
        for name in (name for where in one.where for name in where.source or []):
            yield f"published.{at}.where.source", name


def _digests(rules: Sequence[RowRule]) -> list[str | None]:
    return [None if rule.ids is None else digest_of(rule.ids, where=WHERE) for rule in rules]
