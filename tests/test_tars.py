"""Grouping against planted faults, and the writer against tarfile and webdataset."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from tar_bytes import BLOCK, TRIO, tar_bytes, write
from webdataset.tariterators import group_by_keys, tar_file_expander

from curate.media.tars import (
    BadSample,
    MemberScan,
    SampleGroups,
    TarMember,
    TarSample,
    group_samples,
    read_range,
    sanitise_key,
    scan_members,
    write_tar,
)


def scan_bytes(folder: Path, content: bytes) -> MemberScan:
    return scan_members(write(folder, content))


def group_names(*names: str, sizes: dict[str, int] | None = None) -> SampleGroups:
    """Group regular members of these names, as if read from a whole archive."""
    members, at = [], 0
    for name in names:
        size = (sizes or {}).get(name, 10)
        members.append(TarMember(name, at + BLOCK, size, "0"))
        at += BLOCK + size + -size % BLOCK
    return group_samples(MemberScan(tuple(members), at))


def fates(groups: SampleGroups) -> list[tuple[str, str]]:
    """Return (key, "good" or the error class) of every row."""
    return [
        (row.key, row.error_class if isinstance(row, BadSample) else "good") for row in groups.rows
    ]


# --- samples -----------------------------------------------------------------------------------


def test_a_sample_knows_where_its_members_are(tmp_path: Path) -> None:
    content = tar_bytes([("./sub/0.JPG", b"img"), ("./sub/0.json", b"{1}"), ("./sub/0.cls", b"7")])
    path = write(tmp_path, content)
    (row,) = group_samples(scan_members(path)).rows
    assert isinstance(row, TarSample)
    assert (row.row, row.key, row.image_suffix, row.txt) == (0, "sub/0", "jpg", None)
    assert row.json is not None
    assert read_range(path, *row.image) == b"img"
    assert read_range(path, *row.json) == b"{1}"
    assert len(row.members) == 3


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "a.txt", "b.txt", "b.png"], [("a", "good"), ("b", "good")]),
        (["a.jpeg", "a.json", "a.npy"], [("a", "good")]),
        (["a.txt", "a.json"], [("a", "missing_image")]),
        (["a.avif", "a.txt"], [("a", "missing_image")]),
        (["a.seg.png", "a.txt"], [("a", "missing_image")]),
        (["a.webp"], [("a", "missing_caption")]),
        (["a.jpg", "a.png", "a.txt"], [("a", "ambiguous_image")]),
        (["a.jpg", "a.txt", "a.TXT"], [("a", "duplicate_member")]),
        (["a.jpg", "a.jpg", "a.txt"], [("a", "duplicate_member")]),
        (["a.jpg", "a.txt", "a.jpg", "a.txt"], [("a", "good"), ("a", "duplicate_key")]),
        (
            ["a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt"],
            [("a", "good"), ("b", "good"), ("a", "duplicate_key")],
        ),
        (
            ["a.jpg", "b.jpg", "a.txt", "b.txt"],
            [(key, "non_contiguous_members") for key in "abab"],
        ),
        (
            ["a.jpg", "a.txt", "b.jpg", "b.txt", "a.json"],
            [("a", "good"), ("b", "good"), ("a", "non_contiguous_members")],
        ),
        (
            ["a.json", "b.jpg", "b.txt", "a.jpg", "a.txt"],
            [("a", "non_contiguous_members"), ("b", "good"), ("a", "non_contiguous_members")],
        ),
        (["../a.jpg", "../a.txt"], [("../a", "unsafe_member_name")]),
        (["/a.jpg", "/a.txt"], [("/a", "unsafe_member_name")]),
        (["x/../a.jpg"], [("x/../a", "unsafe_member_name")]),
        (["C:\\a.jpg"], [("C:\\a", "unsafe_member_name")]),
        (["x\\..\\a.jpg"], [("x\\", "unsafe_member_name")]),
        (["a\x00b.jpg"], [("a\x00b", "unsafe_member_name")]),
        (["a\nb.jpg", "a\nb.txt"], [("a\nb", "unsafe_member_name")]),
        (["x/a.jpg", "x/a.txt", "y/a.jpg", "y/a.txt"], [("x/a", "good"), ("y/a", "good")]),
        (["1.5.jpg", "1.5.txt"], [("1", "missing_image")]),
    ],
)
def test_every_fault_has_its_error_class(names: list[str], expected: list[tuple[str, str]]) -> None:
    groups = group_names(*names)
    assert fates(groups) == expected
    assert [row.row for row in groups.rows] == list(range(len(expected)))
    assert all(row.detail for row in groups.rows if isinstance(row, BadSample))


def test_an_image_without_bytes_is_bad_and_an_empty_caption_is_not() -> None:
    assert fates(group_names("a.jpg", "a.txt", sizes={"a.jpg": 0})) == [("a", "empty_image")]
    assert fates(group_names("a.jpg", "a.txt", sizes={"a.txt": 0})) == [("a", "good")]


def test_a_link_spoils_its_sample_only() -> None:
    members = (
        TarMember("a.jpg", 512, 0, "2"),
        TarMember("a.txt", 1024, 1, "0"),
        TarMember("b.jpg", 2048, 1, "0"),
        TarMember("b.txt", 3072, 1, "0"),
    )
    groups = group_samples(MemberScan(members, 4096))
    assert fates(groups) == [("a", "unsafe_member_type"), ("b", "good")]


def test_members_without_a_place_are_skipped_by_name_and_do_not_cut_a_sample() -> None:
    groups = group_names("README", "a.jpg", "__index__", ".hidden", "a.txt", "stats.parquet")
    assert fates(groups) == [("a", "good")]
    names = ["README", "__index__", ".hidden", "stats.parquet"]
    assert [one.member.name for one in groups.skipped] == names
    assert all(one.reason for one in groups.skipped)


def test_the_sample_that_the_damage_touches_is_truncated(tmp_path: Path) -> None:
    content = tar_bytes([*TRIO, ("b.jpg", b"2" * 700), ("b.json", b"{}"), ("b.txt", b"two")])
    starts = {m.name: m.offset for m in scan_bytes(tmp_path, content).members}
    cuts = {
        "inside the image": starts["b.jpg"] + 300,
        "inside the json's header": starts["b.json"] - 100,
        "inside the caption's header: json and image alone would pass": starts["b.txt"] - 100,
        "inside the caption": starts["b.txt"] + 1,
    }
    for name, cut in cuts.items():
        groups = group_samples(scan_bytes(tmp_path, content[:cut]))
        assert fates(groups) == [("a", "good"), ("b", "truncated_member")], name


def test_damage_after_a_complete_sample_leaves_it_alone(tmp_path: Path) -> None:
    content = tar_bytes([*TRIO, ("b.jpg", b"2" * 700)])
    at = scan_bytes(tmp_path, content).members[-1].offset
    groups = group_samples(scan_bytes(tmp_path, content[: at - 100]))
    assert fates(groups) == [("a", "good")]


def test_every_member_ends_in_exactly_one_place() -> None:
    generator = random.Random(11)
    stems = ["a", "b", "c/d", "./a", "../e", "__m__", ""]
    suffixes = [".jpg", ".png", ".txt", ".json", ".cls", "", ".TXT", ".a.b"]
    for _ in range(400):
        count = generator.randrange(12)
        names = [generator.choice(stems) + generator.choice(suffixes) for _ in range(count)]
        groups = group_names(*names)
        placed = [m for row in groups.rows for m in row.members]
        placed += [one.member for one in groups.skipped]
        assert sorted(placed, key=lambda m: m.offset) == list(group_names_members(names))
        keys = [row.key for row in groups.rows if isinstance(row, TarSample)]
        assert len(keys) == len(set(keys))


def group_names_members(names: list[str]) -> tuple[TarMember, ...]:
    """Return the members that group_names makes of these names."""
    return tuple(TarMember(name, n * 2 * BLOCK + BLOCK, 10, "0") for n, name in enumerate(names))


# --- the writer --------------------------------------------------------------------------------

LONG = "d" * 120 + "/" + "n" * 90 + ".jpg"
ENTRIES = [*TRIO, (LONG, b"l" * 512), ("é/ü.txt", "täxt".encode()), ("empty.txt", b"")]


def written(entries: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    write_tar(file, entries)
    return file.getvalue()


@pytest.mark.parametrize("entries", [[], TRIO, ENTRIES, [("a.jpg", b"x" * 9000)] * 3])
def test_the_writer_gives_the_bytes_of_tarfile_in_ustar(entries: list[tuple[str, bytes]]) -> None:
    assert written(entries) == tar_bytes(entries)
    assert len(written(entries)) % 10240 == 0


def test_the_writer_returns_what_a_scan_finds(tmp_path: Path) -> None:
    path = tmp_path / "out.tar"
    with path.open("wb") as file:
        members = write_tar(file, iter(ENTRIES))
    assert tuple(members) == scan_members(str(path)).members
    assert [read_range(str(path), m.offset, m.size) for m in members] == [d for _, d in ENTRIES]


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    entries = [
        (f"{key:05d}.{suffix}", f"{key} {suffix}".encode())
        for key in range(50)
        for suffix in ("jpg", "json", "txt")
    ]
    path = write(tmp_path, written(entries))
    with Path(path).open("rb") as file:
        read = list(group_by_keys(tar_file_expander([{"url": path, "stream": file}])))
    ours = group_samples(scan_members(path)).rows
    assert [sample["__key__"] for sample in read] == [row.key for row in ours]
    for sample, row in zip(read, ours, strict=True):
        assert isinstance(row, TarSample)
        assert row.txt is not None
        assert sample["jpg"] == read_range(path, *row.image)
        assert sample["txt"] == read_range(path, *row.txt)


@pytest.mark.parametrize(
    "name",
    ["", "d/", "../a.jpg", "/a.jpg", "a\n.jpg", "n" * 101, "d" * 156 + "/a.jpg", "\ud800.jpg"],
)
def test_names_that_do_not_fit_or_are_unsafe_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        written([(name, b"")])


def test_sanitised_keys_are_clean_short_and_different() -> None:
    keys = ["000012", "a/b", "a_b", "a.b", "caf\u00e9", "x" * 80, "x" * 81, "x" * 82, "", "\ud800"]
    clean = [sanitise_key(key) for key in keys]
    assert clean[0] == "000012"
    assert clean[1].startswith("a_b-")
    assert len(set(clean)) == len(keys)
    assert all(sanitise_key(key) == key for key in clean)
    assert all(written([(f"{key}.json", b"")]) for key in clean)
