"""Assembled shards opened by others' readers: webdataset, wids, open_clip and datasets."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_inputs import rows_of, run_here, stages
from small_mixes import mix_recipe
from small_shards import assembled, originals, plain_keys, written

from curate.media.torchvision_ops import ensure_torchvision_importable
from manifests.work import StageDir


@pytest.fixture
def closes_late() -> Iterator[None]:
    """Collect what webdataset leaves open while its warnings are still filtered."""
    yield
    gc.collect()


leaves_files_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageDir, dict[str, bytes]]:
    """Return assembled shards, and the members they were made from."""
    shards = originals()
    directory = assembled(written(tmp_path_factory.mktemp("ready") / "in", shards))
    return directory, {name: data for members in shards.values() for name, data in members.items()}


@leaves_files_open
@pytest.mark.usefixtures("closes_late")
def test_webdataset_reads_them(ready: tuple[StageDir, dict[str, bytes]]) -> None:
    import webdataset

    directory, given = ready
    pattern = f"{directory.path}/shards/{{00000..00003}}.tar"
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert len(samples) == 15
    for sample in samples:
        assert sample["jpg"] == given[f"{sample['__key__']}.jpg"]
        assert sample["txt"] == given[f"{sample['__key__']}.txt"]
    pairs = webdataset.WebDataset(pattern, shardshuffle=False).decode("pil").to_tuple("jpg", "json")
    assert {image.size for image, _ in pairs} == {
        (20 + r, 16 + s) for r in range(5) for s in range(3)
    }


def test_wids_reads_them_by_position(
    ready: tuple[StageDir, dict[str, bytes]], tmp_path: Path
) -> None:
    import wids

    directory, given = ready
    path = f"{directory.path}/shards/wids.json"
    samples = wids.ShardListDataset(path, cache_dir=str(tmp_path), transformations=[])
    assert len(samples) == 15
    for at, key in enumerate(plain_keys(directory)):
        assert samples[at][".jpg"].read() == given[f"{key}.jpg"]


@leaves_files_open
@pytest.mark.usefixtures("closes_late")
def test_open_clip_loads_them(ready: tuple[StageDir, dict[str, bytes]]) -> None:
    ensure_torchvision_importable()
    import torch
    from open_clip_train.data import get_dataset_size, get_wds_dataset
    from torchvision.transforms.functional import pil_to_tensor, resize

    directory, given = ready
    pattern = f"{directory.path}/shards/{{00000..00003}}.tar"
    assert get_dataset_size(pattern) == (15, 4)  # as sizes.json says
    captions: list[str] = []

    def tokenizer(text: str) -> list[torch.Tensor]:
        captions.append(text)
        return [torch.tensor([len(text)])]

    # Its loader for training wants webdataset 0.2.86 or older; the one for validation is the same
    # but for the shuffling.
    args = argparse.Namespace(val_data=pattern, val_num_samples=15, batch_size=5, workers=0)
    loader = get_wds_dataset(
        args, lambda image: resize(pil_to_tensor(image), [8, 8]), False, tokenizer=tokenizer
    ).dataloader
    batches = list(loader)
    assert [tuple(images.shape) for images, _ in batches] == [(5, 3, 8, 8)] * 3
    assert captions == [given[f"{key}.txt"].decode() for key in plain_keys(directory)]


def test_datasets_reads_them(ready: tuple[StageDir, dict[str, bytes]], tmp_path: Path) -> None:
    import datasets

    directory, given = ready
    found = datasets.load_dataset(
        "webdataset",
        data_files=f"{directory.path}/shards/*.tar",
        split="train",
        cache_dir=str(tmp_path),
    )
    assert found.num_rows == 15
    plain = found.cast_column("jpg", datasets.Image(decode=False))
    for row in plain:
        assert row["jpg"]["bytes"] == given[f"{row['__key__']}.jpg"]
        assert row["json"]["conversations"][0]["from"] == "human"
    by_card = datasets.load_dataset(directory.path, split="train", cache_dir=str(tmp_path))
    assert by_card.num_rows == 15
    assert by_card[0]["jpg"].size == (20, 16)


@leaves_files_open
@pytest.mark.usefixtures("closes_late")
def test_webdataset_reads_a_mix_of_images_and_text(tmp_path: Path) -> None:
    import webdataset

    mix = stages(run_here(mix_recipe(tmp_path / "world"), tmp_path / "out"))["mix"]
    tars = sorted(str(path) for path in Path(mix.path).glob("shards/*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert [one["__key__"] for one in samples] == [f"{at:09d}" for at in range(len(samples))]
    index = rows_of(mix)
    assert len(samples) == len(index)
    for one, row in zip(samples, index, strict=True):
        assert {name for name in one if not name.startswith("__")} - {"json"} == {
            f"{at}.{image['suffix']}" if len(row["images"]) > 1 else image["suffix"]
            for at, image in enumerate(row["images"])
        }
