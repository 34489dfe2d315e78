"""The recall probe against brute force: where every row is sampled its figures are the truth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracle
import pytest
from click.testing import CliRunner
from small_inputs import recipe_for, record, run_here, stages, write_embeddings

from curate.duplicates.probe import probe
from curate.vectors.assign import assign
from curate.vectors.exact import Float16Rows
from curate.vectors.ghosts import ghosts_of
from curate.vectors.grouped import MEMBER, Members
from pipelines.cli import main

ABOVE, MARGIN, CAP = 0.9, 0.05, 2


def straddling(num_rows: int = 300, *, dim: int = 8, seed: int = 0) -> Float16Rows:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_rows, dim))
    rows[num_rows // 3 :] = rows[rng.integers(0, num_rows // 3, num_rows - num_rows // 3)]
    rows += rng.normal(scale=0.2, size=rows.shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def world(rows: Float16Rows) -> tuple[Members, np.ndarray]:
    centroids = rows[:9].astype(np.float32)
    found = assign(rows, centroids)
    members = np.zeros(len(rows), MEMBER)
    members["uid"] = 7 * np.arange(len(rows)) + 3
    members["cluster"], members["d2"] = found.cluster, found.d2
    return members, centroids


def labels(is_edge: np.ndarray) -> list[int]:
    found = list(range(len(is_edge)))
    for i, j in np.argwhere(is_edge):
        old, new = max(found[i], found[j]), min(found[i], found[j])
        found = [new if one == old else one for one in found]
    return found


def test_with_every_row_sampled_the_figures_are_those_of_brute_force() -> None:
    rows = straddling()
    members, centroids = world(rows)

    def blocks() -> Iterator[tuple[Members, Float16Rows]]:
        for part in np.array_split(np.arange(len(rows)), 4):
            yield members[part], rows[part]

    found = probe(
        blocks,
        centroids,
        similarity_above=ABOVE,
        ghost_margin=MARGIN,
        ghost_cap=CAP,
        num_sampled=len(rows),
        most_rows=len(rows),
        seed=1,
    )
    units = oracle.units(rows)
    near = units @ units.T > int(ABOVE * oracle.UNIT**2)
    np.fill_diagonal(near, False)
    cluster = members["cluster"]
    same = near & (cluster[:, None] == cluster)
    ghost = np.zeros((len(rows), 9), np.bool_)
    ghost[ghosts_of(rows, centroids, margin=MARGIN, cap=CAP)] = True
    met = same | (near & (ghost[:, cluster] | ghost[:, cluster].T))
    true, within, joined = (len(set(labels(one))) for one in (near, same, met))
    assert found.pairs == near.sum() > 300
    assert found.pairs_found_within == pytest.approx(same.sum() / near.sum())
    assert found.pairs_found_with_ghosts == pytest.approx(met.sum() / near.sum())
    assert found.excess_within == pytest.approx(within / true - 1)
    assert found.excess_with_ghosts == pytest.approx(joined / true - 1)
    assert found.components_per_row * len(rows) == pytest.approx(true)
    assert within > joined > true
    order = np.lexsort((members["uid"], -members["d2"]))
    kept = [at for p, at in enumerate(order) if not same[at, order[:p]].any()]
    assert found.pairwise_max_per_row * len(rows) == pytest.approx(len(kept))
    assert (found.rows, found.sampled, found.open_rows) == (300, 300, 0)


def test_components_that_are_not_closed_are_left_out_and_counted() -> None:
    rows = straddling()
    members, centroids = world(rows)
    found = probe(
        lambda: [(members, rows)],
        centroids,
        similarity_above=ABOVE,
        ghost_margin=MARGIN,
        ghost_cap=CAP,
        num_sampled=40,
        most_rows=60,
        seed=1,
    )
    assert found.sampled == 40
    assert 0 < found.open_rows < 40


def test_the_command_probes_a_run_with_and_without_ghosts(tmp_path: Path) -> None:
    for part in range(2):
        write_embeddings(tmp_path / "in", part, straddling(dim=16, seed=part))
    recipe = recipe_for(
        tmp_path / "in",
        "clip_retrieval",
        cluster={"num_clusters": 8, "iterations": 3},
        dedup={"similarity_above": ABOVE},
    )
    answers = []
    for ghosts in ({}, {"ghost_margin": 0.04}):
        values = recipe | {"dedup": recipe["dedup"] | ghosts}
        chain = stages(run_here(values, tmp_path / "out"))
        said = CliRunner().invoke(main, ["probe", str(tmp_path / "out"), "--rows", "600", "--json"])
        answers.append(json.loads(said.stdout))
        kind = "with_ghosts" if ghosts else "within"
        kept = record(chain["dedup"])["kept"]
        assert answers[-1][f"components_{kind}_per_row"] * 600 == pytest.approx(kept)
    assert answers[0] == answers[1]
    table = CliRunner().invoke(main, ["probe", str(tmp_path / "out"), "--rows", "100"])
    assert "SemDeDup's rule" in table.stdout
    run_here(recipe, tmp_path / "short", until="ingest")
    refused = CliRunner().invoke(main, ["probe", str(tmp_path / "short")])
    assert refused.exit_code == 2
