"""Images of instruction rows found in folders and tars, and each kind of bad one named."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from small_inputs import bad_rows, picture, rows_of, tar_of, write_tars
from small_resolves import bytes_of, detail_of, places, resolve, write_files
from tar_bytes import info_of

from curate.media.resolve import ResolveConfig, identity
from manifests.errors import UserError

# --- where an image is found ---------------------------------------------------------------------


def test_rows_say_where_each_image_lies_and_what_it_is(tmp_path: Path) -> None:
    kinds = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]
    pictures = {f"{kind}.jpg": picture(9 + i, 7, kind=kind) for i, kind in enumerate(kinds)}
    root = write_files(tmp_path / "in" / "coco", pictures)
    names = [f"coco/{name}" for name in pictures]
    directory = resolve(tmp_path, [("text", []), ("all", names)], roots={"coco": str(root)})
    assert rows_of(directory) == [
        {
            "uid": 1,
            "position": i,
            "image": f"coco/{kind}.jpg",
            "root": "coco",
            "choice": 0,
            "file": f"{kind}.jpg",
            "offset": 0,
            "size": len(pictures[f"{kind}.jpg"]),
            "suffix": kind.lower().replace("jpeg", "jpg"),
            "width": 9 + i,
            "height": 7,
        }
        for i, kind in enumerate(kinds)
    ]
    assert bytes_of(directory, {"coco": str(root)}) == list(pictures.values())
    assert bad_rows(directory) == []


def test_only_rows_that_clean_kept_are_resolved(tmp_path: Path) -> None:
    root = write_files(tmp_path / "in", {"a.jpg": picture()})
    rows = [("1", ["a.jpg"]), ("2", ["gone.jpg"]), ("3", ["a.jpg", "a.jpg"]), ("4", []), ("5", [])]
    directory = resolve(tmp_path, rows, dropped=["2", "5"], parts=2, roots={"": str(root)})
    found = [(row["uid"], row["position"]) for row in rows_of(directory)]
    assert found == [(0, 0), (2, 0), (2, 1)]
    assert bad_rows(directory) == []


def test_the_longest_prefix_is_tried_first_then_shorter_ones_and_places_in_order(
    tmp_path: Path,
) -> None:
    shades = iter(range(10, 200, 10))
    roots: dict[str, Any] = {"": "all", "coco": "coco", "coco/train": ["first", "second"]}
    held = {
        "first": ["1.jpg"],
        "second": ["1.jpg", "2.jpg"],
        "coco": ["train/2.jpg", "train/3.jpg", "training/1.jpg"],
        "all": ["coco/train/1.jpg", "coco/train/4.jpg", "coco/5.jpg", "cocoa/1.jpg"],
    }
    for folder, names in held.items():
        write_files(tmp_path / folder, {name: picture(shade=next(shades)) for name in names})
    given = {
        prefix: str(tmp_path / at) if isinstance(at, str) else [str(tmp_path / one) for one in at]
        for prefix, at in roots.items()
    }
    expected = {
        "coco/train/1.jpg": ("coco/train", 0, "1.jpg"),
        "coco/train/2.jpg": ("coco/train", 1, "2.jpg"),
        "coco/train/3.jpg": ("coco", 0, "train/3.jpg"),
        "coco/train/4.jpg": ("", 0, "coco/train/4.jpg"),
        "coco/5.jpg": ("", 0, "coco/5.jpg"),
        "coco/training/1.jpg": ("coco", 0, "training/1.jpg"),
        "cocoa/1.jpg": ("", 0, "cocoa/1.jpg"),
        "./coco//train/./1.jpg": ("coco/train", 0, "1.jpg"),
    }
    directory = resolve(tmp_path, [("all", list(expected))], roots=given)
    assert places(directory) == list(expected.values())
    read = bytes_of(directory, given)
    files = ["first/1", "second/2", "coco/train/3", "all/coco/train/4", "all/coco/5"]
    files += ["coco/training/1", "all/cocoa/1", "first/1"]
    assert read == [(tmp_path / f"{name}.jpg").read_bytes() for name in files]


def test_tars_and_webdataset_shards_hold_images_by_their_members_names(tmp_path: Path) -> None:
    shades = {name: picture(shade=at) for at, name in enumerate("abcdefg", start=20)}
    plain = [("./VG/a.jpg", shades["a"]), ("VG/b.jpg", shades["b"])]
    shards = {
        "00000.tar": [("x/c.jpg", shades["c"]), ("x/c.json", b"{}"), ("x/d.jpg", shades["d"])],
        "00001.tar": [("x/d.jpg", shades["e"]), ("x/f.png", picture(kind="PNG"))],
    }
    write_tars(tmp_path / "in", {"vg.tar": plain})
    write_tars(tmp_path / "wds", shards)
    write_files(tmp_path / "folder", {"g.jpg": shades["g"]})
    roots: dict[str, Any] = {
        "vg": [str(tmp_path / "folder"), str(tmp_path / "in" / "vg.tar")],
        "laion": str(tmp_path / "wds" / "{00000..00001}.tar"),
    }
    expected = {
        "vg/VG/b.jpg": ("vg", 1, "vg.tar"),
        "laion/x/f.png": ("laion", 0, "00001.tar"),
        "vg/g.jpg": ("vg", 0, "g.jpg"),
        "laion/x/d.jpg": ("laion", 0, "00000.tar"),  # in both shards: the first one's
        "vg/VG/a.jpg": ("vg", 1, "vg.tar"),
        "laion/x/c.jpg": ("laion", 0, "00000.tar"),
    }
    rows = [(image, [image]) for image in expected]
    directory = resolve(tmp_path, rows, parts=3, roots=roots)
    assert bad_rows(directory) == []
    assert places(directory) == list(expected.values())
    wanted = [shades["b"], picture(kind="PNG"), *(shades[name] for name in "gdac")]
    assert bytes_of(directory, roots) == wanted
    assert [row["suffix"] for row in rows_of(directory)] == ["jpg", "png", *["jpg"] * 4]
    payloads = [marker["payload"] for marker in directory.markers()]
    listed = [one["file"] for one in payloads if "tar" in one]
    assert listed == ["00000.tar", "00001.tar", "vg.tar"]


def test_of_members_of_one_name_the_last_counts_and_what_is_no_file_does_not(
    tmp_path: Path,
) -> None:
    old, new = picture(shade=1), picture(shade=99)
    members = [("a.jpg", old), ("a.jpg", new), ("../b.jpg", old)]
    path = write_tars(tmp_path / "in", {"one.tar": members}) / "one.tar"
    with tarfile.open(path, "a") as archive:
        archive.addfile(info_of("link.jpg", 0, type=tarfile.SYMTYPE, linkname="a.jpg"))
    roots = {"": str(path)}
    rows = [(name, [name]) for name in ("a.jpg", "b.jpg", "link.jpg")]
    directory = resolve(tmp_path, rows, roots=roots)
    assert bytes_of(directory, roots) == [new]
    assert bad_rows(directory) == [("b.jpg", "missing_image"), ("link.jpg", "missing_image")]


def test_remote_folders_are_looked_into(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/resolve-test/x/a.jpg", picture(700, 600))
    fs.pipe_file("/resolve-test/x/cut.jpg", picture()[:-2])
    roots = {"x": "memory://resolve-test/x"}
    try:
        rows = [(name, [f"x/{name}"]) for name in ("a.jpg", "cut.jpg", "gone.jpg")]
        directory = resolve(tmp_path, rows, roots=roots)
        expected = [("cut.jpg", "truncated_image"), ("gone.jpg", "missing_image")]
        assert bad_rows(directory) == expected
        assert bytes_of(directory, roots) == [picture(700, 600)]
        first = identity(ResolveConfig(roots=dict(roots)))
        fs.pipe_file("/resolve-test/x/b.jpg", picture())
        assert identity(ResolveConfig(roots=dict(roots))) != first
    finally:
        fs.rm("/resolve-test", recursive=True)


def test_links_in_a_folder_are_followed(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", {"a.jpg": picture()})
    root = write_files(tmp_path / "in", {"b.jpg": picture()})
    (root / "deep").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "broken.jpg").symlink_to(root / "nothing")
    directory = resolve(
        tmp_path, [("a", ["deep/a.jpg"]), ("b", ["broken.jpg"])], roots={"": str(root)}
    )
    assert places(directory) == [("", 0, "deep/a.jpg")]
    assert bad_rows(directory) == [("b", "missing_image")]
    assert identity(ResolveConfig(roots={"": str(root)}))


# --- what is refused -----------------------------------------------------------------------------

BAD_FILES = {
    "cut.jpg": (picture()[:-2], "truncated_image"),
    "cut.png": (picture(kind="PNG")[:-5], "truncated_image"),
    "page.jpg": (b"<!doctype html><title>404</title>", "unknown_format"),
    "empty.jpg": (b"", "empty_image"),
    "huge.png": (picture(1001, 1000, kind="PNG"), "too_many_pixels"),
}
BAD_PATHS = {
    "gone.jpg": "missing_image",
    "good.jpg/below.jpg": "missing_image",
    "": "missing_image",
    "../in/good.jpg": "unsafe_image_path",
    "x/../good.jpg": "unsafe_image_path",
    "x/..": "unsafe_image_path",
    "/etc/passwd": "unsafe_image_path",
    "x\\good.jpg": "unsafe_image_path",
    "C:/good.jpg": "unsafe_image_path",
    "go\nod.jpg": "unsafe_image_path",
    "go\0od.jpg": "unsafe_image_path",
    "http://example.com/good.jpg": "remote_image",
    "HTTPS://example.com/good.jpg": "remote_image",
    "s3://bucket/good.jpg": "remote_image",
    "data:image/png;base64,iVBORw0KGgo": "remote_image",
    "folder": "unreadable_image",
    "pipe.jpg": "unreadable_image",
    "n" * 300 + ".jpg": "unreadable_image",
}


def test_each_bad_image_has_its_error_class(tmp_path: Path) -> None:
    files = {name: data for name, (data, _) in BAD_FILES.items()}
    root = write_files(tmp_path / "in", files | {"good.jpg": picture(), "folder/x": b""})
    os.mkfifo(root / "pipe.jpg")
    expected = {name: error for name, (_, error) in BAD_FILES.items()} | BAD_PATHS
    rows = [(f"row {i}", [image]) for i, image in enumerate(expected)] + [("ok", ["good.jpg"])]
    directory = resolve(tmp_path, rows, roots={"": str(root)}, max_pixels=1_000_000)
    assert bad_rows(directory) == [(f"row {i}", e) for i, e in enumerate(expected.values())]
    for row, image in zip(rows_of(directory, "quarantine"), expected, strict=True):
        assert row["shard"] == "svit/svit.json"
        assert repr(image)[1:100].rstrip("'") in row["detail"]
        assert str(tmp_path) not in row["detail"], "the same on every machine"
    assert [row["image"] for row in rows_of(directory)] == ["good.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read_it_is_unreadable(tmp_path: Path) -> None:
    root = write_files(tmp_path / "in", {"a.jpg": picture()})
    (root / "a.jpg").chmod(0)
    directory = resolve(tmp_path, [("a", ["a.jpg"])], roots={"": str(root)})
    assert bad_rows(directory) == [("a", "unreadable_image")]


def test_a_row_is_quarantined_once_by_its_first_bad_image(tmp_path: Path) -> None:
    root = write_files(tmp_path / "in", {"a.jpg": picture(), "cut.jpg": picture()[:-2]})
    rows = [("1", ["a.jpg", "cut.jpg", "gone.jpg", "a.jpg"]), ("2", ["a.jpg"])]
    directory = resolve(tmp_path, rows, roots={"": str(root)})
    assert bad_rows(directory) == [("1", "truncated_image")]
    assert "'cut.jpg'" in detail_of(directory)
    assert [(row["uid"], row["image"]) for row in rows_of(directory)] == [(1, "a.jpg")]


def test_a_missing_image_is_told_with_the_roots_where_it_was_sought(tmp_path: Path) -> None:
    root = write_files(tmp_path / "in", {"a.jpg": picture()})
    roots = {"coco": str(root), "coco/train": str(root)}
    first = resolve(tmp_path / "1", [("1", ["coco/train/x.jpg"])], roots=roots)
    assert detail_of(first) == "'coco/train/x.jpg': is not below the roots ['coco/train', 'coco']"
    other = resolve(tmp_path / "2", [("1", ["vg/x.jpg"])], roots=roots)
    assert detail_of(other) == "'vg/x.jpg': no root has a prefix of it"


def test_a_bad_image_is_not_sought_in_the_next_place(tmp_path: Path) -> None:
    first = write_files(tmp_path / "1", {"a.jpg": b""})
    second = write_files(tmp_path / "2", {"a.jpg": picture()})
    directory = resolve(tmp_path, [("a", ["a.jpg"])], roots={"": [str(first), str(second)]})
    assert bad_rows(directory) == [("a", "empty_image")]


def test_damage_in_the_middle_is_found_by_decoding_alone(tmp_path: Path) -> None:
    whole = picture(200, 150)
    middle = len(whole) // 2
    broken = whole[:middle] + b"\xff\xc0" * 40 + whole[middle + 80 :]
    files = {"broken.jpg": broken, "whole.jpg": whole, "cut.png": picture(kind="PNG")[:-30]}
    root = write_files(tmp_path / "in", files)
    rows = [(name, [name]) for name in files]
    by_header = resolve(tmp_path / "1", rows, roots={"": str(root)})
    by_pixels = resolve(tmp_path / "2", rows, roots={"": str(root)}, check="decode")
    assert bad_rows(by_header) == [("cut.png", "truncated_image")]
    assert bad_rows(by_pixels) == [
        ("broken.jpg", "undecodable_image"),
        ("cut.png", "truncated_image"),
    ]
    assert rows_of(by_pixels) == [row for row in rows_of(by_header) if row["image"] == "whole.jpg"]


def test_a_cut_tar_loses_the_images_behind_the_cut_only(tmp_path: Path) -> None:
    whole = tar_of([("a.jpg", picture()), ("b.jpg", picture(200, 150)), ("c.jpg", picture())])
    tars = write_tars(tmp_path / "in", {"x.tar": whole[: 512 * 4 + len(picture())]})
    rows = [(name, [name]) for name in ("a.jpg", "b.jpg", "c.jpg")]
    directory = resolve(tmp_path, rows, roots={"": str(tars / "x.tar")})
    assert bad_rows(directory) == [("b.jpg", "truncated_image"), ("c.jpg", "missing_image")]
    (notes,) = (one["notes"] for one in directory.markers() if one["item"] == "tar-00000")
    assert notes["members"] == 2
    assert "past the file" in notes["damage"]


def test_what_is_no_tar_is_told(tmp_path: Path) -> None:
    path = write_files(tmp_path / "in", {"x.tar": b"\x1f\x8b" + bytes(2000)}) / "x.tar"
    with pytest.raises(UserError, match="gzip data"):
        resolve(tmp_path, [("a", ["a.jpg"])], roots={"": str(path)})


class Shaky(MemoryFileSystem):  # type: ignore[misc]
    """Files in memory whose first reads fail, as those of a network do now and then."""

    protocol = "shaky"
    store: ClassVar[dict[str, Any]] = {}
    failures_left = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("shaky://", "memory://")))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        """Return the bytes, once the failures are over."""
        if Shaky.failures_left:
            Shaky.failures_left -= 1
            raise OSError("connection reset")
        return bytes(super().cat_file(path, start, end, **options))


def test_an_error_of_a_network_is_no_verdict_on_the_image(tmp_path: Path) -> None:
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    fsspec.filesystem("shaky").pipe_file("/r/a.jpg", picture())
    Shaky.failures_left = 1
    with pytest.raises(OSError, match="connection reset"):
        resolve(tmp_path, [("a", ["a.jpg"])], roots={"": "shaky://r"})
    again = resolve(tmp_path, [("a", ["a.jpg"])], roots={"": "shaky://r"})
    assert [row["image"] for row in rows_of(again)] == ["a.jpg"]
    assert bad_rows(again) == []
