"""A model is named by its directory, by what ships with Warren, or by its name on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from small_llava import save_language_model, save_tower
from small_training import warren

from manifests.errors import UserError
from train.models.hub import hub_name_of, is_at_hand, local_directory

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds one model, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (snapshot(tmp_path, "owner", "tower") / "config.json").write_text("{}")
    return tmp_path


def snapshot(cache: Path, owner: str, name: str) -> Path:
    """Return a model's folder in the cache, empty."""
    model = cache / f"models--{owner}--{name}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    (model / "snapshots" / COMMIT).mkdir(parents=True)
    return model / "snapshots" / COMMIT


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


def test_a_downloaded_model_tells_its_name(cache: Path) -> None:
    assert hub_name_of(local_directory("owner/tower")) == "owner/tower"
    assert hub_name_of(str(cache)) is None
    assert is_at_hand("owner/tower")
    assert is_at_hand(str(cache))
    assert not is_at_hand("owner/other")
    assert not is_at_hand("/nowhere/at/all")


def test_commands_take_hub_names_and_a_composed_model_keeps_them(cache: Path) -> None:
    save_tower(snapshot(cache, "some", "siglip"))
    save_language_model(snapshot(cache, "some", "lm"), "qwen2")
    made = cache / "composed"
    done = warren("compose", "some/siglip", "some/lm", "--out", made)
    assert done.exit_code == 0, done.output
    origin = json.loads((made / "origin.json").read_text())
    assert {role: one["hub_name"] for role, one in origin["parts"].items()} == {
        "vision_tower": "some/siglip",
        "language_model": "some/lm",
    }
    shutil.copytree(made, snapshot(cache, "my", "llava"), dirs_exist_ok=True)
    said = warren("chat", "my/llava", "--max-tokens", 2, typed="Who?\n")
    assert said.exit_code == 0, said.output
    for command in ("chat", "serve"):
        refused = warren(command, "my/other")
        assert refused.exit_code == 2
        assert "neither a directory nor can it be downloaded" in refused.output
