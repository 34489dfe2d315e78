"""The decontaminate section of a recipe, and the outside files that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from curate.contamination import benchmark_files
from curate.rows.id_lists import digest_of
from curate.vectors import clip_model
from curate.vectors.embed import EmbedConfig
from manifests import paths
from manifests.errors import UserError
from manifests.strict import Strict


class BenchmarkSet(Strict):
    """An evaluation set: its images, its texts, or both."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"images", "texts"})

    images: str | list[str] | None = None
    """Folders (with all below them), tars (a path, glob or braces ending in .tar) or image files;
    one or several. What an image is, its suffix says; other files are passed over."""
    texts: str | list[str] | None = None
    """Files of texts: .txt (one a line), .jsonl, .json (a list, or JSON lines as POPE has them),
    .csv or .tsv (with a head line); one or several."""
    column: str | None = None
    """Field or column with the text, where lines are objects or a table; a list of texts counts as
    each of them. None: lines, or the strings of a JSON list, are the texts."""

    @model_validator(mode="after")
    def _has_something(self) -> Self:
        if not self.images and not self.texts:
            raise ValueError("an evaluation set needs images: ... or texts: ...")
        if self.column is not None and not self.texts:
            raise ValueError("column is of texts, and there are none")
        return self


class IdList(Strict):
    """A list of images that must not be trained on."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"ids"})

    ids: str = Field(min_length=1)
    """Text file of image ids or names, one a line. An id finds the row whose key or URL path is it,
    or whose last component is it, that without extension, or the latter's piece after its last
    underscore. A name of COCO's (COCO_val2014_000000000042.jpg) means the number in it too: COCO's
    2014 and 2017 sets name one image otherwise."""
    match: list[Literal["key", "url"]] = Field(default=["key", "url"], min_length=1)
    """What of a row is looked at. Keys that a downloader counted up are no image ids: give [url]
    where the list's ids are numbers of as many digits."""


class DecontaminateConfig(Strict):
    """Which evaluation sets must not be trained on, and how rows are compared with them.

    A method judges where a set has what it compares; null, or false, switches it off.
    """

    sets: dict[str, BenchmarkSet] = {}
    """Name -> evaluation set. Verdicts and evidence give the name."""
    id_lists: dict[str, IdList] = {}
    """Name -> list of image ids, e.g. COCO's val2014 images that are in train2017, which POPE asks
    about. Instruction rows have the same under clean.leakage."""
    image_hash: bool = True
    """Drop a row whose image file is one of a set, byte by byte (SHA-256): the file in its shard or
    the one that was downloaded, where that was encoded anew."""
    drop_at_phash_distance: int | None = Field(default=4, ge=0, le=63)
    """Bits of 63; a row whose perceptual hash differs from an image's in at most as many is
    dropped. It outlives another encoding, size or brightness, not a crop or a mirror image."""
    drop_above_similarity: float | None = Field(default=0.95, ge=-1.0, le=1.0)
    """A row whose image embedding has a larger dot with that of a set's image is dropped. Needs the
    rows' embeddings, and the model that made them."""
    drop_above_ngram_overlap: float | None = Field(default=0.0, ge=0.0, lt=1.0)
    """A row whose caption shares more of its word n-grams with a text than this share of the
    shorter one's is dropped; 0: any shared n-gram, as GPT-3 had it (arXiv:2005.14165, appendix C).
    A text of fewer words than ngram_words must be the whole caption."""
    ngram_words: int = Field(default=13, ge=1)
    """Words of an n-gram; 13 is GPT-3's."""
    min_text_words: int = Field(default=1, ge=1)
    """Texts of fewer words are not compared: answers such as "yes" are captions too."""
    embed: EmbedConfig | None = None
    """The model for the sets' images; None: that of the recipe's embed section. A source of
    published embeddings needs it: the model that made them."""
    max_pixels: int = Field(default=128_000_000, ge=1)
    """Width times height; larger images, of rows or sets, are not decoded but unreadable."""
    skip_unreadable: bool = False
    """Leave out images of a set that cannot be read, and count them; else they stop the run."""
    max_evidence: int = Field(default=10, ge=1)
    """Items of a set that are written down for one row and method, the nearest first."""

    @model_validator(mode="after")
    def _compares_something(self) -> Self:
        if not self.sets and not self.id_lists:
            raise ValueError("nothing to compare with: it needs sets: ... or id_lists: ...")
        by_image = self.image_hash or self.drop_at_phash_distance is not None
        by_image = by_image or self.drop_above_similarity is not None
        for name, one in self.sets.items():
            is_used = bool(one.images and by_image)
            is_used = is_used or bool(one.texts and self.drop_above_ngram_overlap is not None)
            if not is_used:
                raise ValueError(f"sets.{name} is compared by no method that is switched on")
        return self

    @property
    def has_images(self) -> bool:
        """Whether any set brings images."""
        return any(one.images for one in self.sets.values())

    @property
    def reads_images(self) -> bool:
        """Whether the rows' images are read."""
        return self.has_images and (self.image_hash or self.drop_at_phash_distance is not None)

    @property
    def compares_embeddings(self) -> bool:
        """Whether the rows' embeddings are read."""
        return self.has_images and self.drop_above_similarity is not None


def with_model(section: DecontaminateConfig, sections: Mapping[str, Strict]) -> DecontaminateConfig:
    """Return the stage's config: its model is the embed section's where it names none."""
    embed = sections.get("embed")
    if not section.compares_embeddings:
        return section.model_copy(update={"embed": None})
    if section.embed is not None or not isinstance(embed, EmbedConfig):
        return section
    return section.model_copy(update={"embed": embed})


def check_needs(
    config: Strict | None, *, has_images: bool, has_embeddings: bool, has_model: bool
) -> None:
    """Check that the rows bring what is compared, before anything runs. Raises: UserError.

    Args: has_model: whether the recipe says, outside of this section, what made the embeddings.
    """
    if not isinstance(config, DecontaminateConfig):
        return
    if config.reads_images and not has_images:
        raise UserError(
            "recipe.decontaminate needs the rows' images.",
            "image_hash and drop_at_phash_distance read them, and the source brings none.",
            "Add a section download: ..., or set image_hash: false and drop_at_phash_distance: "
            "null.",
        )
    if config.compares_embeddings and not has_embeddings:
        raise UserError(
            "recipe.decontaminate needs embeddings.",
            "drop_above_similarity compares them, and no stage makes any.",
            "Add a section embed: ..., or set decontaminate.drop_above_similarity: null.",
        )
    if config.compares_embeddings and config.embed is None and not has_model:
        raise UserError(
            "recipe.decontaminate.embed is missing.",
            "The source brings embeddings, and only the model that made them can embed the images "
            "of an evaluation set.",
            "Add e.g. decontaminate.embed: {model: ViT-L-14, pretrained: openai}, or set "
            "drop_above_similarity: null.",
        )


def identity(config: DecontaminateConfig) -> dict[str, Any]:
    """Return what the files are: another set, list or model is another input.

    Raises: UserError when one is missing.
    """
    named = config.embed and clip_model.find(config.embed.model, config.embed.pretrained)
    return {
        "sets": {
            name: benchmark_files.identity(name, one.images, one.texts)
            for name, one in sorted(config.sets.items())
        },
        "id_lists": {
            name: [paths.name_of(one.ids), digest_of(one.ids, where=where_ids(name))]
            for name, one in sorted(config.id_lists.items())
        },
        "model": clip_model.identity(named) if named else None,
    }


def where_ids(name: str) -> str:
    """Return what of the recipe names a list, for errors."""
    return f"decontaminate.id_lists.{name}.ids"
