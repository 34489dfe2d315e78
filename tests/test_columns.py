"""Columns of any name and type: what becomes of them in the samples."""

from __future__ import annotations

import datetime as dt
import decimal
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_inputs import NOT_UTF8, text_array

from curate.rows.columns import samples_from_columns
from curate.rows.foreign import tame
from manifests.schemas import SAMPLES


def samples(**columns: Any) -> list[dict[str, Any]]:
    table = pa.table(columns)
    uids = np.arange(table.num_rows, dtype=np.uint64)
    found = samples_from_columns(table, uids, source="s", shard="x.npy")
    assert found.schema.equals(SAMPLES)
    found.validate(full=True)
    return list(found.to_pylist())


def test_names_of_laion_img2dataset_and_datacomp_mean_the_same() -> None:
    (laion,) = samples(
        SAMPLE_ID=[5], URL=["u"], TEXT=[" t "], WIDTH=[1.0], HEIGHT=[2.0], NSFW=["NSFW"]
    )
    assert [laion[k] for k in ("key", "url", "caption", "width", "height", "nsfw")] == [
        "5",
        "u",
        "t",
        1,
        2,
        "NSFW",
    ]
    (coco,) = samples(top_caption=["c"], all_captions=[["c", "d"]], hash=[-5])
    assert (coco["caption"], coco["hash"], coco["key"]) == ("c", -5, "x.npy:0")
    assert json.loads(coco["extra"]) == {"all_captions": ["c", "d"]}


def test_a_source_without_captions_gets_empty_ones() -> None:
    assert [row["caption"] for row in samples(url=["a", None])] == ["", ""]
    assert [row["key"] for row in samples(key=["a", None], caption=[None, "b"])] == ["a", ""]


HUGE = 2**64 - 1


WEIRD: dict[str, tuple[pa.Array, list[Any]]] = {
    "dictionary": (pa.array(["a", None]).dictionary_encode(), ["a", None]),
    "dictionary, not UTF-8": (
        pa.DictionaryArray.from_arrays(pa.array([0, 1]), text_array([NOT_UTF8, b"b"])),
        ["caf\ufffd noir", "b"],
    ),
    "text, not UTF-8": (text_array([NOT_UTF8, b"b"]), ["caf\ufffd noir", "b"]),
    "large text": (pa.array(["a", None], pa.large_string()), ["a", None]),
    "text view": (pa.array(["a", None], pa.string_view()), ["a", None]),
    "bytes": (pa.array([b"\xff", b"ab"]), ["\ufffd", "ab"]),
    "bytes of one size": (pa.array([b"\xff\x00", b"ab"], pa.binary(2)), ["\ufffd\x00", "ab"]),
    "list": (pa.array([[1, 2], None]), [[1, 2], None]),
    "list of text, not UTF-8": (
        pa.ListArray.from_arrays(pa.array([0, 1, 2]), text_array([NOT_UTF8, b"b"])),
        ['["caf\ufffd noir"]', '["b"]'],
    ),
    "list of bytes": (pa.array([[b"\xff"], [b"a"]]), ['["\ufffd"]', '["a"]']),
    "list of NaN": (pa.array([[float("nan")], [1.5]]), [[None], [1.5]]),
    "struct": (pa.array([{"a": 1}, None]), [{"a": 1}, None]),
    "struct of times": (
        pa.array([{"t": dt.datetime(2020, 1, 2)}, None], pa.struct({"t": pa.timestamp("ns")})),
        ['{"t": "2020-01-02 00:00:00.000000000"}', None],
    ),
    "map": (pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())), ['[["k", 1]]', "[]"]),
    "time stamp": (pa.array([0, None], pa.timestamp("s")), ["1970-01-01 00:00:00", None]),
    "time stamp in a zone": (
        pa.array([0, None], pa.timestamp("s", "America/New_York")),
        ["1970-01-01 00:00:00", None],
    ),
    "time stamp of nanoseconds": (
        pa.array([1, None], pa.timestamp("ns")),
        ["1970-01-01 00:00:00.000000001", None],
    ),
    "time stamp beyond the calendar": (
        pa.array([2**62, None], pa.timestamp("s")),
        ["<value out of range: 4611686018427387904>", None],
    ),
    "date": (pa.array([dt.date(2020, 1, 2), None]), ["2020-01-02", None]),
    "time": (pa.array([dt.time(1, 2, 3), None]), ["01:02:03.000000", None]),
    "duration": (pa.array([5, None], pa.duration("s")), ["5", None]),
    "interval": (
        pa.array([pa.MonthDayNano([1, 2, 3]), None]),
        ["MonthDayNano(months=1, days=2, nanoseconds=3)", None],
    ),
    "decimal": (pa.array([decimal.Decimal("1.50"), None]), ["1.50", None]),
    "wide decimal": (
        pa.array([decimal.Decimal("1.50"), None], pa.decimal256(50, 2)),
        ["1.50", None],
    ),
    "runs": (pa.RunEndEncodedArray.from_arrays([2], ["a"]), ["a", "a"]),
    "extension": (
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"a" * 16, None], pa.binary(16))),
        ["a" * 16, None],
    ),
    "nulls": (pa.nulls(2), [None, None]),
    "booleans": (pa.array([True, None]), [True, None]),
    "half floats": (pa.array([1.5, float("nan")], pa.float16()), [1.5, None]),
    "unsigned": (pa.array([HUGE, 0], pa.uint64()), [HUGE, 0]),
}


