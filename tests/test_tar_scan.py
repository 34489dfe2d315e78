"""The header scan against the standard library's, on whole, cut, corrupt and forged archives."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from tar_bytes import BLOCK, FORMATS, TRIO, header, info_of, padded, tar_bytes, write

from curate.media.tars import (
    BadSample,
    MemberScan,
    RangeReader,
    TarMember,
    TarSample,
    group_samples,
    read_range,
    scan_members,
)


def scan_bytes(folder: Path, content: bytes) -> MemberScan:
    return scan_members(write(folder, content))


@pytest.mark.parametrize("dialect", FORMATS.values(), ids=FORMATS.keys())
def test_the_scan_finds_what_the_standard_library_finds(tmp_path: Path, dialect: int) -> None:
    long_name = "d" * 90 + "/" + "n" * 95 + ".jpg"
    entries = [*TRIO, (long_name, b"x" * 512), ("sub/é.png", b""), ("last.webp", b"y" * 1025)]
    if dialect != tarfile.USTAR_FORMAT:
        entries.insert(2, ("e/" * 150 + "f.txt", b"deep"))
    path = write(tmp_path, tar_bytes(entries, dialect))
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size, "0") for m in archive.getmembers()]
    scan = scan_members(path)
    assert [tuple(member) for member in scan.members] == expected
    assert scan.damage is None
    assert [read_range(path, m.offset, m.size) for m in scan.members] == [d for _, d in entries]


@pytest.mark.parametrize("fraction", [0.0, 12.5])
def test_pax_headers_for_other_fields_do_not_disturb_the_scan(
    tmp_path: Path, fraction: float
) -> None:
    file = io.BytesIO()
    options = {"format": tarfile.PAX_FORMAT, "pax_headers": {"comment": "for the whole archive"}}
    with tarfile.open(fileobj=file, mode="w", **options) as archive:  # type: ignore[call-overload]
        archive.addfile(info_of("a.jpg", 3, mtime=fraction), io.BytesIO(b"abc"))
    scan = scan_bytes(tmp_path, file.getvalue())
    assert [(m.name, m.size) for m in scan.members] == [("a.jpg", 3)]
    assert scan.damage is None


def test_a_pax_size_overrules_the_header(tmp_path: Path) -> None:
    record = b"13 size=1000\n"
    assert len(record) == 13
    content = header(b"p", b"%o" % len(record), type_flag=b"x") + padded(record)
    content += header(b"big.jpg", b"0") + padded(b"z" * 1000) + header(b"b.txt", b"0")
    scan = scan_bytes(tmp_path, content)
    assert [(m.name, m.size) for m in scan.members] == [("big.jpg", 1000), ("b.txt", 0)]


def test_base_256_sizes_are_read(tmp_path: Path) -> None:
    size_field = b"\x80" + (600).to_bytes(11, "big")
    content = header(b"a.jpg", size_field) + padded(b"q" * 600) + header(b"a.txt", b"0")
    scan = scan_bytes(tmp_path, content)
    assert [(m.name, m.size) for m in scan.members] == [("a.jpg", 600), ("a.txt", 0)]
    assert scan.damage is None


def test_v7_archives_are_read_and_their_directories_skipped(tmp_path: Path) -> None:
    content = header(b"d/", b"0", type_flag=b"\0")
    content += header(b"d/a.jpg", b"        3 ", type_flag=b"\0") + padded(b"abc")
    scan = scan_bytes(tmp_path, content + bytes(2 * BLOCK))
    assert scan.members == (TarMember("d/a.jpg", 2 * BLOCK, 3, "0"),)
    assert scan.damage is None


def test_checksums_of_signed_bytes_are_accepted(tmp_path: Path) -> None:
    block = bytearray(header("é.jpg".encode(), b"0"))
    signed = sum(b - 256 if b > 127 else b for b in block[:148] + b" " * 8 + block[156:])
    block[148:156] = b"%06o\0 " % signed
    assert [m.name for m in scan_bytes(tmp_path, bytes(block)).members] == ["é.jpg"]


def test_links_and_devices_are_listed_with_their_type_and_without_payload(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(info_of("d", 0, type=tarfile.DIRTYPE))
        archive.addfile(info_of("a.jpg", 0, type=tarfile.SYMTYPE, linkname="t" * 150))
        archive.addfile(info_of("b.jpg", 0, type=tarfile.LNKTYPE, linkname="c.jpg"))
        archive.addfile(info_of("c.jpg", 0, type=tarfile.CHRTYPE))
        archive.addfile(info_of("d.txt", 2), io.BytesIO(b"ok"))
    content = bytearray(file.getvalue())
    scan = scan_bytes(tmp_path, bytes(content))
    assert [(m.name, m.type_flag) for m in scan.members] == [
        ("a.jpg", "2"),
        ("b.jpg", "1"),
        ("c.jpg", "3"),
        ("d.txt", "0"),
    ]
    hard_link_with_size = header(b"b.jpg", b"1750", type_flag=b"1") + header(b"d.txt", b"0")
    assert len(scan_bytes(tmp_path, hard_link_with_size).members) == 2


def test_sparse_files_are_skipped_whole_and_named_as_unsafe(tmp_path: Path) -> None:
    old_gnu = bytearray(header(b"a.jpg", b"3", type_flag=b"S", rest=b"ustar  \0"))
    old_gnu[482] = 1  # the map goes on in one more block
    old_gnu[148:156] = b" " * 8
    old_gnu[148:156] = b"%06o\0 " % sum(old_gnu)
    records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b.jpg"}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(
            info_of("GNUSparseFile.0/b.jpg", 5, pax_headers=records), io.BytesIO(b"5" * 5)
        )
        archive.addfile(info_of("c.txt", 1), io.BytesIO(b"c"))
    content = bytes(old_gnu) + bytes(BLOCK) + padded(b"abc") + file.getvalue()
    scan = scan_bytes(tmp_path, content)
    assert [m.name for m in scan.members] == ["a.jpg", "b.jpg", "c.txt"]
    rows = group_samples(scan).rows
    assert [row.error_class for row in rows[:2] if isinstance(row, BadSample)] == [
        "unsafe_member_type"
    ] * 2


def test_names_that_are_not_utf8_stay_different_and_become_valid(tmp_path: Path) -> None:
    content = (
        header(b"\xff.jpg", b"0") + header(b"\xfe.jpg", b"0") + header(b"\xed\xa0\x80.txt", b"0")
    )
    names = [m.name for m in scan_bytes(tmp_path, content).members]
    assert len(set(names)) == 3
    assert all(name.encode("utf-8").decode("utf-8") == name for name in names)


@pytest.mark.parametrize("dialect", FORMATS.values(), ids=FORMATS.keys())
def test_cut_anywhere_the_readable_prefix_is_returned(tmp_path: Path, dialect: int) -> None:
    long_name = "p/" * 49 + "q" * 60 + ".jpg"
    content = tar_bytes([*TRIO, (long_name, b"w" * 900), ("b.txt", b"two")], dialect)
    whole = scan_bytes(tmp_path, content).members
    cuts = {*range(0, len(content) + 1, BLOCK), *range(100, len(content), 777)}
    for cut in sorted(cuts):
        scan = scan_bytes(tmp_path, content[:cut])
        with_payload = [m for m in whole if m.offset + m.size <= cut]
        with_header = [m for m in whole if m.offset <= cut]
        assert scan.members == tuple(with_header[: len(scan.members)])
        assert len(scan.members) in {len(with_payload), len(with_header)}
        if len(with_header) > len(with_payload):
            assert scan.damage is not None
            assert scan.damage_offset is not None
            assert scan.damage_offset <= cut
        good = [row for row in group_samples(scan).rows if isinstance(row, TarSample)]
        assert all(m.offset + m.size <= cut for row in good for m in row.members)


def test_a_corrupt_header_ends_the_scan_there_with_its_position(tmp_path: Path) -> None:
    content = tar_bytes([*TRIO, ("b.jpg", b"2" * 10), ("b.txt", b"b")])
    whole = scan_bytes(tmp_path, content).members
    for number, member in enumerate(whole):
        at = member.offset - BLOCK
        for place in (0, 110, 130, 150, 156, 300, 500):
            corrupt = bytearray(content)
            corrupt[at + place] ^= 0x15
            scan = scan_bytes(tmp_path, bytes(corrupt))
            assert scan.members == whole[:number]
            assert scan.damage is not None
            assert scan.damage_offset == at


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!doctype html><html>404</html>" * 100,
        gzip.compress(tar_bytes(TRIO)),
        random.Random(0).randbytes(5000),
        b"\0" * 100 + b"x",
        b"short",
    ],
)
def test_a_file_that_is_no_tar_has_no_members_and_says_so(tmp_path: Path, content: bytes) -> None:
    scan = scan_bytes(tmp_path, content)
    assert scan.members == ()
    assert scan.damage
    assert scan.damage_offset == 0
    assert group_samples(scan).rows == ()


def test_a_compressed_tar_is_told_by_name(tmp_path: Path) -> None:
    damage = scan_bytes(tmp_path, gzip.compress(tar_bytes(TRIO))).damage
    assert damage is not None
    assert "gzip" in damage


@pytest.mark.parametrize(
    "block",
    [
        header(b"a.jpg", b"\xff" * 12),  # base-256, minus one
        header(b"a.jpg", b"12x4"),
        header(b"a.jpg", b"-1"),
        header(b"p", b"17777777777", type_flag=b"L"),
        header(b"p", b"10", type_flag=b"x") + padded(b"99 path="),
        header(b"p", b"12", type_flag=b"x") + padded(b"10 size=-"),
        header(b"p", b"5", type_flag=b"L") + padded(b"a.jpg"),  # and then nothing
    ],
)
def test_forged_headers_are_damage(tmp_path: Path, block: bytes) -> None:
    scan = scan_bytes(tmp_path, tar_bytes(TRIO)[: 7 * BLOCK] + block)
    assert [m.name for m in scan.members[:3]] == ["a.jpg", "a.json", "a.txt"]
    assert scan.damage is not None


def test_a_huge_extension_header_is_not_loaded(tmp_path: Path) -> None:
    size = 2 << 20
    content = header(b"p", b"%o" % size, type_flag=b"x") + bytes(size) + tar_bytes(TRIO)
    scan = scan_bytes(tmp_path, content)
    assert scan.members == ()
    assert scan.damage is not None


def test_an_empty_archive_and_missing_end_blocks_are_no_damage(tmp_path: Path) -> None:
    assert scan_bytes(tmp_path, tar_bytes([])) == MemberScan((), 10240)
    content = tar_bytes(TRIO)
    last = scan_bytes(tmp_path, content).members[-1]
    for end in (last.offset + last.size, last.offset + BLOCK, last.offset + 2 * BLOCK):
        scan = scan_bytes(tmp_path, content[:end])
        assert len(scan.members) == 3
        assert scan.damage is None


def test_an_archive_behind_the_end_marker_is_reported_and_not_lost_silently(tmp_path: Path) -> None:
    scan = scan_bytes(tmp_path, tar_bytes(TRIO) + tar_bytes([("b.jpg", b"b")]))
    assert len(scan.members) == 3
    assert scan.damage is not None
    assert "end-of-archive" in scan.damage


def test_random_damage_never_raises(tmp_path: Path) -> None:
    generator = random.Random(5)
    dialects = list(FORMATS.values())
    for _ in range(300):
        content = bytearray(
            tar_bytes([*TRIO, ("d" * 80 + "/é" * 30 + ".jpg", b"1")], generator.choice(dialects))
        )
        for _ in range(generator.choice([1, 3, 30])):
            content[generator.randrange(len(content))] = generator.randrange(256)
        scan = scan_bytes(tmp_path, bytes(content))
        groups = group_samples(scan)
        assert len(groups.skipped) + sum(len(r.members) for r in groups.rows) == len(scan.members)


def test_remote_files_give_the_same_scan_and_bytes(tmp_path: Path) -> None:
    content = tar_bytes([(f"{n:04d}.jpg", bytes([n % 256]) * 3000) for n in range(600)])
    local = scan_bytes(tmp_path, content)
    remote_path = "memory://warren-test/shard.tar"
    with fsspec.open(remote_path, "wb") as file:
        file.write(content)
    assert scan_members(remote_path) == local
    with RangeReader(remote_path) as reader:
        assert all(
            reader.read(m.offset, 4) == content[m.offset : m.offset + 4] for m in local.members
        )
        with pytest.raises(EOFError):
            reader.read(len(content) - 3, 4)


def test_one_reader_serves_many_threads(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(1 << 20)
    starts = [random.Random(n).randrange(len(content) - 1000) for n in range(2000)]
    with RangeReader(write(tmp_path, content)) as reader, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: reader.read(start, 1000), starts))
    assert found == [content[start : start + 1000] for start in starts]


def test_reading_past_the_end_is_an_error_and_a_missing_file_too(tmp_path: Path) -> None:
    path = write(tmp_path, b"12345")
    assert read_range(path, 5, 0) == b""
    with pytest.raises(EOFError):
        read_range(path, 3, 3)
    with pytest.raises(FileNotFoundError):
        scan_members(str(tmp_path / "absent.tar"))
