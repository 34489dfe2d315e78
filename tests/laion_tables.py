"""Tables of URLs as they are found: LAION's, with all their quirks, and its hash written anew.

What a row is and what must become of it is planted here, so that tests need no second reader.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.feather as feather
import pyarrow.parquet as pq
from small_inputs import NOT_UTF8, text_array

MASK = 2**64 - 1
Row = Mapping[str, Any]


def murmur3_x64_128(data: bytes, seed: int = 0) -> tuple[int, int]:
    """Return MurmurHash3 x64 128 as two unsigned halves, from Austin Appleby's definition."""
    c1, c2 = 0x87C37B91114253D5, 0x4CF5AD432745937F

    def turned(value: int, by: int) -> int:
        return (value << by | value >> (64 - by)) & MASK

    def mixed(value: int, first: int, by: int, second: int) -> int:
        return turned(value * first & MASK, by) * second & MASK

    def finished(value: int) -> int:
        value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD & MASK
        value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 & MASK
        return value ^ value >> 33

    h1 = h2 = seed
    whole = len(data) // 16 * 16
    for at in range(0, whole, 16):
        k1 = int.from_bytes(data[at : at + 8], "little")
        k2 = int.from_bytes(data[at + 8 : at + 16], "little")
        h1 = ((turned(h1 ^ mixed(k1, c1, 31, c2), 27) + h2) * 5 + 0x52DCE729) & MASK
        h2 = ((turned(h2 ^ mixed(k2, c2, 33, c1), 31) + h1) * 5 + 0x38495AB5) & MASK
    tail = data[whole:]
    h2 ^= mixed(int.from_bytes(tail[8:], "little"), c2, 33, c1)
    h1 ^= mixed(int.from_bytes(tail[:8], "little"), c1, 31, c2)
    h1, h2 = h1 ^ len(data), h2 ^ len(data)
    h1 = (h1 + h2) & MASK
    h2 = (h2 + h1) & MASK
    h1, h2 = finished(h1), finished(h2)
    h1 = (h1 + h2) & MASK
    return h1, (h2 + h1) & MASK


def laion_hash(url: bytes | str, text: bytes | str | None) -> int:
    """Return LAION's signed `hash` of a row, by the function above."""
    url, text = (one.encode() if isinstance(one, str) else one for one in (url, text or b""))
    half = murmur3_x64_128(url + text)[0]
    return half - 2**64 if half >= 2**63 else half


def plain_rows(num_rows: int, start: int = 0) -> list[dict[str, str]]:
    """Return rows that every form can hold."""
    return [
        {"url": f"https://e.org/{i}.jpg?a=1,2", "text": f'a "quoted" cat, no {i}'}
        for i in range(start, start + num_rows)
    ]


def _arrow_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def _delimited(delimiter: str) -> Callable[[pa.Table, Path], None]:
    def write(table: pa.Table, path: Path) -> None:
        pacsv.write_csv(table, str(path), pacsv.WriteOptions(delimiter=delimiter))

    return write


def _lines(table: pa.Table, path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in table.to_pylist()))


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    "parquet": lambda table, path: pq.write_table(table, path, row_group_size=4),
    "feather": lambda table, path: feather.write_feather(table, str(path), chunksize=5),
    "arrow": _arrow_stream,
    "csv": _delimited(","),
    "tsv": _delimited("\t"),
    "jsonl": _lines,
    "json": lambda table, path: path.write_text(json.dumps(table.to_pylist(), indent=1)),
}


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows in the form that the name says, gzipped when it ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    WRITERS[plain.suffix[1:]](pa.Table.from_pylist([dict(row) for row in rows]), plain)
    if plain != path:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


def gzipped(data: bytes) -> bytes:
    """Return a gzip file of two members, as `cat a.gz b.gz` makes."""
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])


LONG_CAPTION = 1_010_000
LONG_URL = 13_000


def base_table(num_rows: int = 12, **changes: pa.Array) -> pa.Table:
    """Return a table of laion400m's columns: all images are 640 wide and 100 high, and it says so
    under the wrong names."""
    numbers = range(num_rows)
    columns = {
        "SAMPLE_ID": pa.array(numbers, pa.int64()),
        "URL": pa.array([f"http://e.org/{i}.jpg" for i in numbers]),
        "TEXT": pa.array([f"a photo of thing {i}" for i in numbers]),
        "HEIGHT": pa.array([640] * num_rows, pa.int32()),
        "WIDTH": pa.array([100] * num_rows, pa.int32()),
        "LICENSE": pa.array(["?"] * num_rows),
        "NSFW": pa.array(["UNLIKELY"] * num_rows),
        "similarity": pa.array([0.3] * num_rows),
    }
    return pa.table(columns | changes)


