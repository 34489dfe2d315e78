"""A recipe as a submitted Ray job, from a checkout's copy, to a cluster that demands a token."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from proof_worlds import results, temporaries
from ray_env import ray_env
from small_inputs import run_here

from pipelines.demo.world import make_world
from pipelines.recipe import load

HERE = Path(__file__).parent.parent
PACKAGES = ("manifests", "curate", "train", "pipelines")
RECIPE = "pipelines/recipes/demo.yaml"
# What lies about in a checkout that people work in.
NOT_TO_TRAVEL = (
    "data/big.bin",
    "runs/mine/embed-12345678/img_emb/img_emb_0000.npy",
    "warren-demo/world/shards/00000.tar",
    "warren-demo/embed-12345678/img_emb/img_emb_0000.npy",
    "vectors.npy",
    "shards/00000.tar",
    "table.parquet",
    ".git/config",
    ".venv/bin/python",
    ".mypy_cache/3.11/cache.json",
    ".pytest_cache/v/cache",
    "pipelines/__pycache__/cli.cpython-311.pyc",
    "warren.egg-info/PKG-INFO",
    "dist/warren-0.1.0-py3-none-any.whl",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the code, alone importable by the job, with the usual litter around it."""
    folder = tmp_path / "checkout"
    for name in PACKAGES:
        shutil.copytree(HERE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / ".gitignore", folder)
    for name in NOT_TO_TRAVEL:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture
def env(tmp_path: Path, checkout: Path) -> Iterator[dict[str, str]]:
    """Return the user's environment: a home of its own, in which `up` makes the token."""
    made = {k: v for k, v in (os.environ | ray_env()).items() if not k.startswith("RAY_AUTH_TOKEN")}
    made |= {"HOME": str(tmp_path / "home"), "WARREN_RAY_DIR": str(tmp_path / "state")}
    made.pop("PYTHONPATH", None)
    (tmp_path / "home").mkdir()
    yield made
    cluster(["down"], env=made, cwd=checkout)


def cluster(
    words: list[str], *, env: dict[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cluster", *words]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)


def packaged_files(state: Path) -> set[str]:
    """Return the files of the working directory that the cluster unpacked for the job."""
    temp_dir = Path(json.loads((state / "cluster.json").read_text())["temp_dir"])
    (folder,) = {
        path.resolve()
        for path in temp_dir.glob("session_*/runtime_resources/working_dir_files/_ray_pkg_*")
        if path.is_dir()
    }
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}  # made by the job, as it imports


def source_files() -> set[str]:
    files = (path for name in PACKAGES for path in (HERE / name).rglob("*") if path.is_file())
    names = {path.relative_to(HERE).as_posix() for path in files}
    return {name for name in names if "__pycache__" not in name}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_recipe_as_a_submitted_job_makes_the_bytes_of_the_local_executor(
    tmp_path: Path, checkout: Path, env: dict[str, str]
) -> None:
    world = make_world(tmp_path / "world", num_pairs=400, samples_per_shard=100)
    setting = f"source.path={world.shards_dir}"
    run_here(load(str(HERE / RECIPE), [setting]).as_mapping(), tmp_path / "local")

    started = cluster(["up", "--num-cpus", "2"], env=env, cwd=checkout)
    assert started.returncode == 0, started.stderr
    token = Path(env["HOME"], ".ray", "auth_token")
    assert len(token.read_text()) >= 32
    words = ["submit", RECIPE, "--set", setting, "--out", str(tmp_path / "submitted")]
    done = cluster(words, env=env, cwd=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "assemble" in done.stdout
    wanted = results(tmp_path / "local")
    assert "coreset.parquet" in wanted
    found = results(tmp_path / "submitted")
    assert {name for name, _ in found.items() ^ wanted.items()} == set()
    assert temporaries(tmp_path / "submitted") == []
    record = next((tmp_path / "submitted").glob("assemble-*/record.json"))
    assert json.loads(record.read_text())["executor"] == "ray"
    assert packaged_files(tmp_path / "state") == source_files() | {".gitignore"}

    words = ["submit", RECIPE, "--set", "dedup.similarity_abov=0.9", "--out", str(tmp_path / "bad")]
    refused = cluster(words, env=env, cwd=checkout)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "error: recipe.dedup.similarity_abov is unknown." in refused.stdout
    assert "why: Known keys: similarity_above, keep" in refused.stdout
    assert "fix: Did you mean 'similarity_above'?" in refused.stdout
    assert not (tmp_path / "bad").exists()

    ended = cluster(["down"], env=env, cwd=checkout)
    assert ended.returncode == 0, ended.stderr
