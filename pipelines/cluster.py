"""A Ray cluster on this machine, and jobs sent to it or to any other cluster.

    python -m pipelines.cluster up                            start; prints ADDRESS
    python -m pipelines.cluster submit RECIPE --out DIR       run a recipe there (--address ADDRESS)
    python -m pipelines.cluster down                          end it, and nothing else

The cluster demands the token of `~/.ray/auth_token` (made if there is none; RAY_AUTH_TOKEN and
RAY_AUTH_TOKEN_PATH win) and listens on loopback only. What `up` started is noted in
$WARREN_RAY_DIR, else in ~/.cache/warren/ray.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manifests.errors import UserError
from pipelines.executors.base import environment
from pipelines.executors.ray_cluster import PRIVATE_CLUSTER_ENV
from pipelines.recipe import read_yaml
from pipelines.training.recipe import is_training

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

START_SECONDS = 60.0
STOP_SECONDS = 5.0
"""Ray ends itself within a second, but waits half a minute for a running job."""
MARK = "WARREN_RAY_TEMP_DIR"
"""Set for the first process and so inherited by all others: it tells whose they are."""
RAY = [sys.executable, "-m", "ray.scripts.scripts"]

NOT_PACKAGED = [
    *(".git", ".venv", "venv", "__pycache__", ".*_cache", ".cache", "*.egg-info", "node_modules"),
    *("/data", "/runs", "/warren-demo", "/out", "/build", "/dist", "*.tar", "*.parquet", "*.npy"),
]
"""What a job does not take along, as gitignore patterns; .gitignore and .rayignore count too."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that `up` started: its first process and where it listens."""

    pid: int
    temp_dir: str
    address: str
    dashboard_url: str


