"""`up`, `submit` and `down` for real: a cluster with a token, a job in a packaged directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_env import ray_env

from manifests.errors import UserError
from pipelines.cluster import recipe_command

HERE = Path(__file__).parent.parent


@pytest.fixture
def env(tmp_path: Path) -> Iterator[dict[str, str]]:
    made = {k: v for k, v in (os.environ | ray_env()).items() if not k.startswith("RAY_AUTH_TOKEN")}
    made |= {"WARREN_RAY_DIR": str(tmp_path / "state"), "PYTHONPATH": str(HERE)}
    yield made
    cluster_command(["down"], env=made, cwd=tmp_path)


def cluster_command(
    words: list[str], *, env: dict[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cluster", *words]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)


SUBMIT = """
import sys
from pathlib import Path
from pipelines.cluster import submit
sys.exit(submit(sys.argv[1:], address=None, working_dir=Path.cwd()))
"""

JOB = """
import os, sys
from pathlib import Path
from pipelines.executors import RayExecutor, Resources
from helper import double
names = sorted(p.as_posix() for p in Path(".").rglob("*") if p.is_file() and p.suffix != ".pyc")
print("files", names)
print("auth", os.environ["RAY_AUTH_MODE"])
executor = RayExecutor()
answers = executor.map(lambda: double, range(5), Resources())
print("doubled", sorted(one.result for one in answers))
print("ready", flush=True)
sys.exit(int(sys.argv[1]))
"""


def submit_script(env: dict[str, str], *, cwd: Path, code: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SUBMIT, "python", "job.py", str(code)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working directory with two modules, and with what must not travel."""
    folder = tmp_path / "project"
    contents = {
        "job.py": JOB,
        "helper.py": "def double(item):\n    return 2 * item\n",
        "pipelines_note/data/kept.txt": "a folder named data deeper down is code",
        "data/big.bin": "x",
        ".git/config": "x",
        ".venv/bin/python": "x",
        ".mypy_cache/x.json": "x",
        "shards/00000.tar": "x",
        "ignored/y.txt": "x",
        ".gitignore": "ignored/\n",
    }
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def processes_naming(text: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_job_runs_in_the_packaged_directory_and_down_ends_every_process(
    env: dict[str, str], project: Path, tmp_path: Path
) -> None:
    started = cluster_command(["up", "--num-cpus", "2"], env=env, cwd=project)
    assert started.returncode == 0, started.stderr
    url = started.stdout.strip().removeprefix("ADDRESS=")
    again = cluster_command(["up"], env=env, cwd=project)
    assert again.stdout == started.stdout

    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{url}/api/jobs/", timeout=10)  # noqa: S310 - loopback
    assert refused.value.code in (401, 403)
    refused.value.close()

    good = submit_script(env, cwd=project, code=0)
    assert good.returncode == 0, good.stdout + good.stderr
    names = ["helper.py", "job.py", "pipelines_note/data/kept.txt"]
    assert f"files {['.gitignore', *names]}" in good.stdout
    assert "auth token" in good.stdout
    assert "doubled [0, 2, 4, 6, 8]" in good.stdout
    assert submit_script(env, cwd=project, code=2).returncode == 2

    stranger = submit_script(env | {"RAY_AUTH_TOKEN": "f" * 64}, cwd=project, code=0)
    assert stranger.returncode == 1
    assert "did not take the job" in stranger.stderr

    state = json.loads((tmp_path / "state" / "cluster.json").read_text())
    temp_dir = state["temp_dir"]
    assert len(processes_naming(temp_dir)) >= 3
    ended = cluster_command(["down"], env=env, cwd=project)
    assert ended.returncode == 0, ended.stderr
    assert processes_naming(temp_dir) == []
    assert not Path(temp_dir).exists()
    assert "ended 0" in cluster_command(["down"], env=env, cwd=project).stderr


def test_submitting_to_no_cluster_is_explained(env: dict[str, str], project: Path) -> None:
    (project / "demo.yaml").write_text("seed: 0\n")
    answer = cluster_command(["submit", "demo.yaml", "--out", "run"], env=env, cwd=project)
    assert answer.returncode == 2
    assert "make ray-up" in answer.stderr


def test_the_submitted_command_names_the_recipe_inside_the_package_and_an_absolute_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.yaml").write_text("seed: 0")
    (tmp_path / "recipes" / "b.yaml").write_text("model: {}")
    monkeypatch.chdir(tmp_path)
    command = recipe_command(str(tmp_path / "recipes/a.yaml"), out="run", settings=["seed=1"])
    assert command[:5] == ["python", "-m", "pipelines.cli", "run", "recipes/a.yaml"]
    assert command[5:] == ["--executor", "ray", "--out", str(tmp_path / "run"), "--set", "seed=1"]
    training = recipe_command("recipes/b.yaml", out="s3://bucket/run", settings=[])
    assert training[3:5] == ["train", "recipes/b.yaml"]
    assert training[5:] == ["--set", "launch.on=ray", "--out", "s3://bucket/run"]


def test_a_recipe_outside_the_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").touch()
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    with pytest.raises(UserError, match="Copy the recipe"):
        recipe_command("../a.yaml", out="run", settings=[])
