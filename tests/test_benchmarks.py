"""The benchmarks run, and what they compare gives the same answers. Nothing here is about speed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parent / "benchmarks"
QUICK = ("dedup", "assign", "ghosts", "grouping", "cuts", "tars", "scale", "mix", "download")


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def module(name: str) -> Any:
    found: ModuleType = importlib.import_module(name)
    return found


def start(name: str, out: Path) -> list[dict[str, Any]]:
    """Run a benchmark's quick form in this process, return the rows of its table."""
    file, words = module(f"bench_{name}"), ["--quick", "--device", "cpu", "--out", str(out)]
    if hasattr(file, "main"):
        file.main(words)
    else:
        module("report").run(f"bench_{name}", file.__doc__, file.compare, words)
    sections = json.loads((out / "bench.json").read_text())["sections"]
    (rows,) = (one["rows"] for key, one in sections.items() if key.startswith(f"bench_{name}"))
    return rows


@pytest.mark.parametrize("name", [*QUICK, pytest.param("train", marks=pytest.mark.slow)])
def test_the_quick_form_runs_and_fills_the_table(name: str, tmp_path: Path) -> None:
    rows = start(name, tmp_path)
    assert rows
    assert not [row["what"] for row in rows if "skipped" in row["ours"]]
    assert all(row["what"] in (tmp_path / "bench.md").read_text() for row in rows)


def test_tables_of_several_files_stand_side_by_side(tmp_path: Path) -> None:
    first, second = start("grouping", tmp_path), start("tars", tmp_path)
    table = (tmp_path / "bench.md").read_text()
    assert all(row["what"] in table for row in (*first, *second))


def test_every_file_that_make_runs_has_a_quick_form_here() -> None:
    files = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")}
    assert files == {*QUICK, "train", "baseline"}  # which is one size of scale


def test_what_was_skipped_or_has_no_target_is_neither_met_nor_missed() -> None:
    row = module("report").Row
    assert [row("", "", ratio=ratio, at_least=2.0).met for ratio in (None, 1.9, 2.0)] == [
        None,
        False,
        True,
    ]
    assert row("", "", ratio=1.0).met is None
    assert row("", "", ratio=1.3, at_least=0.8, at_most=1.2).met is False
    (skipped,) = module("report").skipped("a thing", "json", "no_such_package")
    assert skipped.ours == "skipped: needs no_such_package"


def test_dedup_and_its_alternatives_agree() -> None:
    import torch

    rows = module("synthetic").World.of(3, 64).cluster(700)
    wide = torch.from_numpy(rows).float()
    dedup, alternatives = module("bench_dedup"), module("alternatives")
    found = dedup.components(rows, dedup.ABOVE)
    assert np.array_equal(alternatives.batch_bfs(wide, dedup.ABOVE), found)
    stays = alternatives.upper_triangle_max(wide, dedup.ABOVE, chunk_rows=100)
    masked = alternatives.upper_triangle_max(wide, dedup.ABOVE, chunk_rows=100, skips_later=False)
    similar = np.tril(rows.astype(np.float64) @ rows.astype(np.float64).T, -1) > dedup.ABOVE
    assert stays.tolist() == masked.tolist() == (~similar.any(axis=1)).tolist()
    assert stays[np.unique(found)].all()  # the first of a component has no earlier one


def test_assign_and_its_alternatives_agree() -> None:
    import torch

    world, alternatives = module("synthetic").World.of(3, 64), module("alternatives")
    rows, centroids = world.rows(300), world.rows(20, part=1).astype(np.float32)
    found = module("bench_assign").assign(rows, centroids).cluster
    wide = rows.astype(np.float32)
    flat = alternatives.flat_index(centroids).search(wide, 1)[1][:, 0]
    there = alternatives.flat_torch(torch.from_numpy(wide), torch.from_numpy(centroids))
    exact = module("bench_assign").exact_labels(rows, centroids, found)
    assert found.tolist() == flat.tolist() == there.tolist() == exact.tolist()


