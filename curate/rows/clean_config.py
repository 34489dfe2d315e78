"""The clean section of a recipe, and the outside files that it names."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from curate.rows import token_counts
from curate.rows.clean_rules import BenchmarkImages
from curate.rows.id_lists import digest_of, read_image_ids
from curate.rows.mend import MendConfig
from manifests import paths
from manifests.strict import Strict

_WHERE = "clean.leakage.ids"


class LeakageConfig(Strict):
    """A benchmark whose images must not be trained on."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"ids"})

    ids: str = Field(min_length=1)
    """Text file of image ids or names, one a line, white space around it aside. An id finds the
    image whose path, file name, file name without extension, or the latter's piece after its last
    underscore it is. A name of COCO's, as POPE has them (COCO_val2014_000000000042.jpg), means the
    number in it too: COCO's 2014 and 2017 sets name one image otherwise."""
    under: str = ""
    """Only images whose path begins so are looked at: ids of COCO mean other images elsewhere."""


class CleanConfig(MendConfig):
    """What is mended and what is dropped; the rules that need no number are always on."""

    tokenizer: str | None = None
    """Folder with a tokenizer.json, that file, or a repository of the Hugging Face hub: the one of
    the model to be trained. Local files are known by their content, the hub's by name."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Rows of more tokens are dropped; None keeps all. A trainer cuts them at the model's length:
    the answer's end is lost, and with it the token that ends it."""
    image_tokens: int = Field(default=729, ge=0)
    """Tokens that each image adds; 729 is SigLIP at 384 pixels and patches of 14: 27 x 27."""
    repeated_output_min_chars: int | None = Field(default=30, ge=1)
    """Characters; an answer of as many that stands in its question is dropped. Shorter ones may
    well repeat it, such as the option that was chosen. None switches the rule off."""
    leakage: list[LeakageConfig] = []
    """Benchmarks whose images are dropped, e.g. COCO's val2014 ids, which POPE asks about."""

    @model_validator(mode="after")
    def _can_count(self) -> Self:
        if self.max_tokens is not None and self.tokenizer is None:
            raise ValueError("max_tokens needs tokenizer: ..., which says what a token is")
        return self

    def located(self) -> Self:
        """Return the same config with absolute paths of local files."""
        found = super().located()
        if self.tokenizer is None or token_counts.local_file(self.tokenizer) is None:
            return found
        return found.model_copy(update={"tokenizer": paths.absolute(self.tokenizer)})

    def canonical(self) -> dict[str, Any]:
        """Return what decides the result; of the files it names, `identity` does."""
        values = super().canonical()
        del values["tokenizer"]
        return values


def identity(config: CleanConfig) -> dict[str, Any]:
    """Return what the files are: another list or tokenizer is another input.

    Raises: UserError when one is missing.
    """
    counts = config.max_tokens is not None and config.tokenizer is not None
    return {
        "leakage": [
            [paths.name_of(one.ids), digest_of(one.ids, where=_WHERE)] for one in config.leakage
        ],
        "tokenizer": token_counts.identity(config.tokenizer or "") if counts else None,
    }


def benchmark_images(config: CleanConfig) -> list[BenchmarkImages]:
    """Return the lists that the config names. Raises: UserError for one that cannot be read."""
    return [
        BenchmarkImages(read_image_ids(one.ids, where=_WHERE), one.under) for one in config.leakage
    ]
