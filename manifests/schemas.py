"""The tables that stages exchange, as pyarrow schemas. All are zstd parquet that polars reads.

A row is found by `uid` everywhere; a row's position never leaves a function.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 3

UID_ROW_BITS = 24
MAX_ROWS_PER_SHARD = 1 << UID_ROW_BITS


def _field(name: str, kind: pa.DataType, *, null: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=null)


TURN = pa.struct([_field("role", pa.string()), _field("text", pa.string())])
"""One turn of a conversation. role: system (only the first turn), human or gpt; an image stands in
the text as `<image>`."""

IMAGE_MEMBER = pa.struct(
    [_field("suffix", pa.string()), _field("offset", pa.uint64()), _field("size", pa.uint32())]
)
"""An image in a written shard: its name's suffix, and where its bytes lie."""

SAMPLES = pa.schema(
    [
        _field("uid", pa.uint64()),
        _field("key", pa.string()),
        _field("source", pa.string()),
        _field("shard", pa.string()),  # relative to the source's root
        # of the image's first byte in the shard, or the JSON row's; 0 for embeddings
        # or the row in a table of URLs
        _field("offset", pa.uint64()),
        # of the image or the JSON row, in bytes; 0 for embeddings and URLs
        _field("size", pa.uint32()),
        _field("caption", pa.string()),
        _field("url", pa.string(), null=True),
        _field("width", pa.uint32(), null=True),
        _field("height", pa.uint32(), null=True),
        _field("image_sha256", pa.binary(32), null=True),
        _field(
            "image_format", pa.string(), null=True
        ),  # as the shard's member is named: jpg, png, ...
        _field("similarity", pa.float64(), null=True),  # as published with the source
        _field("punsafe", pa.float64(), null=True),
        _field("pwatermark", pa.float64(), null=True),
        _field("aesthetic", pa.float64(), null=True),
        _field("nsfw", pa.string(), null=True),
        _field("hash", pa.int64(), null=True),  # LAION's join key: murmur hash of url + caption
        # of the original image's bytes, as published with the source
        _field("published_md5", pa.binary(16), null=True),
        _field("published_sha256", pa.binary(32), null=True),
        _field("clip_score", pa.float64(), null=True),  # only when the source brings embeddings
        _field("extra", pa.string(), null=True),  # JSON object: every other source column as given
    ]
)

VECTORS = pa.schema(
    [
        _field("uid", pa.uint64()),
        _field("key", pa.string()),
        _field("caption", pa.string()),
        _field("clip_score", pa.float64()),
        _field(
            "row", pa.uint32()
        ),  # row of img_emb_%04d.npy and text_emb_%04d.npy beside this file
    ]
)

ASSIGNMENTS = pa.schema(
    [
        _field("uid", pa.uint64()),
        _field("cluster", pa.uint32()),
        _field("d2", pa.float64()),  # exact squared distance to the cluster's centroid
        _field("centroid_cosine", pa.float64()),  # x.c / |c|
        _field("ghosts", pa.list_(pa.uint32()), null=True),  # other clusters that the row meets
    ]
)

FOREST = pa.schema(
    [
        _field("uid_a", pa.uint64()),
        _field("uid_b", pa.uint64()),  # uid_a < uid_b
        _field("similarity", pa.float64()),  # exact
    ]
)

VERDICTS = pa.schema(
    [
        _field("uid", pa.uint64()),
        _field("stage", pa.string()),
        _field("keep", pa.bool_()),
        # "" when kept as it is, "mended:<what>" or "flagged:<reason>" when kept all the same;
        # "quarantine:<error class>" for bad rows
        _field("reason", pa.string()),
        _field("score", pa.float64(), null=True),
        _field("cutoff", pa.float64(), null=True),
        _field("evidence_uid", pa.uint64(), null=True),  # the row it lost to
    ]
)

QUARANTINE = pa.schema(
    [
        _field("uid", pa.uint64()),
        _field("key", pa.string()),
        _field("shard", pa.string()),
        _field("error", pa.string()),  # the error class, as in the verdict's reason
        _field("detail", pa.string()),
    ]
)

SELECTABLE = pa.schema(  # kept rows with what select ranks them by: dedup's kept/, select's kept/
    [
        _field("uid", pa.uint64()),
        _field("cluster", pa.uint32(), null=True),  # these three: null without embed or cluster
        _field("clip_score", pa.float64(), null=True),
        _field("centroid_cosine", pa.float64(), null=True),
    ]
)

