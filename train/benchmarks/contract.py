"""What a benchmark is: questions read from its own files, answers matched to them, one report.

A module per benchmark has `BENCHMARK`, made of pure functions:

    read(path)                        its files, JSONL or parquet, in its own layout -> QuestionSet
    score(questions, texts, profile)  id -> answer text -> Report

Who answers (our runner, another model's file) and how missing answers are treated is not its
business: `score` gets a text for every question, or None where `--allow-missing` let one through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Profile = Literal["bunny", "lmms"]
"""bunny: Bunny's own rules, by which its published numbers were made. lmms: lmms-eval's."""

Texts = Mapping[str, str | None]
"""Question id -> answer text; None where there is none."""


class ImageSource(Protocol):
    """Where an image's bytes are; small and picklable, read when asked."""

    def read(self) -> bytes:
        """Return the encoded image. Raises: UserError when it is not there."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question. id: unique in its set, and the same in every layout of the benchmark's files.

    question_id: as the files and answers files have it (MME has two questions of one id).
    prompt: what is asked, without an image's mark. answer: what is right, in the benchmark's own
    form; None where it is not public. details: what else the scorer must know.
    """

    id: str
    question_id: str | int
    prompt: str
    images: Sequence[ImageSource] = ()
    category: str = ""
    answer: Any = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of a benchmark, in file order.

    version: which edition of the benchmark these are, as its counts and ids tell. files: the files
    read, name -> sha256 hex. notes: what a reader of the score must know of them.
    """

    benchmark: str
    version: str
    questions: Sequence[Question]
    files: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A benchmark's figures, in the units in which they are published.

    metrics: name -> value, the headline first. tables: title -> rows of a table (per subtask, per
    type). items: questions that count. missing, unreadable: ids of questions without an answer, and
    of answers from which no choice could be read. notes: how to read the figures.
    """

    benchmark: str
    profile: Profile
    metrics: Mapping[str, float]
    items: int
    missing: Sequence[str] = ()
    unreadable: Sequence[str] = ()
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Asking:
    """How a model is asked, as Bunny asks.

    max_new_tokens: of an answer. image_mode: how a picture becomes a square (`train.data.images`).
    """

    max_new_tokens: int = 128
    image_mode: Literal["pad", "square"] = "pad"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark. columns: column of the paper's table -> metric of its report.

    answer_id: an answers row (Bunny's schema) -> the id of its question; by question_id if None.
    submission: writes what the benchmark's server takes, from a text for each question (None: no
    answer); submission_suffix: its file's, e.g. ".json". layouts: what `read` takes, a line each.
    """

    name: str
    title: str
    read: Callable[[str], QuestionSet]
    score: Callable[[QuestionSet, Texts, Profile], Report]
    columns: Mapping[str, str]
    asking: Asking = Asking()
    answer_id: Callable[[Mapping[str, Any]], str] | None = None
    submission: Callable[[QuestionSet, Texts], bytes] | None = None
    submission_suffix: str = ""
    layouts: Sequence[str] = ()
