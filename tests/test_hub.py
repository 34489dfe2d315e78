"""A model is named by its directory, by what ships with Warren, or by its name on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from manifests.errors import UserError
from train.models.hub import local_directory

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds one model, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--owner--tower"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    (model / "snapshots" / COMMIT).mkdir(parents=True)
    (model / "snapshots" / COMMIT / "config.json").write_text("{}")
    return tmp_path


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert local_directory(str(tmp_path)) == str(tmp_path)
    assert Path(local_directory("warren:demo/model"), "open_clip_config.json").is_file()


def test_a_downloaded_model_is_found_by_its_name_without_a_network(cache: Path) -> None:
    found = Path(local_directory("owner/tower"))
    assert found == cache / "models--owner--tower" / "snapshots" / COMMIT
    assert (found / "config.json").read_text() == "{}"


def test_what_cannot_be_had_is_told(cache: Path) -> None:
    with pytest.raises(UserError, match="neither a directory nor can it be downloaded"):
        local_directory("owner/other")
    with pytest.raises(UserError, match="is no model directory"):
        local_directory("/nowhere/at/all")
