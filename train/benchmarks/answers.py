"""A model's answers, matched to a benchmark's questions by id: nothing is guessed, nothing dropped.

An answers file is JSON lines of Bunny's schema, `{"question_id", "prompt", "text", "answer_id",
"model_id", "metadata"}`, or of `question_id` and `text` alone, or one JSON mapping of id to
text, or an upload for VQA or GQA. What cannot be matched is refused with its ids, so that no
figure comes from incomplete data.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manifests.errors import UserError
from train.benchmarks import files
from train.benchmarks.answer_map import mapped_rows
from train.benchmarks.contract import Question, QuestionSet

MAX_LISTED = 20

AnswerId = Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to a question set. texts: question id -> text, None where there is none.

    missing, empty: ids of questions without an answer, and with an answer without a character
    (blanks apart). notes: what a reader of the score must know of how they were matched.
    """

    texts: Mapping[str, str | None]
    missing: Sequence[str] = ()
    empty: Sequence[str] = ()
    notes: Sequence[str] = ()


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of an answers file, each with `question_id` and `text`.

    Raises: UserError naming the line that is broken or lacks one of them.
    """
    rows = mapped_rows(path) or files.read_json_rows(path)
    if not rows:
        raise UserError(f"{path} has no answers.", "", "Give the answers as JSON lines.")
    named = [_by_our_names(row) for row in rows]
    for number, row in enumerate(named, start=1):
        _check(row, path, number)
    return named


def _by_our_names(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the names that uploads for VQA and GQA have replaced; an id 7.0 is 7."""
    number = row.get("question_id")
    if isinstance(number, float) and number.is_integer():  # as pandas writes it
        row = {**row, "question_id": int(number)}
    if "question_id" in row and "text" in row:
        return row
    theirs = {"questionId": "question_id", "answer": "text", "prediction": "text"}
    return {theirs.get(name, name): value for name, value in row.items()}


def _check(row: Mapping[str, Any], path: str | Path, number: int) -> None:
    fix = 'A line is e.g. {"question_id": 1, "text": "Yes"}.'
    if isinstance(row.get("question_id"), bool) or not isinstance(
        row.get("question_id"), int | str
    ):
        raise UserError(f"{path}: answer {number} has no question_id.", json.dumps(row)[:200], fix)
    if not isinstance(row.get("text"), str):
        raise UserError(f"{path}: answer {number} has no text.", json.dumps(row)[:200], fix)


def match(
    rows: Sequence[Mapping[str, Any]],
    questions: QuestionSet,
    answer_id: AnswerId | None = None,
    *,
    allow_missing: bool = False,
) -> Answers:
    """Return a text or None for each question.

    A row is matched by the question's own id, its `question_id`, or its `shared_id` or
    `official_id` (details); where several questions share one, by the row's category, then by its
    prompt. A question that is `optional` (details) needs no answer.
    Raises: UserError listing ids that no question has, ids answered twice, and, unless
    `allow_missing`, ids of questions without an answer.
    """
    finder = _Finder(questions, answer_id)
    found: dict[str, str] = {}
    unknown, twice, other_prompts = [], [], 0
    for row in rows:
        question = finder.question_of(row)
        if question is None:
            unknown.append(_told(row))
        elif question.id in found:
            twice.append(_told(row))
        else:
            found[question.id] = row["text"]
            other_prompts += _is_other_prompt(row, question)
    missing = [one.id for one in questions.questions if one.id not in found]
    optional = {one.id for one in questions.questions if one.details.get("optional")}
    names = names_of(questions)
    needed = [] if allow_missing else [names[one] for one in missing if one not in optional]
    _refuse(questions, unknown, twice, needed)
    return Answers(
        {one.id: found.get(one.id) for one in questions.questions},
        missing,
        [name for name, text in found.items() if not text.strip()],
        _notes(other_prompts, finder.num_by_order),
    )


def names_of(questions: QuestionSet) -> dict[str, str]:
    """Return question id -> what people know it by: its `question_id`, if no other has that."""
    counts = Counter(str(one.question_id) for one in questions.questions)
    return {
        one.id: str(one.question_id) if counts[str(one.question_id)] == 1 else one.id
        for one in questions.questions
    }


def load(
    path: str | Path,
    questions: QuestionSet,
    answer_id: AnswerId | None = None,
    *,
    allow_missing: bool = False,
) -> Answers:
    """Return `match` of a file's rows. Raises: UserError as `read_answers` and `match` do."""
    return match(read_answers(path), questions, answer_id, allow_missing=allow_missing)


