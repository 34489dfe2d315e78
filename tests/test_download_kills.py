"""Kill -9 a download at any moment, give the same command again: the same bytes come out."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from disturbed_runs import HERE, until
from download_worlds import download_recipe, fates, photo, shard_bytes, table_of
from hostile_server import HostileServer, Peer, answer
from ray_env import ray_cluster  # noqa: F401
from small_inputs import record, rows_of, run_here, stages

from manifests.work import StageDir
from pipelines.cli import run_cli

SETTINGS = {"concurrency": 2, "resize_threads": 1, "attempts": 1, "image_size": 16}
LOST_BY_A_KILL = 2 * 2 * SETTINGS["concurrency"] + 8
"""URLs in flight, landed or being encoded, at most."""
SLOW_SECONDS = 0.01


@pytest.fixture
def server() -> Iterator[HostileServer]:
    """A server on loopback."""
    with HostileServer() as one:
        yield one


def slow_photos(server: HostileServer, num: int) -> list[str]:
    """Serve photos that take their time, every seventh of them gone, every eleventh broken."""

    def serve(number: int) -> str:
        whole = answer(photo(number))
        if number % 7 == 3:
            whole = answer(b"gone", status="404 Not Found")
        elif number % 11 == 5:
            whole = answer(b"busy", status="503 Service Unavailable")

        async def script(peer: Peer) -> None:
            await asyncio.sleep(SLOW_SECONDS)
            await peer.send(whole)

        return server.serve(f"/photo/{number}.jpg", script, keep_open=True)

    return [serve(number) for number in range(num)]


def wanted_fates(num: int) -> dict[int, str]:
    """Return what must become of the photos."""
    return {n: "http_4xx" if n % 7 == 3 else "http_5xx" if n % 11 == 5 else "" for n in range(num)}


class Run:
    """`warren run` in a process that may be killed."""

    def __init__(self, recipe: Path, out: Path) -> None:
        self.out = out
        words = ["run", str(recipe), "--out", str(out), "--executor", "local"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *words],
            env=os.environ | {"PYTHONPATH": str(HERE.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def journal_bytes(self) -> int:
        """Return how much is noted and not yet in a shard."""
        sizes = []
        for log in self.out.glob("download-*/_journal/*/*.log"):
            try:
                sizes.append(log.stat().st_size)
            except FileNotFoundError:
                continue  # its shard has just been finished
        return sum(sizes)

    def kill_when_noted(self, num_bytes: int) -> None:
        """Kill it when so much more is noted than now. It must not have ended before."""
        start = self.journal_bytes()
        grown = until(
            lambda: self.journal_bytes() >= start + num_bytes or self._process.poll() is not None
        )
        assert grown
        self._kill()

    def kill_after(self, seconds: float) -> None:
        """Kill it some time after its first request could be made, wherever it is then."""
        until(lambda: self.journal_bytes() > 0 or self._process.poll() is not None)
        time.sleep(seconds)
        self._kill()

    def finish(self) -> None:
        """Let it end well."""
        said, _ = self._process.communicate(timeout=120)
        assert self._process.returncode == 0, said.decode()

    def _kill(self) -> None:
        still_ran = self._process.poll() is None
        self._process.kill()
        said, _ = self._process.communicate()
        assert still_ran, said.decode()


def made(recipe: Path, out: Path) -> StageDir:
    """Return what the recipe makes undisturbed."""
    return stages(run_here(yaml.safe_load(recipe.read_text()), out))["download"]


def assert_as_undisturbed(recipe: Path, out: Path, num: int, tmp_path: Path) -> None:
    (path,) = out.glob("download-*")
    stage = StageDir("download", str(path))
    undisturbed = made(recipe, tmp_path / "undisturbed")
    assert shard_bytes(path) == shard_bytes(undisturbed.path)
    assert rows_of(stage) == rows_of(undisturbed)
    assert fates(stage) == wanted_fates(num)
    counts = record(stage)
    assert counts["rows_in"] == num == counts["kept"] + sum(counts["dropped"].values())
    assert not (path / "_journal").exists()
    assert run_cli(["check", str(out)]) == 0


def recipe_of(server: HostileServer, tmp_path: Path, num: int) -> Path:
    table = table_of(tmp_path / "in", slow_photos(server, num))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(download_recipe(table, **SETTINGS)))
    return path


@pytest.mark.timeout(120)
def test_a_download_killed_twice_goes_on_where_it_was(
    server: HostileServer, tmp_path: Path
) -> None:
    recipe, out = recipe_of(server, tmp_path, 40), tmp_path / "out"
    for _ in range(2):
        Run(recipe, out).kill_when_noted(4000)
    asked = len(server.requests)
    Run(recipe, out).finish()
    asked_again = sum(wanted_fates(40)[n] == "http_5xx" for n in range(40))  # it may pass
    assert asked >= 8
    assert len(server.requests) <= 40 + 2 * (LOST_BY_A_KILL + asked_again)
    assert_as_undisturbed(recipe, out, 40, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_download_killed_at_twenty_random_moments_ends_with_the_same_bytes(
    server: HostileServer, tmp_path: Path
) -> None:
    num, num_kills = 600, 20
    recipe, out = recipe_of(server, tmp_path, num), tmp_path / "out"
    moments = random.Random(7)
    for _ in range(num_kills):
        Run(recipe, out).kill_after(moments.uniform(0, 0.15))
    Run(recipe, out).finish()
    fates_wanted = wanted_fates(num)
    once = [f"/photo/{n}.jpg" for n in range(num) if fates_wanted[n] != "http_5xx"]
    asked = sum(server.times_asked[path] for path in once)
    assert len(once) <= asked <= len(once) + num_kills * LOST_BY_A_KILL
    assert_as_undisturbed(recipe, out, num, tmp_path)


def failing_shard(server: HostileServer, tmp_path: Path) -> list[str]:
    """Return a command whose second shard of three cannot be fetched."""
    urls = [server.serve_bytes(f"/{n}", photo(n)) for n in range(60) if not 20 <= n < 40]
    urls[20:20] = [server.url(f"/gone/{n}") for n in range(20)]
    path = tmp_path / "recipe.yaml"
    values = download_recipe(table_of(tmp_path / "in", urls), rows_per_shard=20)
    path.write_text(yaml.safe_dump(values))
    return ["run", str(path), "--out", str(tmp_path / "out"), "--executor"]


def assert_one_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "00001.tar: 0 of 20" in capsys.readouterr().err
    (stage,) = (tmp_path / "out").glob("download-*")
    assert not (stage / "record.json").exists()
    assert sorted(one.name for one in stage.glob("shards/*.tar")) == ["00000.tar", "00002.tar"]


def test_a_failed_shard_fails_the_run(
    server: HostileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli([*failing_shard(server, tmp_path), "local"]) == 1
    assert_one_failed(tmp_path, capsys)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_failed_shard_fails_the_run_on_ray(
    server: HostileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli([*failing_shard(server, tmp_path), "ray"]) == 1
    assert_one_failed(tmp_path, capsys)
