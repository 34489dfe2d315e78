"""Where the pairs come from: the source section of a recipe."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from manifests.schemas import UID_ROW_BITS
from manifests.strict import MissingField, Strict

SourceName = Annotated[str, StringConstraints(pattern=r"^[^/]+$")]
"""Begins the names of the source's files, up to the first slash: so the names tell the sources."""


class SourceConfig(Strict):
    """Where the pairs come from."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"path", "files", "join"})

    kind: Literal["webdataset", "img2dataset", "clip_retrieval", "url_table", "llava_json"]
    """The layout of the files."""
    path: str | None = Field(default=None, min_length=1)
    """Folder, glob, braces or "::" list of tar shards; for clip_retrieval the folder that holds
    img_emb/, text_emb/ and metadata/; for url_table of parquet, csv, tsv, txt (one URL a line),
    json, jsonl, feather or arrow files, the text forms also as .gz. Relative to the folder where
    the command runs."""
    files: dict[SourceName, Annotated[str, StringConstraints(min_length=1)]] | None = Field(
        default=None, min_length=1
    )
    """llava_json only: name of each source -> its JSON or JSONL file, glob, braces or "::" list.
    The name is written into the SAMPLES column `source`."""
    bytes_per_part: int = Field(default=1 << 24, ge=1, le=1 << 29)
    """llava_json only: about how many bytes of rows make one part. With a row of 1 GiB at its end
    the texts of a part still fit Arrow's 32-bit offsets."""
    name: str | None = None
    """Written into the SAMPLES column `source`; None means the kind."""
    shards_per_part: int = Field(default=1, ge=1)
    """Shards that make one part, the unit of work and retry; raise it for many small shards. Of a
    url_table a shard is a slice of `rows_per_shard` rows; a part may span files."""
    hash_images: bool = False
    """Fill image_sha256 by reading every image's bytes (tar sources only)."""
    rows_per_shard: int = Field(default=10_000, ge=1, le=1 << UID_ROW_BITS)
    """url_table only: rows of a file that make one shard, as img2dataset's number_sample_per_shard;
    the last of a file may be smaller. Numbered on over the files."""
    swapped_sizes: Literal["auto"] | bool = "auto"
    """url_table only: whether WIDTH and HEIGHT stand for each other, as in the base tables of
    LAION-400M and LAION-2B. auto: when a table has the columns of those (SAMPLE_ID, URL, TEXT,
    HEIGHT, WIDTH, LICENSE); of JSON, when its first rows have these names."""
    laion_hash: bool = False
    """url_table and clip_retrieval: compute LAION's `hash` of URL and caption as given; where the
    source has one, compare, and count what differs in the record's notes."""
    join: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """url_table and clip_retrieval: parquet tables (each a folder, glob, braces or "::" list) that
    bring punsafe, pwatermark, aesthetic, similarity, nsfw, md5 or sha256, joined by `hash` where
    they have one, else by URL. They fill what the source lacks. Every part reads them once: raise
    shards_per_part."""
    max_caption_characters: int = Field(default=10_000, ge=1)
    """url_table only: longer captions are cut, and the verdict says so."""
    max_url_characters: int = Field(default=8_192, ge=1)
    """url_table only: rows with a longer URL are quarantined."""

    @model_validator(mode="after")
    def _has_its_place(self) -> Self:
        needed, other = ("files", "path") if self.is_conversations else ("path", "files")
        if getattr(self, needed) is None:
            raise MissingField(needed)
        if getattr(self, other) is not None:
            raise ValueError(f"a source of kind {self.kind} takes {needed}, not {other}")
        if not (self.is_urls or self.is_embeddings) and (self.join or self.laion_hash):
            raise ValueError(f"a source of kind {self.kind} takes no join and no laion_hash")
        return self

    @property
    def location(self) -> str:
        """The path, where the kind has one."""
        assert self.path is not None, "checked when the recipe was read"
        return self.path

    @property
    def is_conversations(self) -> bool:
        """Whether the source brings instruction rows instead of captioned images."""
        return self.kind == "llava_json"

    @property
    def is_embeddings(self) -> bool:
        """Whether the source brings embeddings instead of images."""
        return self.kind == "clip_retrieval"

    @property
    def brings_images(self) -> bool:
        """Whether image bytes lie in the source's own files."""
        return self.kind in ("webdataset", "img2dataset")

    @property
    def is_urls(self) -> bool:
        """Whether the source brings URLs, whose images are yet to be fetched."""
        return self.kind == "url_table"

    @property
    def label(self) -> str:
        """The SAMPLES column `source`."""
        return self.name or self.kind
