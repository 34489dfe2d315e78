"""The second half of the demo: make the instruction mix, run its recipe, hold it to the truth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from manifests.errors import StageFailed
from manifests.paths import name_of
from manifests.work import StageDir
from pipelines import ask
from pipelines.demo.conversations import FILES, LEAKED_LIST, TRUTH, make_mix
from pipelines.demo.mix_dirt import PLACEHOLDER_ALONE
from pipelines.demo.mix_judge import fates_of_mix, judge_fates, judge_written, judgement_text
from pipelines.demo.mix_pictures import FOLDERS
from pipelines.demo.once import make_once
from pipelines.launch import run_recipe
from pipelines.recipe import Recipe, load
from pipelines.show import funnel_table

RECIPE = "warren:recipes/demo_mix.yaml"
_MADE = "mix_made.json"


def run_mix_demo(out: str, *, num_pictures: int, executor: str, say: Callable[[str], Any]) -> None:
    """Make the mix in OUT/world, run its recipe in OUT/mix and say what came of every row.

    Raises: StageFailed when a planted row met another fate, or a written row is not as planted.
    """
    started = time.monotonic()
    world = (Path(out) / "world").resolve()
    size = {"num_pictures": num_pictures}
    make_once(world, _MADE, size, lambda: make_mix(world, num_pictures=num_pictures))
    chain = run_recipe(mix_recipe(world), str(Path(out) / "mix"), executor=executor)
    say(funnel_table(ask.funnel(chain)))
    is_right = _compare(world / TRUTH, chain, say)
    say(_closing(out, chain, time.monotonic() - started))
    if not is_right:
        raise StageFailed("the instruction mix is not what was planted: see the lines marked WRONG")


def mix_recipe(world: Path) -> Recipe:
    """Return the recipe of the mix that lies in the folder `world`."""
    files = {source: str(world / "instruct" / name) for source, name in FILES.items()}
    roots = {one.prefix: str(world / "images" / one.place) for one in FOLDERS.values()}
    leakage = [{"ids": str(world / "instruct" / LEAKED_LIST), "under": "coco/"}]
    settings: dict[str, Any] = {
        "source.files": files,
        "resolve.roots": roots,
        "clean.leakage": leakage,
        "mix.published": published_counts(pl.read_parquet(world / TRUTH)),
    }
    return load(RECIPE, [f"{name}={json.dumps(value)}" for name, value in settings.items()])


def published_counts(truth: pl.DataFrame) -> list[dict[str, Any]]:
    """Return the counts that the mix's makers would publish, as the recipe has them.

    Rows that ingest cannot use are counted in a file, but nothing can be asked of them.
    """
    in_svit = pl.col("source") == "svit"
    readable = in_svit & (pl.col("stage") != "ingest")
    is_core = pl.col("key").str.starts_with("svit_")
    no_image = (pl.col("images").list.len() == 0) | (pl.col("kind") == PLACEHOLDER_ALONE.kind)
    counted: dict[str, tuple[pl.Expr, dict[str, Any]]] = {
        "SVIT mix": (in_svit, {"source": "svit"}),
        "SVIT core": (readable & is_core, {"source": "svit", "id_prefix": "svit_"}),
        "text-only": (readable & no_image, {"source": "svit", "has_image": False}),
        "WizardLM": (pl.col("source") == "wizardlm", {"source": "wizardlm"}),
    }
    origin = "pipelines/demo/conversations.py"
    return [
        {"name": name, "rows": truth.filter(rows).height, "where": where, "origin": origin}
        for name, (rows, where) in counted.items()
    ]


def _compare(truth_path: Path, chain: dict[str, StageDir], say: Callable[[str], Any]) -> bool:
    truth = pl.read_parquet(truth_path)
    fates = judge_fates(truth, fates_of_mix(chain))
    written = judge_written(truth, chain)
    say(judgement_text(fates, "instruction rows: what was planted, and its fate", "row"))
    say(judgement_text(written, "rows in the shards, against the truth", "what"))
    return all(one.is_right for one in [*fates, *written])


def _closing(out: str, chain: dict[str, StageDir], seconds: float) -> str:
    made = f"{out}/mix/{name_of(chain['mix'].path)}"
    return "\n".join(
        [
            f"{seconds:.0f} s for the instruction data.",
            f"  as shards        {made}/shards",
            f"  as LLaVA JSON    {made}/mix.json",
        ]
    )
