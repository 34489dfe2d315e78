"""Where the pairs come from: the source section of a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from manifests.strict import Strict


class SourceConfig(Strict):
    """Where the pairs come from."""

    location_fields: ClassVar[frozenset[str]] = frozenset({"path"})

    kind: Literal["webdataset", "img2dataset", "clip_retrieval"]
    """The layout of the files."""
    path: str = Field(min_length=1)
    """Folder, glob, braces or "::" list of tar shards; for clip_retrieval the folder that holds
    img_emb/, text_emb/ and metadata/. Relative to the folder where the command runs."""
    name: str | None = None
    """Written into the SAMPLES column `source`; None means the kind."""
    shards_per_part: int = Field(default=1, ge=1)
    """Shards that make one part, the unit of work and retry; raise it for many small shards."""
    hash_images: bool = False
    """Fill image_sha256 by reading every image's bytes (tar sources only)."""

    @property
    def is_embeddings(self) -> bool:
        """Whether the source brings embeddings instead of images."""
        return self.kind == "clip_retrieval"

    @property
    def label(self) -> str:
        """The SAMPLES column `source`."""
        return self.name or self.kind
