"""Small runs of training: tiny models, a tiny mix, and run folders that are only told.

The fixtures are called `model_dir`, `clip_phi` and `data`: import `small_model`, `small_clip_phi`,
`small_data`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_inputs import run_here, stages
from small_llava import NUM_PATCHES, save_language_model, save_tower
from small_mixes import mix_recipe

from train.config import TrainConfig
from train.data.index import Index, read_subset
from train.data.plan import num_steps, plan_hash
from train.learn.checkpoint import data_fingerprints
from train.learn.dropped import SCHEMA
from train.learn.model import TrainedLlava
from train.learn.run import train
from train.models.compose import compose


def tiny_config(stage: str, plan: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """Return settings that move weights a lot in few steps."""
    size = {"global_batch_size": 16, "tokens_per_micro_batch": 800, "max_length": 250}
    values: dict[str, Any] = {
        "stage": stage,
        "template": "bunny",
        "projector_lr": 1e-2,
        "adapter_lr": 1e-2,
        "lora": {"rank": 2, "alpha": 6, "dropout": 0.1},
        "plan": {**size, "tokens_per_image": NUM_PATCHES} | (plan or {}),
    }
    return TrainConfig.load(values | changes, where="train")


def tiny_llava(
    folder: Path, tower: str = "siglip_vision_model", family: str = "qwen2", seed: int = 0
) -> str:
    """Compose a tiny model and return its directory."""
    halves = (save_tower(folder / "t", tower, seed), save_language_model(folder / "lm", family))
    return compose(*map(str, halves), str(folder / "llava")).path


def tiny_mix(folder: Path, num_rows: int = 9) -> str:
    """Return the directory of a mix: two sources of images, one of text."""
    links = run_here(mix_recipe(folder / "in", num_rows=num_rows), folder / "run")
    return str(stages(links)["mix"].path)


@pytest.fixture(scope="module", name="model_dir")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", name="clip_phi")
def small_clip_phi(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tower and language model both call layers q_proj, k_proj, fc1 and fc2."""
    return tiny_llava(tmp_path_factory.mktemp("clip_phi"), "clip_vision_model", "phi")


@pytest.fixture(scope="module", name="data")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a mix: two sources of images, one of text."""
    return tiny_mix(tmp_path_factory.mktemp("data"))


def train_here(
    config: TrainConfig, model_dir: str, data: str, out: Path, projector: str | None = None
) -> TrainedLlava:
    """Train to the end; return the model."""
    return train(config, model_dir, [data], str(out), projector=projector)


def lost(index: Index, row: int, reason: str, step: int = 0) -> dict[str, Any]:
    """Return a row of dropped.parquet."""
    return {
        **{"uid": int(index.uid[row]), "key": index.key[row].as_py(), "reason": reason},
        **{"directory": index.directory[index.shard[row]], "epoch": 0, "step": step},
        "source": index.sources[index.source[row]],
    }


def write_inputs(
    out: Path, model_dir: str, data: Sequence[str], subset: str | None, projector: str | None
) -> None:
    """Write inputs.json of a run's folder."""
    values = {"model_dir": model_dir, "data_dirs": list(data)}
    values |= {"subset": subset, "projector": projector}
    (out / "inputs.json").write_text(json.dumps(values))


def write_dropped(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write dropped.parquet of a run's folder."""
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), out / "dropped.parquet")


def told_run(
    out: Path,
    config: TrainConfig,
    data: Sequence[str],
    *,
    subset: str | None = None,
    dropped: Sequence[dict[str, Any]] = (),
    projector: str | None = None,
) -> str:
    """Write the folder of a finished run without training one; return it."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    write_inputs(out, "no model", data, subset, projector)
    write_dropped(out, list(dropped))
    index = Index.load(list(data))
    refused = [one["uid"] for one in dropped if one["step"] == -1]
    kept = np.setdiff1d(index.uid if subset is None else read_subset(subset), refused)
    columns = index.subset(kept).columns()
    steps = [
        num_steps(columns, seed=config.seed, epoch=one, config=config.plan)
        for one in range(config.epochs)
    ]
    identity = {
        "base": "0" * 64,
        "plan": plan_hash(columns, seed=config.seed, config=config.plan),
        "data": data_fingerprints(list(data)),
    }
    (out / "done.json").write_text(json.dumps({"steps": sum(steps), "identity": identity}))
    return str(out)
