"""The download stage beside img2dataset, on one server on loopback: images a second.

    python tests/benchmarks/bench_download.py [--quick] [--images N] [--img2dataset-python PATH]

Ours is one process with every guard and SHA-256 on; img2dataset (another Python's: it needs
pandas<3) has two processes of 32 threads, with SHA-256. They take turns; imports are not counted,
fetching, encoding and writing are. raw: the bytes as they came. resized: keep_ratio 256, JPEG 95.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import report
from report import Options, Row

HERE = Path(__file__).resolve().parent
IMAGES_PER_SHARD = 1000
ROUNDS = 3
MODES = {"raw": 1.4, "resized": 1.0}
"""How it is stored -> how much faster ours should be."""

OURS = """
import json, sys, time
from pipelines.executors import LocalExecutor
from pipelines.progress import Progress
from pipelines.recipe import parse
from pipelines.run import run
import curate.download.stage
recipe, out = json.loads(sys.argv[1]), sys.argv[2]
how = dict(executor=LocalExecutor(), progress=Progress(out))
run(parse(recipe), out, until="ingest", **how)
started = time.perf_counter()
links = run(parse(recipe), out, **how)
seconds = time.perf_counter() - started
print(json.dumps([seconds, links[-1].directory.record()["kept"]]))
"""

THEIRS = """
import glob, json, sys, time
from img2dataset import download
if __name__ == "__main__":
    out = sys.argv[2]
    started = time.perf_counter()
    download(output_folder=out, **json.loads(sys.argv[1]))
    seconds = time.perf_counter() - started
    stats = [json.load(open(path)) for path in glob.glob(out + "/*_stats.json")]
    print()
    print(json.dumps([seconds, sum(one["successes"] for one in stats)]))
"""


@dataclass(frozen=True, slots=True)
class World:
    """A table of URLs that a running server answers."""

    table: Path
    num_images: int
    mean_bytes: int


def ours(world: World, mode: str, folder: Path) -> float:
    """Return seconds of our stage."""
    kept = {"keep_original_bytes": True}
    resized = {"resize": "keep_ratio", "image_size": 256, "encode_quality": 95}
    recipe = {
        "source": {
            "kind": "url_table",
            "path": str(world.table),
            "rows_per_shard": IMAGES_PER_SHARD,
        },
        "download": {
            "allow_private_addresses": True,
            "connections_per_host": 64,  # there is only one host
            **(kept if mode == "raw" else resized),
        },
    }
    return measured([sys.executable, "-c", OURS], recipe, folder, world.num_images)


def theirs(world: World, mode: str, folder: Path, *, python: str) -> float:
    """Return seconds of img2dataset."""
    resized = {"resize_mode": "keep_ratio", "image_size": 256, "encode_quality": 95}
    resized |= {"resize_only_if_bigger": True}
    how = {
        "url_list": str(world.table),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "number_sample_per_shard": IMAGES_PER_SHARD,
        "processes_count": 2,
        "thread_count": 32,
        "compute_hash": "sha256",
        **({"disable_all_reencoding": True} if mode == "raw" else resized),
    }
    script = folder / "theirs.py"  # its processes import the file that was started
    script.write_text(THEIRS)
    return measured([python, str(script)], how, folder, world.num_images)


def measured(command: list[str], how: dict[str, object], folder: Path, num_images: int) -> float:
    """Run a command on settings and an output folder; return the seconds that it names."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        env = os.environ | {
            "PYTHONPATH": str(HERE.parents[1]) if command[0] == sys.executable else "",
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [*command, json.dumps(how), f"{out}/made"],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{command[0]} has failed: {done.stderr[-2000:]}")
    seconds, num_found = json.loads(done.stdout.splitlines()[-1])
    if num_found != num_images:
        raise RuntimeError(f"{num_found} of {num_images} images were stored")
    return float(seconds)


@contextmanager
def world_of(num_images: int, num_files: int, folder: Path) -> Iterator[World]:
    """Serve files and yield the table that names them."""
    command = [sys.executable, str(HERE / "image_server.py"), str(num_files)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port, mean_bytes = map(int, server.stdout.readline().split())
        urls = [f"http://127.0.0.1:{port}/{number}.jpg" for number in range(num_images)]
        captions = [f"a caption {number}" for number in range(num_images)]
        table = folder / "urls.parquet"
        pq.write_table(pa.table({"url": urls, "caption": captions}), table)
        try:
            yield World(table, num_images, mean_bytes)
        finally:
            server.kill()


def compare(options: Options, *, num_images: int, python: str | None) -> Iterator[Row]:
    """Yield images a second of both, raw and resized."""
    num_images = 40 if options.quick else num_images
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with world_of(num_images, 4 if options.quick else 100, folder) as world:
            for mode, at_least in MODES.items():
                yield _row(options, world, mode, folder, python, at_least)


def _row(
    options: Options, world: World, mode: str, folder: Path, python: str | None, at_least: float
) -> Row:
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(1 if options.quick else ROUNDS):
        seconds["ours"].append(ours(world, mode, folder))
        if python is not None:
            seconds["theirs"].append(theirs(world, mode, folder, python=python))
    rates = {
        name: world.num_images / statistics.median(found)
        for name, found in seconds.items()
        if found
    }
    what = f"{mode}, {world.num_images:,} images of {world.mean_bytes:,} bytes / img2dataset"
    words = f"{rates['ours']:,.0f} images/s"
    if "theirs" not in rates:
        return Row(what, words, "not run: give --img2dataset-python PATH")
    ratio = rates["ours"] / rates["theirs"]
    return Row(what, words, f"{rates['theirs']:,.0f} images/s", ratio, at_least=at_least)


def main(words: list[str] | None = None) -> None:
    """Read the options and run."""
    parser = report.parser(__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--img2dataset-python", metavar="PATH", help="a Python that has it")
    given = vars(parser.parse_args(words))
    how = {"num_images": given.pop("images"), "python": given.pop("img2dataset_python")}
    given["device"] = "cpu"
    report.run_with(Path(__file__).stem, Options(**given), partial(compare, **how))


if __name__ == "__main__":
    main()