EVIDENCE = pa.schema(  # what of the evaluation sets a row is like: the nearest items by method
    [
        _field("uid", pa.uint64()),
        _field("method", pa.string()),  # id_list, image_hash, phash, clip or caption
        _field("set", pa.string()),  # the evaluation set or id list, by its name in the recipe
        _field("item", pa.string()),  # its image, text or id
        _field("score", pa.float64(), null=True),  # bits apart, similarity, share of n-grams
        _field("num_items", pa.uint32()),  # of the set that the method found; not all are listed
    ]
)

CORESET = pa.schema(
    [
        _field("uid", pa.uint64()),
        _field("key", pa.string()),
        _field("shard", pa.string()),
        _field("caption", pa.string()),
        _field("clip_score", pa.float64(), null=True),  # these three: null without embed or cluster
        _field("cluster", pa.uint32(), null=True),
        _field("centroid_cosine", pa.float64(), null=True),
    ]
)

CONVERSATIONS = pa.schema(  # instruction rows in one form, whatever the file's was
    [
        _field("uid", pa.uint64()),
        _field("images", pa.list_(pa.field("image", pa.string(), nullable=False))),  # as given
        _field("turns", pa.list_(pa.field("turn", TURN, nullable=False))),
    ]
)

CLEANED = pa.schema(  # what is known of each conversation that the clean stage kept
    [
        _field("uid", pa.uint64()),
        _field("mended", pa.string()),  # "" or the mends made, joined by commas, in rule order
        _field("conversation_hash", pa.binary(16)),  # of images and turns, as mended
        _field("rounds", pa.uint16()),  # questions with their answers
        _field("num_images", pa.uint16()),
        _field("token_estimate", pa.uint32()),
    ]
)

RESOLVED = pa.schema(  # where each image of a kept conversation lies; text-only rows have none
    [
        _field("uid", pa.uint64()),
        _field("position", pa.uint16()),  # of the image in its row
        _field("image", pa.string()),  # as the row names it
        _field("root", pa.string()),  # the prefix of the root map that holds it
        _field("choice", pa.uint16()),  # which of that prefix's places, where it has several
        _field("file", pa.string()),  # below the place: the image itself, or the tar that has it
        _field("offset", pa.uint64()),  # of the image's first byte in `file`
        _field("size", pa.uint32()),
        _field("suffix", pa.string()),  # by content: jpg, png, webp, gif, bmp
        _field("width", pa.uint32()),
        _field("height", pa.uint32()),
    ]
)

TRAIN_INDEX = pa.schema(
    [
        _field("uid", pa.uint64()),
        _field("key", pa.string()),  # __key__ in the written shard
        _field("shard", pa.string()),  # relative to the stage directory
        _field("images", pa.list_(pa.field("image", IMAGE_MEMBER, nullable=False))),  # in order
        _field("json_offset", pa.uint64()),
        _field("json_size", pa.uint32()),
        _field("source", pa.string()),
        _field("has_image", pa.bool_()),
        _field("turns", pa.uint16()),
        _field("token_estimate", pa.uint32()),  # about four characters a token, image not counted
    ]
)

TABLES: dict[str, pa.Schema] = {
    "SAMPLES": SAMPLES,
    "VECTORS": VECTORS,
    "ASSIGNMENTS": ASSIGNMENTS,
    "FOREST": FOREST,
    "VERDICTS": VERDICTS,
    "QUARANTINE": QUARANTINE,
    "SELECTABLE": SELECTABLE,
    "EVIDENCE": EVIDENCE,
    "CORESET": CORESET,
    "CONVERSATIONS": CONVERSATIONS,
    "CLEANED": CLEANED,
    "RESOLVED": RESOLVED,
    "TRAIN_INDEX": TRAIN_INDEX,
}


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return `table` with the schema's columns, order and types.

    Missing nullable columns become nulls. Raises: ValueError for a missing or unknown column or a
    null in a column that has none; pyarrow's errors for a value that does not fit its type.
    """
    unknown = set(table.column_names) - set(schema.names)
    if unknown:
        raise ValueError(f"columns {sorted(unknown)} are not in the schema {schema.names}")
    columns = [_column(table, field) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema.with_metadata(_metadata()))


def empty(schema: pa.Schema) -> pa.Table:
    """Return a table of no rows."""
    return conform(schema.empty_table(), schema)


def _column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    if field.name not in table.column_names:
        if not field.nullable:
            raise ValueError(f"column {field.name} is missing")
        return pa.nulls(table.num_rows, field.type)
    column = table.column(field.name)
    if column.null_count and not field.nullable:
        raise ValueError(f"column {field.name} holds {column.null_count} nulls")
    return column.cast(field.type)


def _metadata() -> dict[str, str]:
    return {"warren_schema_version": str(SCHEMA_VERSION)}
