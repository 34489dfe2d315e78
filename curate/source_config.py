"""Where the pairs come from: the source section of a recipe."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from manifests.strict import MissingField, Strict

SourceName = Annotated[str, StringConstraints(pattern=r"^[^/]+$")]
"""Begins the names of the source's files, up to the first slash: so the names tell the sources."""


class SourceConfig(Strict):
    """Where the pairs come from."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"path", "files"})

    kind: Literal["webdataset", "img2dataset", "clip_retrieval", "llava_json"]
    """The layout of the files."""
    path: str | None = Field(default=None, min_length=1)
    """Folder, glob, braces or "::" list of tar shards; for clip_retrieval the folder that holds
    img_emb/, text_emb/ and metadata/. Relative to the folder where the command runs."""
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
    """Shards that make one part, the unit of work and retry; raise it for many small shards."""
    hash_images: bool = False
    """Fill image_sha256 by reading every image's bytes (tar sources only)."""

    @model_validator(mode="after")
    def _has_its_place(self) -> Self:
        needed, other = ("files", "path") if self.is_conversations else ("path", "files")
        if getattr(self, needed) is None:
            raise MissingField(needed)
        if getattr(self, other) is not None:
            raise ValueError(f"a source of kind {self.kind} takes {needed}, not {other}")
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
    def label(self) -> str:
        """The SAMPLES column `source`."""
        return self.name or self.kind
