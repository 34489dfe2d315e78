"""Questions about a training run, answered from its files: while it runs and after a crash."""

from __future__ import annotations

import json
from typing import Any

from manifests import paths
from manifests.errors import UserError
from manifests.lineage import why as stories_of
from manifests.record import read_latest
from manifests.work import StageDir
from pipelines.recipe import read_yaml
from pipelines.training.layout import (
    Planned,
    compose_stage,
    export_stage,
    given_model,
    tokens_per_image,
    trained_stage,
)
from pipelines.training.recipe import TRAINED, TrainingRecipe, is_training, parse_training

_MODEL_FILES = ("training.json", "inputs.json")
_LOG = "log.jsonl"


def is_training_run(path: str) -> bool:
    """Return whether a path is `warren train`'s folder, one of its runs, or an exported model."""
    if any(paths.exists(paths.join(path, name)) for name in _MODEL_FILES):
        return True
    recipe = paths.join(path, "recipe.yaml")
    return paths.exists(recipe) and is_training(read_yaml(recipe))


def run_of(path: str) -> str:
    """Return the newest finished run of training: `path` itself, or in `warren train`'s folder.

    Raises: UserError when there is none.
    """
    if paths.exists(paths.join(path, "inputs.json")):
        return path
    chain = read_latest(path)
    for name in reversed(TRAINED):
        if name in chain:
            return chain[name].path
    raise UserError(
        f"{path} holds no finished training.",
        "Neither a run's done.json nor a latest.json that names one is there.",
        "Give the --out of `warren train`, once a stage that trains is finished.",
    )


def finished_run(path: str) -> str:
    """Return the run whose model is meant by a path, as run_of.

    Raises: UserError where `warren train` began a later stage that is not finished.
    """
    found = run_of(path)
    later = [one for one in read_latest(path, "planned").values() if one.stage in TRAINED]
    if later and later[-1].record() is None:
        raise UserError(
            f"{later[-1].stage} of {path} is not finished.",
            f"What is finished there is {paths.name_of(found)}, the stage before it.",
            f"Go on with `warren train`, or name that run: {found}.",
        )
    return found


def plan(recipe: TrainingRecipe, out: str | None) -> list[dict[str, Any]]:
    """Return what a run of a recipe would use again, go on with and make; nothing is downloaded.

    Rows are as of `status`. Stages behind one that is still to be composed have no directory yet.
    Raises: UserError for data that is not there.
    """
    from train.models.hub import is_at_hand

    known: list[Planned] = []
    model = recipe.model
    halves = [model.llava] if model.llava else [model.vision_tower, model.language_model]
    if out is not None and all(is_at_hand(str(one)) for one in halves):
        known = _known(recipe, paths.absolute(out))
    rows = {one.name: _stage_status(StageDir(one.name, one.directory)) for one in known}
    return [rows.get(name) or _new(name) for name in recipe.stages()]


def _known(recipe: TrainingRecipe, out: str) -> list[Planned]:
    """Return the stages whose directories can be told before anything is made."""
    model = recipe.model
    known = [given_model(model) if model.llava else compose_stage(model, out)]
    if known[0].name == "compose" and not known[0].is_finished:
        return known
    num_tokens = tokens_per_image(known[0].directory)
    for stage in recipe.trained:
        known.append(trained_stage(stage, out, known, num_tokens))
    return [*known, export_stage(recipe, out, known)]


def _new(name: str) -> dict[str, Any]:
    figures = ("steps_done", "loss", "tokens_per_s", "seconds")
    return {"stage": name, "directory": "", "state": "new"} | dict.fromkeys(figures)


def status(out: str) -> list[dict[str, Any]]:
    """Return a row for each stage of the last run: how far it is, and the last step's figures.

    Args: out: the folder of `warren train`, or one run in it.
    Raises: UserError for an exported model, which is finished.
    """
    if paths.exists(paths.join(out, "inputs.json")):
        return [_stage_status(StageDir(paths.name_of(out).rpartition("-")[0] or "run", out))]
    if paths.exists(paths.join(out, "training.json")):
        raise UserError(
            f"{out} is a finished model.",
            "How far training is, is told of the folder that `warren train` writes.",
            f"Read {paths.join(out, 'README.md')} for what made it.",
        )
    found = read_latest(out, "planned")
    rows = [_stage_status(one) for one in found.values()]
    recipe = parse_training(read_yaml(paths.join(out, "recipe.yaml")))
    return rows + [_new(name) for name in recipe.stages() if name not in found]


def _stage_status(stage: StageDir) -> dict[str, Any]:
    record, last = stage.record(), last_line(paths.join(stage.path, _LOG))
    begun = last is not None or paths.exists(paths.join(stage.path, "config.json"))
    state = "finished" if record else "unfinished" if begun else "new"
    return {
        "stage": stage.stage,
        "directory": paths.name_of(stage.path),
        "state": state,
        "steps_done": None if last is None else last["step"] + 1,
        "loss": last and last["loss"],
        "tokens_per_s": last and last["tokens_per_s"],
        "seconds": record and record["seconds"],
    }


def last_line(path: str, *, at_most_bytes: int = 1 << 16) -> dict[str, Any] | None:
    """Return the last whole line of a JSONL file, by its end alone; None where there is none."""
    size = paths.size_of(path)
    if not size:
        return None
    fs, local = paths.filesystem(path)
    end = bytes(fs.cat_file(local, start=max(size - at_most_bytes, 0), end=size))
    whole = end[: end.rfind(b"\n") + 1].splitlines()
    found: dict[str, Any] | None = json.loads(whole[-1]) if whole else None
    return found


def why(path: str, name: str) -> list[dict[str, Any]]:
    """Tell whether a sample, or an image file, was trained on, and how it came into the data.

    Args: name: a key in the shards, a uid in decimal, or the path of an image file.
    Returns: a finding for each run of training and sample, with `story`, the curation's, where the
    shards lie in the folder of their run. Raises: UserError when no data has it.
    """
    from train.models.trained_on import trained_on

    findings = [one.as_json() for one in trained_on(_model_or_run(path), name)]
    return [one | {"story": _story(one)} for one in findings]


def _model_or_run(path: str) -> str:
    """Return the exported model or run of training that a question is about."""
    is_one = any(paths.exists(paths.join(path, name)) for name in _MODEL_FILES)
    return path if is_one else run_of(path)


def _story(finding: dict[str, Any]) -> dict[str, Any] | None:
    chain = read_latest(finding["directory"].rstrip("/").rpartition("/")[0])
    if not any(one.path == finding["directory"] for one in chain.values()):
        return None
    return stories_of(chain, str(finding["uid"]))[0].as_json()