@pytest.mark.parametrize("name", WEIRD)
def test_columns_of_any_type_are_kept_as_json(name: str) -> None:
    column, expected = WEIRD[name]
    assert [json.loads(row["extra"])["odd"] for row in samples(odd=column)] == expected


@pytest.mark.parametrize("column", ["key", "caption", "url", "width", "punsafe", "hash"])
@pytest.mark.parametrize("name", WEIRD)
def test_a_known_column_may_come_in_any_type(name: str, column: str) -> None:
    rows = samples(**{column: WEIRD[name][0]})
    assert len(rows) == 2
    values = WEIRD[name][0].type
    if column == "caption" and name.startswith("dictionary"):
        assert rows[0]["caption"] == WEIRD[name][1][0]
    if pa.types.is_nested(values) and column == "url" and name == "list":
        assert json.loads(rows[0]["extra"]) == {"url": [1, 2]}


def test_numbers_are_read_from_any_column_that_holds_them() -> None:
    expected = [7, None]
    for column in (
        pa.array([7, None], pa.int64()),
        pa.array([7, 2**40], pa.int64()),
        pa.array([7, 0], pa.int32()),
        pa.array([7, HUGE], pa.uint64()),
        pa.array([7.9, float("inf")]),
        pa.array([7, -1e300]),
        pa.array(["7", "seven"]),
        pa.array(["7", "nan"]).dictionary_encode(),
        pa.array([decimal.Decimal(7), None]),
        text_array([b"7", NOT_UTF8]),
    ):
        assert [row["width"] for row in samples(width=column)] == expected
    hashes = pa.array([-(2**63), 2**63 - 1])
    assert [row["hash"] for row in samples(hash=hashes)] == hashes.to_pylist()
    for column in (pa.array([7, HUGE], pa.uint64()), pa.array([7.0, 1e30]), pa.array(["7", ""])):
        assert [row["hash"] for row in samples(hash=column)] == expected


def test_one_row_of_bad_text_does_not_change_the_others() -> None:
    good, bad = pa.array([b" a ", b"b"]), text_array([b" a ", NOT_UTF8])
    alone = samples(caption=good.cast(pa.string()))
    assert samples(caption=bad)[0]["caption"] == alone[0]["caption"] == "a"


def test_taming_leaves_plain_columns_alone() -> None:
    for column in (pa.array([1, None]), pa.array([[1.5]]), pa.array([{"a": "b"}])):
        chunked = pa.chunked_array([column])
        assert tame(chunked) is chunked
