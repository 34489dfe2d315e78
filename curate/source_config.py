"""Where the pairs come from: the source section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from manifests.errors import UserError
from manifests.strict import Strict

SourceName = Annotated[str, StringConstraints(pattern=r"^[^/]+$")]
"""It begins the names of the source's files, up to the first slash."""

_OTHER = {"path": "files", "files": "path"}


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
    bytes_per_part: int = Field(default=1 << 25, ge=1, le=1 << 29)
    """llava_json only: about how many bytes of rows make one part."""
    name: str | None = None
    """Written into the SAMPLES column `source`; None means the kind."""
    shards_per_part: int = Field(default=1, ge=1)
    """Shards that make one part, the unit of work and retry; raise it for many small shards."""
    hash_images: bool = False
    """Fill image_sha256 by reading every image's bytes (tar sources only)."""

    @classmethod
    def load(cls, values: Any, *, where: str) -> Self:
        """Return the validated source. Raises: UserError as Strict.load, or for want of a place."""
        if isinstance(values, Mapping) and "kind" in values:
            needed = _place_of(values["kind"])
            if values.get(needed) is None and values.get(_OTHER[needed]) is None:
                raise UserError(
                    f"{where}.{needed} is missing.", "It has no default.", f"Add {needed}: ..."
                )
        return super().load(values, where=where)

    @model_validator(mode="after")
    def _has_its_place(self) -> Self:
        needed = _place_of(self.kind)
        other = _OTHER[needed]
        if getattr(self, needed) is None or getattr(self, other) is not None:
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
    def label(self) -> str:
        """The SAMPLES column `source`."""
        return self.name or self.kind


def _place_of(kind: Any) -> str:
    """Return the field that says where a source of this kind lies."""
    return "files" if kind == "llava_json" else "path"