def joined_table(rows: Sequence[tuple[str, str | None]], **changes: pa.Array) -> pa.Table:
    """Return a table of laion2B-en-joined's columns: (URL, TEXT) rows, sizes the right way."""
    num = len(rows)
    columns = {
        "URL": pa.array([url for url, _ in rows]),
        "TEXT": pa.array([text for _, text in rows], pa.string()),
        "WIDTH": pa.array([640] * num, pa.int32()),
        "HEIGHT": pa.array([100] * num, pa.int32()),
        "similarity": pa.array([0.3] * num),
        "hash": pa.array([laion_hash(*row) for row in rows], pa.int64()),
        "punsafe": pa.array([0.01] * num, pa.float32()),
        "pwatermark": pa.array([0.02] * num, pa.float32()),
    }
    return pa.table(columns | changes)


def write_quirky(folder: Path) -> dict[str, str]:
    """Write a table of four files with every quirk, and return key -> fate of its 20 rows.

    A fate is "", the reason of a mend, a quarantine or a drop by filter {max_aspect_ratio: 3,
    drop_above_punsafe: 0.45}; sizes are told apart by 640 x 480 and the swapped ones.
    """
    folder.mkdir(parents=True)
    first = _first_file()
    second = base_table(
        5,
        SAMPLE_ID=pa.array([100.0, 101.0, None, 2990575000000.0, 104.0]),
        URL=pa.array([f"http://e.org/b{i}.jpg" for i in range(5)]).dictionary_encode(),
        TEXT=pa.array([f"b {i}" for i in range(5)], pa.large_string()),
        HEIGHT=pa.array([640.0, 640.0, float("nan"), 3000.0, None]),
        WIDTH=pa.array([480, 480, 480, 480, 480], pa.int64()),
        __index_level_0__=pa.array(range(5)),
    )
    third = pa.table(
        {
            "URL": ["http://e.org/c0.jpg", "http://e.org/0.jpg"],
            "TEXT": ["c 0", "a photo of thing 0"],
            "WIDTH": [100, 640],
            "HEIGHT": [100, 480],
            "hash": [laion_hash("http://e.org/c0.jpg", "c 0"), 1],
            "punsafe": pa.array([0.9, 0.45], pa.float64()),
        }
    )
    fourth = pa.table({"url": ["http://e.org/d0.jpg"], "caption": ["d 0"], "status": ["success"]})
    for at, table in enumerate((first, second, third, fourth)):
        name = f"part-{at:05d}-5114fd87-c000.snappy.parquet"
        pq.write_table(table, folder / name, row_group_size=5)
    return {
        **dict.fromkeys(("0", "1", "9", "10", "11"), ""),
        "2": "mended:text",
        "3": "mended:text",
        "4": "mended:caption_cut",
        "5": "quarantine:url_too_long",
        "6": "quarantine:missing_url",
        "7": "quarantine:missing_url",
        "8": "mended:text,caption_cut",
        **dict.fromkeys(("100", "101", "0000102", "104"), ""),
        "2990575000000": "aspect_ratio_above",
        "0000200": "punsafe_above",
        "0000201": "",
        "0000300": "",
    }


def _first_file() -> pa.Table:
    urls = [f"http://e.org/{i}.jpg".encode() for i in range(12)]
    texts = [f"a photo of thing {i}".encode() for i in range(12)]
    urls[1], texts[1] = urls[0], b"another caption of the same image"
    texts[2] = NOT_UTF8
    texts[3] = b"a\x00 cat\x1b[0m"
    texts[4] = b"x" * LONG_CAPTION
    urls[5] = b"http://e.org/" + b"u" * LONG_URL
    urls[6] = b"  "
    texts[8] = NOT_UTF8 + b"y" * LONG_CAPTION
    known = pa.array([at != 7 for at in range(12)])
    return base_table(
        12,
        URL=pa.compute.if_else(known, text_array(urls), None),
        TEXT=pa.compute.if_else(pa.array([at != 9 for at in range(12)]), text_array(texts), None),
        WIDTH=pa.array([480] * 12, pa.int32()),
    )


def csv_bytes(*lines: str) -> bytes:
    """Return the bytes of a csv file of these lines."""
    return io.StringIO("\n".join(lines) + "\n").getvalue().encode()