def up(*, num_cpus: int | None = None) -> Cluster:
    """Start a cluster and return it; if one is up already, return that.

    Raises: UserError when Ray does not come up.
    """
    found = running()
    if found is not None:
        return found
    down()
    # Ray's sockets lie below this directory and their paths have at most 107 bytes.
    temp_dir = tempfile.mkdtemp(prefix="warren-ray-", dir="/tmp")
    subprocess.run([*RAY, "get-auth-token", "--generate"], check=True, capture_output=True)
    gcs_port, dashboard_port, client_port, agent_port = _free_ports(4)
    cpus = [] if num_cpus is None else [f"--num-cpus={num_cpus}"]
    command = [
        *(*RAY, "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={temp_dir}"),
        *("--node-ip-address=127.0.0.1", f"--port={gcs_port}", "--include-dashboard=true"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
        *(f"--ray-client-server-port={client_port}", *cpus),
        f"--dashboard-agent-listen-port={agent_port}",
    ]
    process = _start(command, temp_dir=Path(temp_dir))
    cluster = Cluster(
        pid=process.pid,
        temp_dir=temp_dir,
        address=f"127.0.0.1:{gcs_port}",
        dashboard_url=f"http://127.0.0.1:{dashboard_port}",
    )
    _state_path().parent.mkdir(parents=True, exist_ok=True)
    _state_path().write_text(json.dumps(asdict(cluster), indent=1) + "\n")
    # The dashboard takes jobs and the agent runs them; without either a job is refused.
    _wait_until_up(cluster, process, ports=(dashboard_port, agent_port))
    return cluster


def down() -> int:
    """End the cluster that `up` started and return how many processes that were.

    Nothing else is ended; processes of the cluster that outlived its first one are.
    """
    cluster = _noted()
    if cluster is None:
        return 0
    num_ended = _end(cluster)
    shutil.rmtree(cluster.temp_dir, ignore_errors=True)
    _state_path().unlink()
    return num_ended


def running() -> Cluster | None:
    """Return the cluster that `up` noted, if its first process still runs."""
    cluster = _noted()
    if cluster is None or cluster.pid not in {process.pid for process in _family(cluster)}:
        return None
    return cluster


def submit(entrypoint: Sequence[str], *, address: str | None, working_dir: Path) -> int:
    """Run a command as a job, pass its output on to stdout, and return its exit code.

    `working_dir` is packaged without NOT_PACKAGED; the command runs in a copy of it.
    Raises: UserError when the cluster cannot be reached or does not take the job.
    """
    with environment({"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}):
        client, job_id = _send(entrypoint, address=address or _own_url(), working_dir=working_dir)
        click.echo(f"job {job_id}: {shlex.join(entrypoint)}", err=True)
        stop = f"ray job stop {job_id} --address {client.get_address()}"
        click.echo(f"it goes on if this command ends; to stop it: {stop}", err=True)
        try:
            asyncio.run(_follow(client, job_id))
            return _exit_code(client, job_id)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"The connection to job {job_id} was lost.",
                str(error),
                f"See whether it still runs: ray job status {job_id}",
            ) from error


def recipe_command(recipe: str, *, out: str, settings: Sequence[str]) -> list[str]:
    """Return the command that runs a recipe as a job.

    A recipe file is named relative to the packaged directory; a local `out` becomes absolute,
    for a job has another working directory. Raises: UserError for a recipe that is not packaged.
    """
    path = Path(recipe)
    if path.exists():
        if not path.resolve().is_relative_to(Path.cwd()):
            raise UserError(
                f"The recipe {recipe} is outside {Path.cwd()}.",
                "A job takes the current directory along and can read nothing else.",
                "Copy the recipe into it, or submit from the recipe's directory.",
            )
        recipe = path.resolve().relative_to(Path.cwd()).as_posix()
    out = out if "://" in out else str(Path(out).resolve())
    command = ["python", "-m", "pipelines.cli", *_on_ray(recipe), "--out", out]
    return command + [word for setting in settings for word in ("--set", setting)]


def _on_ray(recipe: str) -> list[str]:
    """Return the words that run a recipe, of data or of training, on the cluster of the job."""
    if is_training(read_yaml(recipe)):
        return ["train", recipe, "--set", "launch.on=ray"]
    return ["run", recipe, "--executor", "ray"]


def _state_path() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("WARREN_RAY_DIR") or cache / "warren" / "ray") / "cluster.json"


def _noted() -> Cluster | None:
    path = _state_path()
    return Cluster(**json.loads(path.read_text())) if path.exists() else None


def _psutil() -> Any:
    """Return psutil, which Ray carries with it."""
    import ray  # noqa: F401 - puts its psutil on the import path

    return importlib.import_module("psutil")


def _family(cluster: Cluster) -> list[Any]:
    """Return the cluster's processes, its first one included."""
    psutil = _psutil()
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, or another user's
            if _belongs(process, cluster.temp_dir):
                found.append(process)
    return found


def _belongs(process: Any, temp_dir: str) -> bool:
    """Return whether a process has the mark; Ray writes some titles over it, but they log here."""
    if process.environ().get(MARK) == temp_dir:
        return True
    is_titled = process.name().startswith("ray::")
    return is_titled and any(one.path.startswith(temp_dir) for one in process.open_files())


def _free_ports(num_ports: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _start(command: Sequence[str], *, temp_dir: Path) -> subprocess.Popen[bytes]:
    """Start a process that outlives this one, in a session of its own."""
    env = os.environ | PRIVATE_CLUSTER_ENV | {MARK: str(temp_dir), "RAY_AUTH_MODE": "token"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env.pop("RAY_ADDRESS", None)
    with (temp_dir / "ray-start.log").open("wb") as log_file:
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_until_up(
    cluster: Cluster, process: subprocess.Popen[bytes], *, ports: Sequence[int]
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not all(_listens(port) for port in ports):
        if process.poll() is not None or time.monotonic() > deadline:
            lines = (Path(cluster.temp_dir) / "ray-start.log").read_text().splitlines()
            down()
            raise UserError(
                "Ray did not start.",
                " / ".join(line.strip() for line in lines[-5:] if line.strip()),
                "Check memory and free space in /tmp and /dev/shm, then try again.",
            )
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


def _end(cluster: Cluster) -> int:
    """End a cluster's first process, which ends its daemons; kill what is left, such as jobs."""
    psutil = _psutil()
    family = _family(cluster)
    first = [process for process in family if process.pid == cluster.pid]
    for process in first:
        process.terminate()
    psutil.wait_procs(first, timeout=STOP_SECONDS)
    left = _family(cluster)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_SECONDS)
    return len({*family, *left})


def _own_url() -> str:
    cluster = running()
    if cluster is None:
        raise UserError(
            "There is no cluster to submit to.",
            "No ADDRESS is given and none was started here.",
            "Start one with `make ray-up`, or give ADDRESS=http://HOST:8265.",
        )
    return cluster.dashboard_url


def _send(
    entrypoint: Sequence[str], *, address: str, working_dir: Path
) -> tuple[JobSubmissionClient, str]:
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    runtime_env = {"working_dir": str(working_dir), "excludes": NOT_PACKAGED}
    try:
        client = JobSubmissionClient(address)
        job_id = client.submit_job(entrypoint=shlex.join(entrypoint), runtime_env=runtime_env)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise UserError(
            f"The cluster at {address} did not take the job.",
            str(error).strip().splitlines()[0],
            "Check that the address is the dashboard's (http://HOST:8265) and that RAY_AUTH_TOKEN "
            "or ~/.ray/auth_token holds its token; name big files in .rayignore.",
        ) from error
    return client, job_id


async def _follow(client: JobSubmissionClient, job_id: str) -> None:
    async for text in client.tail_job_logs(job_id):
        click.echo(text, nl=False)


def _exit_code(client: JobSubmissionClient, job_id: str) -> int:
    """Return the job's exit code, 0 only if Ray says that it succeeded."""
    info = client.get_job_info(job_id)
    if info.status == "SUCCEEDED":
        return 0
    click.echo(f"job {job_id}: {info.status}. {info.message or ''}", err=True)
    return info.driver_exit_code or 1


@click.group()
def cli() -> None:
    """Start a Ray cluster, send jobs to it, end it."""


@cli.command("up")
@click.option("--num-cpus", type=int, help="CPUs to offer; the machine's if not given.")
def up_command(num_cpus: int | None) -> None:
    """Start a cluster on this machine and print its addresses."""
    cluster = up(num_cpus=num_cpus)
    click.echo(f"ADDRESS={cluster.dashboard_url}")
    click.echo(
        f"dashboard: {cluster.dashboard_url} (paste the token: ray get-auth-token)", err=True
    )
    click.echo(f"join it from a program: --address {cluster.address}", err=True)


@cli.command("submit")
@click.argument("recipe")
@click.option("--out", required=True, help="Run directory, on storage that every node can reach.")
@click.option("--address", help="Dashboard address; the cluster of `up` if not given.")
@click.option("--set", "settings", multiple=True, help="stage.key=value, as in `warren run`.")
def submit_command(recipe: str, out: str, address: str | None, settings: tuple[str, ...]) -> None:
    """Run RECIPE as a job, with the current directory packaged."""
    command = recipe_command(recipe, out=out, settings=settings)
    sys.exit(submit(command, address=address, working_dir=Path.cwd()))


@cli.command("down")
def down_command() -> None:
    """End the cluster that `up` started."""
    click.echo(f"ended {down()} processes", err=True)


def main() -> None:
    """Run the command line; a UserError is shown without a traceback and exits with 2."""
    try:
        cli()
    except UserError as error:
        click.echo(str(error), err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
