"""Where the rows of a JSON file lie, as json.load finds them at any block size; what is refused."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from curate.rows.json_rows import chunks, is_array, row_spans, spans_within
from manifests.errors import UserError
from manifests.schemas import MAX_ROWS_PER_SHARD

BOM = b"\xef\xbb\xbf"
# characters that a search for borders could stumble over, above all runs of backslashes
TEXTS = st.text(st.sampled_from('\\\\\\"[]{},:\n\r\t a\u2028é😀\x00'), max_size=12) | st.text(
    max_size=6
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)
SPACES = st.text(st.sampled_from(" \t\r\n"), max_size=5).map(str.encode)
BLOCKS = st.integers(1, 50)
MANY = settings(max_examples=200, deadline=None)


def write(folder: Path | str, content: bytes) -> str:
    path = Path(folder) / "rows.json"
    path.write_bytes(content)
    return str(path)


def found_at_once(path: str, block_bytes: int) -> list[Any]:
    """Return the rows as row_spans cuts them."""
    content = Path(path).read_bytes()
    blocks = list(row_spans(path, block_bytes=block_bytes))
    spans = [span for block in blocks for span in block.tolist()]
    assert all(block.dtype == np.int64 and block.shape[1] == 2 for block in blocks)
    return [json.loads(content[start:end]) for start, end in spans]


def found_in_chunks(path: str, num_bytes: int) -> list[Any]:
    """Return the rows as chunks cut them, and spans_within each chunk; both must agree."""
    content = Path(path).read_bytes()
    rows: list[Any] = []
    for chunk in chunks(path, num_bytes):
        assert chunk.first_row == len(rows)
        data = content[chunk.start : chunk.end]
        spans = spans_within(data, is_array=is_array(path)).tolist()
        texts = [data[start:end] for start, end in spans]
        assert len(texts) == chunk.num_rows
        assert all(text == text.strip(b" \t\r\n") for text in texts)
        assert chunk.num_rows == 1 or chunk.end - chunk.start <= num_bytes
        rows += map(json.loads, texts)
    return rows


@MANY
@given(
    rows=st.lists(VALUES, max_size=8),
    indent=st.sampled_from([None, 1, 4]),
    is_ascii=st.booleans(),
    before=st.tuples(st.sampled_from([b"", BOM]), SPACES).map(b"".join),
    after=SPACES,
    block_bytes=BLOCKS,
)
@example([], None, True, b"", b"", 1)
@example(["\\", '"', '\\"', "],["], None, True, BOM, b"\n", 1)
def test_the_rows_of_an_array_are_those_of_the_parser(
    rows: list[Any],
    indent: int | None,
    is_ascii: bool,
    before: bytes,
    after: bytes,
    block_bytes: int,
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, before + text + after)
        assert is_array(path)
        assert found_at_once(path, block_bytes) == rows
        assert found_in_chunks(path, block_bytes) == rows


@MANY
@given(
    rows=st.lists(OBJECTS, min_size=1, max_size=8),
    ends=st.lists(st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n\t\r\n"]), min_size=8, max_size=8),
    last=st.sampled_from([b"", b"\n", b"\r\n", b" ", b"\n\n"]),
    before=st.sampled_from([b"", BOM, b"\n", BOM + b" \r\n"]),
    block_bytes=BLOCKS,
)
@example([{}], [b"\n"] * 8, b"\n", b"", 1)
def test_the_rows_of_json_lines_are_the_lines_that_are_not_blank(
    rows: list[Any], ends: list[bytes], last: bytes, before: bytes, block_bytes: int
) -> None:
    lines = [json.dumps(row).encode() for row in rows]
    text = b"".join(line + end for line, end in zip(lines[:-1], ends, strict=False))
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, before + text + lines[-1] + last)
        assert not is_array(path)
        assert found_at_once(path, block_bytes) == rows
        assert found_in_chunks(path, block_bytes) == rows


@pytest.mark.parametrize("num_backslashes", range(8))
@pytest.mark.parametrize("block_bytes", range(1, 14))
def test_a_run_of_backslashes_over_the_border_of_blocks_counts_whole(
    tmp_path: Path, num_backslashes: int, block_bytes: int
) -> None:
    escaped = "\\" * num_backslashes + ('"' if num_backslashes % 2 else "")
    text = f'["{escaped}", ",", "]"]'
    assert found_at_once(write(tmp_path, text.encode()), block_bytes) == json.loads(text)


def test_every_row_is_where_the_span_says_and_chunks_are_as_large_as_wanted(tmp_path: Path) -> None:
    path = write(tmp_path, b' [ {"a": 1},\n[2] ,"three"]')
    spans = np.concatenate(list(row_spans(path))).tolist()
    assert spans == [[2, 11], [12, 17], [18, 25]]
    whole = [(one.first_row, one.num_rows, one.start, one.end) for one in chunks(path, 23)]
    assert whole == [(0, 3, 2, 25)]
    two = [(one.first_row, one.num_rows, one.start, one.end) for one in chunks(path, 22)]
    assert two == [(0, 2, 2, 17), (2, 1, 18, 25)]
    assert [one.num_rows for one in chunks(path, 1)] == [1, 1, 1]


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 5, 100])
def test_a_comma_before_the_closing_bracket_is_no_row_but_a_gap_is(
    tmp_path: Path, block_bytes: int
) -> None:
    assert found_at_once(write(tmp_path, b'[{"a": 1}, [2] , \n ]\n'), block_bytes) == [
        {"a": 1},
        [2],
    ]
    path = write(tmp_path, b"[1,,2]")
    spans = np.concatenate(list(row_spans(path, block_bytes=block_bytes))).tolist()
    assert spans == [[1, 2], [3, 3], [4, 5]]
    assert [[one.start, one.end] for one in chunks(path, 1)] == spans
    assert spans_within(b"", is_array=True).tolist() == [[0, 0]]
    assert chunks(write(tmp_path, b" [ \n ] "), 10) == []


@pytest.mark.parametrize("block_bytes", [1, 4, 100])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (BOM + b" \n", "holds no rows"),
        (b" " * 70000, "holds no rows"),
        (b'[{"a": 1}, {"b": 2}, {"c"', "cut short(.|\n)*at byte 25, after 2 rows"),
        (b"[", "cut short(.|\n)*at byte 1, after 0 rows"),
        (b'[{"a": "x', "cut short(.|\n)*at byte 9, after 0 rows"),
        (b'[1, "\\"]', "cut short(.|\n)*at byte 8, after 1 rows"),
        (b'[1, 2] {"a": 1}', r"goes on after the end of its array(.|\n)*byte \d+"),
        (b"[1, 2]\n[3]", "goes on after the end of its array"),
        (b"[1]]", "goes on after the end of its array"),
        (b'"text"', "neither a JSON array nor JSON lines"),
        (b"17", "neither a JSON array nor JSON lines"),
        (b"null", "neither a JSON array nor JSON lines"),
        ("[1]".encode("utf-16"), "neither a JSON array nor JSON lines"),
        (gzip.compress(b"[1]"), "is a gzip file"),
    ],
)
def test_what_holds_no_rows_is_refused_and_says_why(
    tmp_path: Path, content: bytes, message: str, block_bytes: int
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=message):
        list(row_spans(path, block_bytes=block_bytes))


def test_a_packed_or_missing_file_is_refused_by_each_function(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("rows.json", "[1]")
    path = write(tmp_path, packed.getvalue())
    for one, message in ((path, "is a zip file"), (path + ".none", "does not exist")):
        with pytest.raises(UserError, match=message):
            is_array(one)
        with pytest.raises(UserError, match=message):
            chunks(one, 10)


def test_rows_may_begin_behind_much_white_space(tmp_path: Path) -> None:
    path = write(tmp_path, BOM + b"\n" * 200_000 + b'[1, "a"]')
    assert found_at_once(path, 1000) == [1, "a"]


def test_a_row_of_many_backslashes_is_found_in_time_that_grows_with_its_length(
    tmp_path: Path,
) -> None:
    text = json.dumps(["\\" * 500_000, "end"])
    assert found_at_once(write(tmp_path, text.encode()), 1 << 20) == json.loads(text)


def test_a_file_of_more_rows_than_a_uid_can_number_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, b"[" + b"0," * (MAX_ROWS_PER_SHARD - 1) + b"0]")
    assert sum(map(len, row_spans(path))) == MAX_ROWS_PER_SHARD
    path = write(tmp_path, b"[" + b"0," * MAX_ROWS_PER_SHARD + b"0]")
    with pytest.raises(UserError, match="more than 16,777,216 rows"):
        list(row_spans(path))
