"""A finished run of one training stage, from its folder or from a model that was made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa

from manifests import paths, store
from manifests.errors import UserError
from train.config import TrainConfig
from train.learn.checkpoint import TRAINED, base_hash
from train.learn.dropped import DROPPED
from train.learn.log import LOG
from train.learn.run import DONE, INPUTS

CONFIG = "config.json"


@dataclass(frozen=True)
class FinishedRun:
    """What a run was told and what came of it.

    path: its folder. identity: what decided its result (see train.learn.run). subset: a file or
    folder of uids, or None for all rows. projector: folder of the run whose projector it began
    with, or None.
    """

    path: str
    config: TrainConfig
    identity: Mapping[str, Any]
    steps: int
    model_dir: str
    data_dirs: tuple[str, ...]
    subset: str | None
    projector: str | None

    @classmethod
    def read(cls, path: str) -> Self:
        """Return the run of a folder. Raises: UserError when it is unfinished, or no run."""
        found = {name: store.read_json(paths.join(path, name)) for name in (CONFIG, INPUTS, DONE)}
        lacking = [name for name, values in found.items() if values is None]
        if lacking:
            raise UserError(
                f"{path} has no {' and no '.join(lacking)}.",
                f"{DONE} is what a training run writes last: this one is unfinished, or no run.",
                "Let it train to its end, then ask again.",
            )
        values = {"directory": paths.absolute(path), "config": found[CONFIG]}
        return cls.from_json(values | {"inputs": found[INPUTS]} | found[DONE])

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the run that as_json told of. Raises: UserError for settings it cannot read."""
        where, inputs = values["directory"], values["inputs"]
        return cls(
            path=where,
            config=TrainConfig.load(values["config"], where=f"{where}/{CONFIG}"),
            identity=values["identity"],
            steps=values["steps"],
            model_dir=inputs["model_dir"],
            data_dirs=tuple(inputs["data_dirs"]),
            subset=inputs["subset"],
            projector=inputs["projector"],
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain values, from which from_json makes it again."""
        return {
            "role": self.role,
            "directory": self.path,
            "config": self.config.model_dump(mode="json"),
            "identity": dict(self.identity),
            "steps": self.steps,
            "inputs": {
                "model_dir": self.model_dir,
                "data_dirs": list(self.data_dirs),
                "subset": self.subset,
                "projector": self.projector,
            },
        }

    @property
    def role(self) -> str:
        """What its stage is called in a recipe: "pretrain" or "finetune"."""
        return "pretrain" if self.config.stage == "projector" else "finetune"

    @property
    def trained(self) -> str:
        """The path of its trained tensors."""
        return paths.join(self.path, TRAINED)

    def log(self) -> list[dict[str, Any]]:
        """Return its log, an entry a step; [] where the log is gone."""
        path = paths.join(self.path, LOG)
        lines = store.read_bytes(path).splitlines() if paths.exists(path) else []
        return [json.loads(line) for line in lines]

    def dropped(self) -> pa.Table | None:
        """Return the rows that could not be trained on; None where the table is gone.

        Columns: uid u64, key, source, directory, epoch, step (-1: before the first), reason.
        """
        path = paths.join(self.path, DROPPED)
        return store.read_table(path) if paths.exists(path) else None

    def earlier(self) -> list[FinishedRun]:
        """Return this run and those whose projectors it builds on, the first one first."""
        chain: list[FinishedRun] = [self]
        while (before := chain[0].projector) is not None:
            chain.insert(0, FinishedRun.read(before))
        return chain

    def check_base(self, model_dir: str) -> None:
        """Check that a directory holds the model that was trained on. Raises: UserError."""
        if not paths.exists(paths.join(model_dir, CONFIG)):
            raise UserError(
                f"{model_dir} holds no model.",
                f"{self.path} was trained on one that was there.",
                "Name the directory where it is now: base=...",
            )
        found, trained = base_hash(model_dir), self.identity["base"]
        if found != trained:
            raise UserError(
                f"{model_dir} is not the model that {self.path} was trained on.",
                f"Its config and weights have the hash {found[:12]}, not {trained[:12]}: adapters "
                "of one model do not fit another, even where all shapes are the same.",
                "Name the directory that it was trained on: base=...",
            )
