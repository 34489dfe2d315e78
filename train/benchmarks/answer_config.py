"""How a model is asked a benchmark's questions, and what must be the same to go on asking."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from manifests import paths, store
from manifests.errors import UserError
from manifests.strict import Strict
from train.benchmarks.contract import Asking, Question, QuestionSet
from train.models.origin import files_hash

HEADER = "run.json"
VERSION = 1
QUESTIONS_PER_CHUNK = 1024


class AnswerConfig(Strict):
    """How answers are made. What is None is the benchmark's own, as Bunny asks it."""

    template: str = "bunny"
    """A name that train.text.template knows; chat is the model directory's own."""
    image_mode: Literal["pad", "square", "processor"] | None = None
    """How pictures become squares; processor: by the model directory's own image processor."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    """Questions generated together. Half precision may round otherwise for another number."""
    num_chunks: int | None = Field(default=None, ge=1)
    """Slices that workers answer apart; None: as many as have at most 1024 questions. Not by the
    workers there are, so that the same questions are generated together everywhere."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Of the weights; auto keeps the directory's. Bunny evaluates in float16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int = Field(default=1, ge=1)
    """Threads, and CPUs, of a worker."""
    adapter: str | None = None
    """A peft directory to put on the model, as `warren chat` does."""
    location_fields: ClassVar[frozenset[str]] = frozenset({"adapter"})

    def settled(self, asking: Asking, num_questions: int) -> Self:
        """Return the same config with nothing left to the benchmark."""
        chunks = self.num_chunks or max(-(-num_questions // QUESTIONS_PER_CHUNK), 1)
        return self.model_copy(
            update={
                "image_mode": self.image_mode or asking.image_mode,
                "max_new_tokens": self.max_new_tokens or asking.max_new_tokens,
                "num_chunks": chunks,
            }
        )


def header_of(
    questions: QuestionSet, model_dir: str, config: AnswerConfig, model_hash: str | None = None
) -> dict[str, Any]:
    """Return what answers depend on, JSON-ready: the questions, the model's files, the settings.

    Pictures count by their places, not by their bytes: there may be hundreds of thousands.

    Args:
        config: a settled one.
        model_hash: files_hash of the directory, where it is known already.
    """
    return {
        "version": VERSION,
        "benchmark": questions.benchmark,
        "edition": questions.version,
        "questions": {
            "number": len(questions.questions),
            "asked": _asked_hash(questions.questions),
            "files": dict(questions.files),
        },
        "model": {
            "name": paths.name_of(model_dir),
            "hash": model_hash or files_hash(model_dir),
            "adapter": config.adapter and files_hash(config.adapter),
        },
        "settings": config.canonical(),
    }


def begin(out: str, header: Mapping[str, Any]) -> None:
    """Write a folder's run.json, or check that the answers in it are of this very run.

    Raises: UserError that lists what has changed since.
    """
    before = store.read_json(paths.join(out, HEADER))
    if before is None:
        store.write_json(out, HEADER, header)
        return
    changed = differences(before, header)
    if changed:
        raise UserError(
            f"{out} holds answers of another run.",
            "What has changed: " + "; ".join(changed) + ".",
            "Choose another --out, or ask as it was asked.",
        )


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what differs between two headers, a text each: "settings.dtype: auto, now float16"."""
    old, new = _flat(before), _flat(after)
    return [
        f"{name}: {_short(old.get(name))}, now {_short(new.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _asked_hash(questions: Sequence[Question]) -> str:
    digest = hashlib.sha256()
    for one in questions:
        digest.update(json.dumps([one.id, one.prompt, len(one.images)]).encode() + b"\n")
    return digest.hexdigest()


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}.")
        else:
            found[above + name] = value
    return found


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
