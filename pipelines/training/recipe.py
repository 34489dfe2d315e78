"""Training recipes: one YAML file from two published models and shards to a model directory.

warren train pipelines/recipes/train_bunny_phi2_siglip.yaml --out runs/bunny --set finetune.seed=1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from manifests.errors import UserError
from manifests.strict import MissingField, Strict, unknown_key
from pipelines.recipe import apply_setting, read_yaml
from train.config import TrainConfig
from train.text.template import BUNNY_END_TOKENS

STAGES = ("compose", "pretrain", "finetune", "export")
"""In run order. A recipe without `pretrain` finetunes the projector as it is in the model."""
Trained = Literal["pretrain", "finetune"]
TEMPLATES = ("plain", *BUNNY_END_TOKENS, "chat")
TRAINED: tuple[Trained, ...] = ("pretrain", "finetune")
_SECTIONS = ("model", *TRAINED, "export", "launch")
_OF_DATA = ("data", "subset")


class ModelConfig(Strict):
    """What is trained: a tower and a language model to compose, or a LLaVA directory as it is.

    Each is a local directory or a name on the model hub.
    """

    vision_tower: str | None = None
    language_model: str | None = None
    llava: str | None = None
    """A directory that compose, import-bunny or an export wrote, in place of the two."""
    image_token: str | None = None
    resize_vocabulary: int = Field(default=0, ge=0)
    """Rows to add to embedding and head, for a vocabulary without a free row."""
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep"
    seed: int = 0
    """Of the projector's first weights."""
    chat_template: Literal["bunny", "own"] = "bunny"
    """Of the composed model, which finetune.template chat trains on. Other templates are written
    into what is exported, whatever this is."""
    location_fields: ClassVar[frozenset[str]] = frozenset(
        {"vision_tower", "language_model", "llava"}
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.llava is None and self.vision_tower is None:
            raise MissingField("vision_tower")
        if self.llava is None and self.language_model is None:
            raise MissingField("language_model")
        if self.llava is not None and (self.vision_tower or self.language_model):
            raise ValueError("llava is a whole model: it takes the place of the two")
        return self


class ExportConfig(Strict):
    """How the trained model is written."""

    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "float16"
    """Bunny serves float16. bfloat16 keeps less of a small change, see the export's noise.json."""


class LaunchConfig(Strict):
    """Where training runs; nothing here changes the result but for rounding between ranks."""

    on: Literal["here", "ray"] = "here"
    ranks: int | None = Field(default=None, ge=1)
    """Processes, each with a GPU where there are any; None: one for each GPU of this machine."""
    data_workers: int | None = Field(default=None, ge=0)
    """Processes of each rank that read and decode; None: up to four, as its machine has CPUs."""
    max_restarts: int = Field(default=3, ge=0)
    """On Ray: how often a failed run goes on from its last checkpoint."""
    preflight: bool = True
    """Look at the data and the largest micro-batch before the first step."""
    beside_unfinished: bool = False
    """Train although an unfinished run of other settings is in the folder."""


@dataclass(frozen=True, slots=True)
class TrainedStage:
    """A section `pretrain` or `finetune`: its data, and the settings that it gives.

    data: run directories, of which the newest shards are taken, or directories of shards.
    subset: a parquet file or folder whose uids are trained on; None: all.
    """

    name: Trained
    data: tuple[str, ...]
    subset: str | None
    given: Mapping[str, Any]

    def config(self, tokens_per_image: int | None = None) -> TrainConfig:
        """Return the settings; the model's tokens an image where the recipe gives none.

        Raises: UserError.
        """
        values = dict(self.given)
        plan = values.get("plan") or {}
        if tokens_per_image is not None and isinstance(plan, Mapping):
            values["plan"] = {"tokens_per_image": tokens_per_image, **plan}
        return TrainConfig.load(values, where=f"recipe.{self.name}")


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """A whole training run. stages: the sections of what is trained, in run order."""

    model: ModelConfig
    trained: tuple[TrainedStage, ...]
    export: ExportConfig
    launch: LaunchConfig

    def stages(self, until: str | None = None) -> list[str]:
        """Return the stages to run, in order, up to and including `until`. Raises: UserError."""
        names = [] if self.model.llava else ["compose"]
        names += [*(one.name for one in self.trained), "export"]
        if until is not None and until not in names:
            raise UserError(
                f"The recipe has no stage {until!r}.",
                f"It runs: {', '.join(names)}.",
                "Add that section to the recipe, or stop at another stage.",
            )
        return names[: len(names) if until is None else names.index(until) + 1]

    def as_mapping(self) -> dict[str, Any]:
        """Return the recipe with its defaults, as it is saved beside the results."""
        found: dict[str, Any] = {"model": self.model.model_dump(mode="json")}
        for one in self.trained:
            values = one.config().model_dump(mode="json")
            if "tokens_per_image" not in (one.given.get("plan") or {}):
                values["plan"].pop("tokens_per_image")  # it is the model's
            found[one.name] = {"data": list(one.data), "subset": one.subset, **values}
        return found | {
            "export": self.export.model_dump(mode="json"),
            "launch": self.launch.model_dump(mode="json"),
        }


def is_training(values: Mapping[str, Any]) -> bool:
    """Return whether a parsed recipe is one of training: it says which model."""
    return "model" in values


def load_training(path: str, overrides: Sequence[str] = ()) -> TrainingRecipe:
    """Return the training recipe of a YAML file with "section.key=value" overrides.

    Raises: UserError as pipelines.recipe.load.
    """
    values = read_yaml(path)
    for override in overrides:
        apply_setting(values, override)
    return parse_training(values)


def parse_training(values: Mapping[str, Any]) -> TrainingRecipe:
    """Return the training recipe that a parsed mapping means. Raises: UserError."""
    if "source" in values and "model" not in values:
        raise UserError(
            "The recipe is one of curation.",
            "It has a section source, and none that says which model.",
            "Run it by `warren run`.",
        )
    for name in values:
        if name not in _SECTIONS:
            raise unknown_key(str(name), list(_SECTIONS), where="recipe")
    trained = tuple(_trained(name, values[name]) for name in TRAINED if name in values)
    if not trained:
        raise UserError(
            "The recipe trains nothing.",
            "It has neither a section pretrain nor finetune.",
            "Add one, e.g. pretrain: {data: [runs/mine], template: plain, projector_lr: 5e-4}.",
        )
    return TrainingRecipe(
        ModelConfig.load(values.get("model") or {}, where="recipe.model"),
        trained,
        ExportConfig.load(values.get("export") or {}, where="recipe.export"),
        LaunchConfig.load(values.get("launch") or {}, where="recipe.launch"),
    )


def _trained(name: Trained, values: Any) -> TrainedStage:
    where = f"recipe.{name}"
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is no mapping.", fix="Write it as keys and values.")
    data = values.get("data")
    if not isinstance(data, list) or not data or not all(isinstance(one, str) for one in data):
        raise UserError(
            f"{where}.data is {data!r}.",
            "It is a list of runs, or of directories of shards.",
            "Write e.g. data: [runs/mine].",
        )
    subset = values.get("subset")
    if subset is not None and not isinstance(subset, str):
        raise UserError(f"{where}.subset is {subset!r}.", "It is the path of a table of uids.")
    given = {key: value for key, value in values.items() if key not in _OF_DATA}
    if name == "pretrain":
        if given.setdefault("stage", "projector") != "projector":
            raise UserError(
                f"{where}.stage is {given['stage']!r}.", "Pretraining trains the projector."
            )
    else:
        given.setdefault("stage", "adapter")
    found = TrainedStage(name, tuple(data), subset, given)
    template = found.config().template
    if template not in TEMPLATES:
        raise UserError(
            f"{where}.template is {template!r}.",
            "There is no such template.",
            f"Choose one of {', '.join(TEMPLATES)}.",
        )
    return found
