"""The demo: make the world, curate it with the demo recipe, hold the result against the truth;
then the same for instruction data; then a model is trained on both.

    warren demo --out warren-demo

leaves the world in DIR/world (shards and instruction files; truth.parquet and mix_truth.parquet,
which no stage reads), the coreset's run in DIR/run, the instruction data's in DIR/mix, the model's
in DIR/model, and what it was asked in DIR/benchmark; `warren funnel`, `why`, `check` and polars can
open them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from manifests.lineage import fates as fates_of
from manifests.paths import name_of
from manifests.work import StageDir
from pipelines import ask
from pipelines.demo.mix_show import run_mix_demo
from pipelines.demo.once import make_once
from pipelines.demo.train_show import run_train_demo
from pipelines.demo.truth import good_table, junk_table
from pipelines.demo.world import make_world
from pipelines.launch import run_recipe
from pipelines.recipe import load
from pipelines.show import funnel_table, table_text

RECIPE = "warren:recipes/demo.yaml"
_MADE = "made.json"
_PAIRS_PER_MIX_PICTURE = 8
_FEWEST_MIX_PICTURES = 100
_SHOWN_ASPECTS = ("all", "layout", "caption style")


def run_demo(out: str, *, num_pairs: int, executor: str, say: Callable[[str], Any]) -> None:
    """Make the world in OUT/world, run the recipes in OUT/run and OUT/mix, say what came of it.

    Raises: StageFailed when the instruction data is not what was planted.
    """
    started = time.monotonic()
    world = Path(out) / "world"
    size = {"num_pairs": num_pairs}
    make_once(world, _MADE, size, lambda: make_world(world, num_pairs=num_pairs))
    recipe = load(RECIPE, [f"source.path={json.dumps(str(world.resolve() / 'shards'))}"])
    run_dir = str(Path(out) / "run")
    chain = run_recipe(recipe, run_dir, executor=executor)
    say(funnel_table(ask.funnel(chain)))
    say(truth_tables(world / "truth.parquet", chain))
    say(_closing(out, chain, time.monotonic() - started))
    num_pictures = max(num_pairs // _PAIRS_PER_MIX_PICTURE, _FEWEST_MIX_PICTURES)
    run_mix_demo(out, num_pictures=num_pictures, executor=executor, say=say)
    run_train_demo(out, say=say, tell=lambda line: sys.stderr.write(line + "\n"))


def truth_tables(truth_path: Path, chain: dict[str, StageDir]) -> str:
    """Return the tables of planted and caught junk and of surviving good pairs."""
    truth, fates = pl.read_parquet(truth_path), fates_of(chain)
    junk = [
        (
            row["kind"],
            f"{row['planted']:,}",
            f"{row['caught']:,}",
            _share(row),
            _where(row["where"]),
        )
        for row in junk_table(truth, fates).iter_rows(named=True)
    ]
    good = [
        (row["aspect"], row["value"], f"{row['planted']:,}", f"{row['survived']:,}", _share(row))
        for row in good_table(truth, fates).iter_rows(named=True)
        if row["aspect"] in _SHOWN_ASPECTS
    ]
    heads = ("kind of junk", "planted", "caught", "share", "caught by")
    kept = ("good pairs", "", "planted", "survived", "share")
    return "\n".join(
        [
            table_text("planted junk: how much was caught, and where", heads, junk),
            table_text("good pairs: how many survived", kept, good),
        ]
    )


def _share(row: dict[str, Any]) -> str:
    found = row["caught"] if "caught" in row else row["survived"]
    return f"{100 * found // row['planted']}%"  # rounded down: 100% means all


def _where(stages: list[dict[str, Any]] | None) -> str:
    return ", ".join(f"{one['stage']} {one['rows']:,}" for one in stages or [])


def _closing(out: str, chain: dict[str, StageDir], seconds: float) -> str:
    run_dir = f"{out}/run"
    return "\n".join(
        [
            f"{seconds:.0f} s for the coreset.",
            f"  the coreset      {run_dir}/coreset.parquet",
            f"  as shards        {run_dir}/{name_of(chain['assemble'].path)}/shards",
            f"  ask about it     warren funnel {run_dir}, warren check {run_dir}",
            f"  one sample       warren why {run_dir} {_example_key(chain)}",
        ]
    )


def _example_key(chain: dict[str, StageDir]) -> str:
    """Return the key of a near-duplicate that lost, the most telling story."""
    lost = fates_of(chain).filter(pl.col("stage") == "dedup")
    return str(lost["key"][0]) if lost.height else "KEY"
