"""What a training recipe makes, and where: a directory for each stage, named by its fingerprint.

    <out>/compose-<fp8>/   a LLaVA directory
    <out>/pretrain-<fp8>/  a finished run of training; finetune-<fp8>/ the same
    <out>/export-<fp8>/    the trained model

Each ends with its record.json. A changed setting makes a new directory beside the old one, and what
comes before it is used again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from manifests import paths, store
from manifests.errors import UserError
from manifests.record import directory_name, fingerprint, read_latest
from manifests.work import RECORD
from pipelines.training.recipe import ModelConfig, TrainedStage, TrainingRecipe

VERSION = 1
"""Part of every fingerprint; raised when the same recipe gives another result."""
WRITES_SHARDS = ("mix", "assemble")


@dataclass(frozen=True, slots=True)
class Planned:
    """A stage of a training run. directory: where its result lies or will lie."""

    name: str
    mark: str
    directory: str
    decides: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Whether its record is written."""
        return paths.exists(paths.join(self.directory, RECORD))

    @classmethod
    def of(
        cls, name: str, out: str, decides: dict[str, Any], identity: Any, before: list[Planned]
    ) -> Planned:
        """Return a stage that comes after others."""
        inputs = {one.name: one.mark for one in before}
        mark = fingerprint(name, VERSION, config=decides, identity=identity, inputs=inputs)
        return cls(name, mark, paths.join(out, directory_name(name, mark)), decides, inputs)


def compose_stage(model: ModelConfig, out: str) -> Planned:
    """Return the stage that composes a model; its identity is that of both halves' files."""
    from train.models.hub import local_directory
    from train.models.origin import files_hash

    halves = {"vision_tower": model.vision_tower, "language_model": model.language_model}
    identity = {name: files_hash(local_directory(str(one))) for name, one in halves.items()}
    return Planned.of("compose", out, model.canonical(), identity, [])


def given_model(model: ModelConfig) -> Planned:
    """Return a model that is taken as it is, in the place of a composed one. Raises: UserError."""
    from train.learn.checkpoint import base_hash

    directory = given_directory(model)
    return Planned("model", base_hash(directory), directory, {})


def given_directory(model: ModelConfig) -> str:
    """Return the absolute directory of a model that is taken as it is. Raises: UserError."""
    from train.models.hub import local_directory

    directory = paths.absolute(local_directory(str(model.llava)))
    tokens_per_image(directory)
    return directory


def trained_stage(
    stage: TrainedStage, out: str, before: list[Planned], tokens_per_image: int
) -> Planned:
    """Return a stage that trains; its identity is that of its data. Raises: UserError."""
    from train.data.index import read_subset, uids_hash
    from train.learn.checkpoint import data_fingerprints

    directories = data_directories(stage)
    subset = None if stage.subset is None else uids_hash(read_subset(stage.subset))
    identity = {"data": data_fingerprints(directories), "subset": subset}
    decides = stage.config(tokens_per_image).deciding()
    return Planned.of(stage.name, out, decides, identity, before)


def export_stage(recipe: TrainingRecipe, out: str, before: list[Planned]) -> Planned:
    """Return the stage that writes the model."""
    return Planned.of("export", out, recipe.export.canonical(), None, before)


def data_directories(stage: TrainedStage) -> list[str]:
    """Return the absolute directories of a stage's shards. Raises: UserError."""
    found = [_shards_of(paths.absolute(one), stage.name) for one in stage.data]
    if len(set(found)) < len(found):
        raise UserError(
            f"recipe.{stage.name}.data names the same shards twice: {list(stage.data)}.",
            "Their samples would be drawn twice without a word.",
            "Name them once, and give their sources a weight in plan.weights.",
        )
    return found


def _shards_of(path: str, name: str) -> str:
    """Return the directory of a run's newest shards, or of shards itself."""
    chain = read_latest(path)
    for stage in WRITES_SHARDS:
        if stage in chain:
            return chain[stage].path
    if paths.exists(paths.join(path, RECORD)) and paths.list_names(path, ".parquet"):
        return path
    raise UserError(
        f"recipe.{name}.data: {path} holds no finished shards.",
        f"Training reads what the stages {' and '.join(WRITES_SHARDS)} wrote.",
        "Name the --out of such a run once it is finished.",
    )


def tokens_per_image(model_dir: str) -> int:
    """Return how many tokens a model reads an image as. Raises: UserError for another directory."""
    config = store.read_json(paths.join(model_dir, "config.json"))
    if not isinstance(config, dict) or "image_seq_length" not in config:
        raise UserError(
            f"{model_dir} holds no LLaVA model.",
            "Its config.json is missing, or has no image_seq_length.",
            "Compose a tower and a language model first.",
        )
    return int(config["image_seq_length"])


def check_inputs(stage: TrainedStage) -> None:
    """Check that a stage's data and subset are there, before an earlier stage trains for days.

    Raises: UserError.
    """
    data_directories(stage)
    if stage.subset is not None and not paths.exists(stage.subset):
        raise UserError(
            f"recipe.{stage.name}.subset: {stage.subset} is not there.",
            "It names the uids that are trained on.",
            "Give a parquet file with a column uid, or a folder of such.",
        )


def unfinished_other(out: str, planned: Planned) -> str | None:
    """Return where the last run began this stage with other settings and did not finish it."""
    other = read_latest(out, "planned").get(planned.name)
    if other is None or other.path == planned.directory or other.record() is not None:
        return None
    return other.path if settings_of(other.path) else None


def settings_of(directory: str) -> Any:
    """Return the settings that a run of training was begun with."""
    return store.read_json(paths.join(directory, "config.json"))