def _refuse(
    questions: QuestionSet,
    unknown: Sequence[str],
    twice: Sequence[str],
    missing: Sequence[str],
) -> None:
    name = f"{questions.benchmark} ({questions.version})"
    if unknown:
        raise UserError(
            f"{len(unknown)} answers belong to no question of {name}: {_listed(unknown)}.",
            "The answers are of another version or split of the benchmark, or sets are mixed.",
            "Give the questions that were asked, or answer these questions.",
        )
    if twice:
        raise UserError(
            f"{len(twice)} answers are to questions of {name} that are answered already: "
            f"{_listed(twice)}.",
            "Which one counts cannot be known.",
            "Keep one answer per question.",
        )
    if missing:
        raise UserError(
            f"{len(missing)} of {len(questions.questions)} questions of {name} have no answer: "
            f"{_listed(missing)}.",
            "A figure from a part of the questions is not the benchmark's.",
            "Answer them, or count them as wrong with --allow-missing.",
        )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _told(row: Mapping[str, Any]) -> str:
    """Return how an error names a row."""
    return str(row["question_id"])


def _notes(num_other_prompts: int, num_by_order: int) -> list[str]:
    notes = []
    if num_other_prompts:
        told = "answers have a prompt that does not hold their question: another version's?"
        notes.append(f"{num_other_prompts} {told}")
    if num_by_order:
        told = "answers without a prompt to questions that share an id were matched in file order"
        notes.append(f"{num_by_order} {told}")
    return notes


def _is_other_prompt(row: Mapping[str, Any], question: Question) -> bool:
    """Return whether a row's prompt lacks the question's bare text (`details["text"]`)."""
    asked, text = row.get("prompt"), question.details.get("text")
    return bool(isinstance(asked, str) and asked and text) and not _holds(str(asked), str(text))


def _holds(prompt: str, text: str) -> bool:
    return " ".join(text.lower().split()) in " ".join(prompt.lower().split())


@dataclass(slots=True)
class _Finder:
    """Finds the question that an answers row belongs to."""

    questions: QuestionSet
    answer_id: AnswerId | None
    num_by_order: int = 0
    _by_id: dict[str, Question] = field(default_factory=dict)
    _by_shared: dict[str, list[Question]] = field(default_factory=lambda: defaultdict(list))
    _by_official: dict[str, list[Question]] = field(default_factory=lambda: defaultdict(list))
    _num_taken: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        for one in self.questions.questions:
            if one.id in self._by_id:
                raise UserError(
                    f"{self.questions.benchmark}: two questions have the id {one.id}.",
                    "The question files repeat themselves, or two versions are mixed.",
                    "Give the files of one version.",
                )
            self._by_id[one.id] = one
            for name in {str(one.question_id), str(one.details.get("shared_id", one.question_id))}:
                self._by_shared[name].append(one)
            if "official_id" in one.details:
                self._by_official[str(one.details["official_id"])].append(one)

    def question_of(self, row: Mapping[str, Any]) -> Question | None:
        """Return the row's question, or None when there is none or more than one."""
        names = [str(row["question_id"])]
        if self.answer_id is not None:
            names.insert(0, self.answer_id(row))
        for name in names:
            if name in self._by_id:
                return self._by_id[name]
        shared = next((self._by_shared[one] for one in names[::-1] if one in self._by_shared), [])
        if len(shared) > 1 and not row.get("prompt"):
            return self._next(names[-1], shared)
        official = self._by_official.get(names[-1], [])
        if len(official) > 1:  # POPE counts from 1 in each category: what the row says comes first
            return _only(row, official) or _only(row, shared)
        return _only(row, shared) or _only(row, official)

    def _next(self, name: str, shared: Sequence[Question]) -> Question:
        """Return the next question of those that share an id, the last when all are taken."""
        place = self._num_taken[name]
        self._num_taken[name] += 1
        self.num_by_order += 1
        return shared[min(place, len(shared) - 1)]


def _only(row: Mapping[str, Any], candidates: Sequence[Question]) -> Question | None:
    """Return the one candidate that fits a row's category and prompt, where it has them."""
    metadata = row.get("metadata")
    category = row.get("category") or (
        metadata.get("category") if isinstance(metadata, Mapping) else None
    )
    if len(candidates) > 1 and category:
        candidates = [one for one in candidates if one.category == category]
    if len(candidates) > 1 and row.get("prompt"):
        texts = [(one, one.details.get("text") or one.prompt) for one in candidates]
        candidates = [one for one, text in texts if _holds(str(row["prompt"]), str(text))]
    return candidates[0] if len(candidates) == 1 else None