def test_ways_to_group_rows_agree(tmp_path: Path) -> None:
    grouping, alternatives = module("bench_grouping"), module("alternatives")
    paths = grouping.write_parts(tmp_path, 400, 8)
    clusters = np.random.default_rng(0).integers(0, 50, 400) * 2  # some have no row
    ways = (
        grouping.group_and_read(tmp_path, clusters),
        alternatives.gather_rows(paths, clusters),
        alternatives.list_rows(paths, clusters, passes=3),
    )
    ours, *others = ({number: rows.tobytes() for number, rows in way} for way in ways)
    assert set(ours) == set(clusters.tolist())
    assert all(other == ours for other in others)


def test_ghosts_without_a_cap_and_with_the_provable_margin_miss_nothing() -> None:
    ghosts = module("bench_ghosts")
    rows = module("synthetic").World.of(3, 32).parts(600)
    centroids = ghosts.lloyd.train(rows, num_clusters=6, iterations=3, seed=0)
    cluster = ghosts.assign(rows, centroids).cluster
    margin = (2 - 2 * ghosts.ABOVE) ** 0.5 / 2
    near = ghosts.Ghosts(*ghosts.ghosts_of(rows, centroids, margin=margin, cap=None))
    true = ghosts.components(rows, ghosts.ABOVE).tolist()
    found = ghosts.global_components(rows, cluster, near).tolist()
    assert len({*zip(true, found, strict=True)}) == len(set(true)) == len(set(found))
    assert ghosts.pairs_found(rows, cluster, near, np.arange(600)) == 1.0


def test_rows_of_the_world_depend_on_the_seed_and_the_part_alone() -> None:
    world = module("synthetic").World.of(1, 32)
    rows = world.rows(300, part=2)
    assert rows.tobytes() == module("synthetic").World.of(1, 32).rows(300, part=2).tobytes()
    assert rows.tobytes() != world.rows(300, part=3).tobytes()
    assert np.abs(np.linalg.norm(rows.astype(np.float64), axis=1) - 1).max() < 1e-3
    assert len(np.unique(rows, axis=0)) < 300  # some are byte-identical


def test_the_instruction_world_has_the_rows_asked_for_and_no_two_images_alike(
    tmp_path: Path,
) -> None:
    file = module("mix_world")
    world = file.write_world(tmp_path, num_rows=70, num_images=20)
    rows = json.loads((world / "rows.json").read_bytes())
    assert [row["id"] for row in rows] == [f"row_{number}" for number in range(70)]
    named = [row["image"] for row in rows if "image" in row]
    assert named == [file.path_of(image) for image in range(20)]
    assert len({(world / path).read_bytes() for path in named}) == 20
    first, last = (np.asarray(Image.open(world / file.path_of(at))) for at in (0, 16))
    assert np.array_equal(first, last)  # of 16 pictures, told apart by a comment only
    for row in rows:
        roles = [turn["from"] for turn in row["conversations"]]
        assert roles == ["human", "gpt"] * (len(roles) // 2)
        text = "".join(turn["value"] for turn in row["conversations"])
        assert text.count("<image>") == ("image" in row)
    assert list(file.rows(70, 20)) == rows


def test_peak_memory_counts_a_command_and_what_it_starts(tmp_path: Path) -> None:
    hold = "held = b'x' * (64 << 20); import time; time.sleep(0.5)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], check=True)"
    measured, log = module("tree_memory").measured, tmp_path / "log"
    cost = measured([sys.executable, "-c", start], tmp_path, log)
    assert 64 << 20 < cost.peak < 256 << 20
    assert cost.own_peak == cost.peak
    assert cost.seconds >= 0.5
    with pytest.raises(SystemExit, match="bad luck"):
        measured([sys.executable, "-c", "raise ValueError('bad luck')"], tmp_path, log)
