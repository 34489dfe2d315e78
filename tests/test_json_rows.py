"""Where rows lie: against json.load and against splitting lines, at block sizes of a few bytes."""

from __future__ import annotations

import gzip
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.rows import json_rows
from curate.rows.json_rows import Chunk, chunks, is_array, row_spans, spans_within
from manifests.errors import UserError

BLOCKS = st.sampled_from([1, 2, 3, 5, 7, 16, 61, 1 << 20])
TRICKY = st.text(alphabet='\\"[]{},:\n\r\t a\u00e9\u2028\U0001f600', max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TRICKY | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TRICKY, inner, max_size=4),
    max_leaves=12,
)
WHITE = st.text(alphabet=" \t\r\n", max_size=9)


def spans_in(content: bytes, block_bytes: int = 1 << 20) -> list[tuple[int, int]]:
    """Return the (start, end) of all rows of a file with this content."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        found = list(row_spans(file.name, block_bytes=block_bytes))
    assert all(len(one) and one.dtype == np.int64 for one in found)
    return [(int(start), int(end)) for spans in found for start, end in spans]


def texts_in(content: bytes, block_bytes: int = 1 << 20) -> list[bytes]:
    return [content[start:end] for start, end in spans_in(content, block_bytes)]


def refused(content: bytes, block_bytes: int = 1 << 20) -> str:
    with pytest.raises(UserError) as caught:
        spans_in(content, block_bytes)
    assert caught.value.why
    assert caught.value.fix
    return caught.value.what


@given(
    rows=st.lists(VALUES, max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
    around=st.tuples(WHITE, WHITE),
    block_bytes=BLOCKS,
)
def test_rows_of_an_array_are_what_json_load_sees(
    rows: list[Any],
    indent: int | None,
    ascii_only: bool,
    bom: bool,
    around: tuple[str, str],
    block_bytes: int,
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    content = ("\ufeff" * bom + around[0] + text + around[1]).encode("utf-8", "surrogatepass")
    found = texts_in(content, block_bytes)
    assert [json.loads(one) for one in found] == rows
    assert all(one == one.strip() for one in found)


@given(
    rows=st.lists(st.tuples(WHITE, VALUES, WHITE), max_size=5),
    block_bytes=BLOCKS,
)
def test_white_space_between_values_belongs_to_no_row(
    rows: list[tuple[str, Any, str]], block_bytes: int
) -> None:
    inner = ",".join(before + json.dumps(value) + after for before, value, after in rows)
    found = texts_in(f"[{inner}]".encode(), block_bytes)
    assert found == [json.dumps(value).encode() for _, value, _ in rows]


LINE = st.text(alphabet='{}[]",\\ \t\ra\u2028\x0b\x0c', max_size=12)


@given(
    lines=st.lists(LINE, max_size=8),
    newline=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    block_bytes=BLOCKS,
)
def test_rows_of_json_lines_are_the_lines_that_are_not_blank(
    lines: list[str], newline: str, bom: bool, block_bytes: int
) -> None:
    content = ("\ufeff" * bom + newline.join(['{"first": 1}', *lines])).encode()
    expected = [
        line.strip(b" \t\r\n") for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    ]
    assert texts_in(content, block_bytes) == [line for line in expected if line]


@pytest.mark.parametrize("num", [1, 15, 16, 17, 40, 1000])
@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
def test_white_space_of_any_length_around_a_line_is_not_its_own(num: int, block_bytes: int) -> None:
    white = " \t" * num
    content = f"{{}}{white}\n{white}\n{white}[1, {white}2]{white}\r\n{white}3".encode()
    assert texts_in(content, block_bytes) == [b"{}", f"[1, {white}2]".encode(), b"3"]


@pytest.mark.parametrize("num", [1, 2, 15, 16, 17, 18, 40, 41, 1000, 1001])
@pytest.mark.parametrize("block_bytes", [1, 4, 17, 1 << 20])
def test_a_quote_is_escaped_by_an_odd_number_of_backslashes(num: int, block_bytes: int) -> None:
    rows = ["\\" * num, '"' + "\\" * num + '"', "],["]
    found = texts_in(json.dumps(rows).encode(), block_bytes)
    assert [json.loads(one) for one in found] == rows


def test_spans_within_a_chunk_are_those_of_the_file(tmp_path: Path) -> None:
    rows = [{"id": n, "text": 'a "]' * n, "more": [n, [{}]]} for n in range(40)]
    for content in (
        json.dumps(rows, indent=1),
        json.dumps(rows),
        "\n\n".join(json.dumps(row) for row in rows),
    ):
        path = tmp_path / "rows.json"
        path.write_text(content)
        whole = np.concatenate(list(row_spans(str(path))))
        array = is_array(str(path))
        assert array == content.startswith("[")
        for size in (1, 100, 1000, 1 << 20):
            pieces = chunks(str(path), size, block_bytes=64)
            assert sum(piece.num_rows for piece in pieces) == len(rows)
            for piece in pieces:
                mine = whole[piece.first_row : piece.first_row + piece.num_rows]
                data = content.encode()[piece.start : piece.end]
                assert (mine == spans_within(data, is_array=array) + piece.start).all()
                assert len({start // size for start in mine[:, 0].tolist()}) == 1
            assert pieces == chunks(str(path), size)


def test_a_row_may_be_larger_than_a_block_and_than_a_chunk(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    big = "x" * 3_000_000
    path.write_text(json.dumps([1, big, {"a": big}, 2]))
    assert [len(one) for one in texts_in(path.read_bytes())] == [1, 3_000_002, 3_000_009, 1]
    pieces = chunks(str(path), 1000)
    assert [piece.num_rows for piece in pieces] == [2, 1, 1]
    assert pieces[0] == Chunk(0, 2, 1, 3_000_006)


def test_an_array_without_rows_has_none() -> None:
    for content in (b"[]", b" [ \n ] ", b"\xef\xbb\xbf[]"):
        for block_bytes in (1, 2, 64):
            assert spans_in(content, block_bytes) == []


def test_other_filesystems_work() -> None:
    with fsspec.open("memory://json_rows/a.json", "wb") as file:
        file.write(b'[{"a": 1}, {"b": 2}]')
    (spans,) = row_spans("memory://json_rows/a.json")
    assert spans.tolist() == [[1, 9], [11, 19]]


def test_a_row_of_bad_json_is_a_row_still() -> None:
    assert texts_in(b'[{"a": }, nonsense, {"b": 1} {}, {x]]') == [
        b'{"a": }',
        b"nonsense",
        b'{"b": 1} {}',
        b"{x]",
    ]


@pytest.mark.parametrize("block_bytes", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"[", "ends at byte 1 before its array is closed, after 0 rows"),
        (b'[{"a": 1},', "before its array is closed, after 1 rows"),
        (b'[{"a": 1}, {"b', "closed, within row 1, which begins at byte 11"),
        (b'[{"a": 1}, {"b": [2]}', "closed, within row 1, which begins at byte 11"),
        (b'[{"a": "}, {"b": 2}]', "closed, within row 0, which begins at byte 1"),
        (b'[{"a": 1}], 5', "goes on after its array, at byte 10"),
        (b'[{"a": 1}]\n\n[2]', "goes on after its array, at byte 12"),
        (b'[{"a": 1}}, 2]', "goes on after its array, at byte 10"),
        (b"[1,,2]", "before the comma or bracket at byte 3, where row 1 should be"),
        (b"[1, 2, ]", "before the comma or bracket at byte 7, where row 2 should be"),
        (b"[,]", "before the comma or bracket at byte 1, where row 0 should be"),
        (b'{\n "a": 1\n}', "one JSON object over many lines"),
        (b"id,text\n", "neither a JSON array nor JSON Lines: byte 0"),
        (b'  "text"', "neither a JSON array nor JSON Lines: byte 2"),
    ],
)
def test_what_is_no_list_of_rows_is_refused_with_its_place(
    content: bytes, message: str, block_bytes: int
) -> None:
    assert message in refused(content, block_bytes)


def test_files_that_are_not_plain_json_are_named(tmp_path: Path) -> None:
    assert "gzip" in refused(gzip.compress(b"[1]"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.json", "[1]")
    assert "zip archive" in refused((tmp_path / "a.zip").read_bytes())
    assert "web page" in refused(b"<!DOCTYPE html>")
    assert "LFS pointer" in refused(b"version https://git-lfs.github.com/spec/v1\n")
    assert "UTF-16" in refused("[1]".encode("utf-16"))
    with pytest.raises(UserError, match="is gone"):
        list(row_spans(str(tmp_path / "none.json")))


def test_more_rows_than_a_uid_can_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROWS_PER_SHARD", 4)
    assert len(spans_in(b"[1,2,3,4]", 3)) == 4
    assert "row 4 begins at byte 9" in refused(b"[1,2,3,4,5]", 3)
    assert "more than 2^24 rows" in refused(b'{"a": 1}\n1\n2\n3\n4')
