"""The pictures of an instruction mix, and the folders and the tar that they lie in.

The folders are those of LLaVA-1.5's README; Visual Genome's is a tar, so that a run reads both.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.demo.junk import encode_jpeg
from pipelines.demo.mix_dirt import CLEAN, Dirt
from pipelines.demo.mix_questions import clear_scene
from pipelines.demo.mix_rows import (
    Builder,
    captioned,
    core,
    options_or_boxes,
    regions,
    short_answers,
)
from pipelines.demo.scenes import Scene, draw_scene
from pipelines.demo.seeds import rng_for


@dataclass(frozen=True, slots=True)
class Folder:
    """One folder of images.

    prefix: what paths in the rows begin with. share: of all pictures. builders: each makes one row
    of every picture. name: picture number -> file name. in_tar: the images are members of a tar.
    """

    prefix: str
    share: float
    builders: tuple[Builder, ...]
    name: str
    with_digit: bool = False
    in_tar: bool = False

    @property
    def place(self) -> str:
        """Where the images lie, below the folder of all images."""
        return f"{self.prefix}.tar" if self.in_tar else self.prefix


FOLDERS = {
    "coco": Folder("coco/train2017", 0.30, (short_answers, options_or_boxes), "{:012d}.jpg"),
    "gqa": Folder("gqa/images", 0.15, (short_answers,), "{:d}.jpg"),
    "ocr_vqa": Folder("ocr_vqa/images", 0.10, (short_answers,), "{:010d}.jpg", with_digit=True),
    "textvqa": Folder("textvqa/train_images", 0.10, (captioned,), "{:016x}.jpg", with_digit=True),
    "vg": Folder("vg/VG_100K", 0.35, (core, regions), "{:d}.jpg", in_tar=True),
}


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture: where rows say it is, its scene, and the bytes of its file (None: no file)."""

    folder: Folder
    path: str
    scene: Scene
    image: bytes | None


def make_picture(seed: int, number: int, folder_name: str, dirt: Dirt = CLEAN) -> Picture:
    """Return picture `number` of the mix `seed`, its file damaged as `dirt` says."""
    folder = FOLDERS[folder_name]
    scene = clear_scene(seed, number, with_digit=folder.with_digit)
    rng = rng_for(seed, "mix picture", number)
    jpeg = encode_jpeg(draw_scene(scene), int(rng.integers(82, 97)))
    path = f"{folder.prefix}/{folder.name.format(number * 17 + 9)}"
    return Picture(folder, path, scene, dirt.damage(jpeg, rng))


def folder_names(num_pictures: int) -> list[str]:
    """Return the folder of each of `num_pictures` pictures, by the shares."""
    names: list[str] = []
    for name, folder in FOLDERS.items():
        names += [name] * round(folder.share * num_pictures)
    return (names + [next(iter(FOLDERS))] * num_pictures)[:num_pictures]


def write_pictures(images_dir: Path, pictures: Iterable[Picture], file_time: int) -> list[Path]:
    """Write every picture's file below `images_dir`; return the paths of the files."""
    files: dict[Path, bytes] = {}
    members: dict[Path, list[tuple[str, bytes]]] = {}
    for picture in pictures:
        if picture.image is None:
            continue
        if picture.folder.in_tar:
            member = (picture.path.rpartition("/")[2], picture.image)
            members.setdefault(images_dir / picture.folder.place, []).append(member)
        else:
            files[images_dir / picture.path] = picture.image
    files |= {path: _tar_bytes(found, file_time) for path, found in members.items()}
    for path, payload in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)
    return list(files)


def _tar_bytes(files: Sequence[tuple[str, bytes]], file_time: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in sorted(files):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(payload), file_time
            tar.addfile(member, io.BytesIO(payload))
    return buffer.getvalue()
