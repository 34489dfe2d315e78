"""What a model was made of, as plain values: its runs, their data, its base, and the libraries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from manifests import paths, store
from manifests.errors import UserError
from manifests.record import git_commit, versions
from train.models.draws import Draws, reasons_of
from train.models.finished_run import FinishedRun
from train.models.hub import HUB_NAME
from train.models.origin import read_origin

TRAINING = "training.json"
VERSION = 1


def of_export(
    run: FinishedRun, base: str, dtype: str, base_models: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the provenance of a run's model, JSON-ready.

    base_models: hub names of tower and language model; () for those that the base tells.
    tower: the model_type of the vision tower. runs: those whose projectors were built on, first to
    last. base: with its own provenance where it was exported before.
    """
    return {
        "version": VERSION,
        "kind": "export",
        "dtype": dtype,
        "tower": _tower(base),
        "runs": [_told(one) for one in run.earlier()],
        "base": {
            "directory": base,
            "hash": run.identity["base"],
            "models": list(base_models) or _models_of(base),
            "origin": read_origin(base),
            "training": store.read_json(paths.join(base, TRAINING)),
        },
        "versions": _versions(),
    }


def of_average(shares: Mapping[str, float], dtype: str) -> dict[str, Any]:
    """Return the provenance of a weight average, JSON-ready. shares: of each directory."""
    parts = [
        {
            "directory": paths.absolute(one),
            "share": share,
            "training": store.read_json(paths.join(one, TRAINING)),
        }
        for one, share in shares.items()
    ]
    return {
        **{"version": VERSION, "kind": "average", "dtype": dtype},
        "tower": _tower(next(iter(shares))),
        **{"parts": parts, "versions": _versions()},
    }


def runs_in(training: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield all runs that a model was made by, its base's and its parts' too; each once."""
    seen = set()
    for run in _all_runs(training):
        which = (run["directory"], run["identity"]["plan"])
        if which not in seen:
            seen.add(which)
            yield run


def unknown_parts(training: Mapping[str, Any]) -> list[str]:
    """Return the directories of averaged models that do not tell what made them."""
    parts = training.get("parts", [])
    inner = [one["training"] for one in parts] + [training.get("base", {}).get("training")]
    found = [one["directory"] for one in parts if one["training"] is None]
    return found + [name for one in inner if one is not None for name in unknown_parts(one)]


def _all_runs(training: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if training is None:
        return
    for part in training.get("parts", []):
        yield from _all_runs(part["training"])
    yield from _all_runs(training.get("base", {}).get("training"))
    yield from training.get("runs", [])


def _models_of(base: str) -> list[str]:
    """Return the hub names of what a base was made of, where it, or its config, tells them."""
    origin = read_origin(base) or {"parts": {}}
    known = [one["hub_name"] for one in origin["parts"].values() if one["hub_name"]]
    if known:
        return known
    config = store.read_json(paths.join(base, "config.json"))
    names = [config[part].get("_name_or_path") for part in ("vision_config", "text_config")]
    return [name for name in names if name and HUB_NAME.fullmatch(name)]


def _tower(model_dir: str) -> str:
    config = store.read_json(paths.join(model_dir, "config.json"))
    return str(config["vision_config"].get("model_type", "clip_vision_model"))  # as LlavaConfig


def _told(run: FinishedRun) -> dict[str, Any]:
    """Return a run with its counts: of draws by its log, of refused rows by its plan.

    sources is None, and doubts say why, where its data are gone.
    """
    log = run.log()
    try:
        draws = Draws.of(run)
        planned: dict[str, Any] = {
            "sources": draws.by_source(),
            "refused_reasons": dict(Counter(draws.refused.values())),
            "doubts": list(draws.warnings),
        }
    except UserError as error:
        planned = {"sources": None, "refused_reasons": {}, "doubts": [error.what]}
    counts = {
        name: sum(entry[name] for entry in log) for name in ("rows", "images", "labels", "dropped")
    }
    return {
        **run.as_json(),
        **counts,
        **planned,
        "dropped_reasons": dict(reasons_of(run)),
        "final_loss": log[-1]["loss"] if log else None,
    }


def _versions() -> dict[str, str | None]:
    more = {name: metadata.version(name) for name in ("transformers", "peft", "safetensors")}
    return {**versions(), **more, "commit": git_commit()}
