"""The engine as a library: every example of the README runs as it is written there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from proof_worlds import embeddings_recipe
from test_readme import ROOT, _blocks

import curate

EXAMPLES = [text for kind, text in _blocks("curate/README.md") if kind == "python"]


def test_there_is_an_example_of_each_function_of_the_library() -> None:
    whole = "\n".join(EXAMPLES)
    assert len(EXAMPLES) == 3
    assert [name for name in curate.__all__ if f"{name}(" not in whole] == []
    assert all(callable(getattr(curate, name)) for name in curate.__all__)
    with pytest.raises(AttributeError, match="no attribute 'compnents'"):
        curate.compnents  # noqa: B018


@pytest.mark.parametrize("example", EXAMPLES, ids=["near-duplicates", "assign", "band"])
def test_the_example_runs_beside_published_embeddings(example: str, tmp_path: Path) -> None:
    embeddings_recipe(tmp_path, num_parts=1)
    code = example + "\nprint(sorted(name for name in dir() if not name.startswith('_')))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_memory_map_gives_what_the_array_gives(tmp_path: Path) -> None:
    embeddings_recipe(tmp_path, num_parts=1)
    path = tmp_path / "img_emb" / "img_emb_0000.npy"
    mapped, array = np.load(path, mmap_mode="r"), np.load(path)
    assert (curate.components(mapped, 0.9) == curate.components(array, 0.9)).all()
    forests = [curate.spanning_forest(rows, 0.8) for rows in (mapped, array)]
    assert (forests[0].similarity == forests[1].similarity).all()
    found = [curate.assign(rows, array[:8].astype(np.float32)) for rows in (mapped, array)]
    assert (found[0].d2 == found[1].d2).all()
