"""Which edition of a benchmark its files are, told by how many questions they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from manifests.errors import UserError
from train.benchmarks.contract import Question, QuestionSet


def edition(
    name: str, num: int, known: Mapping[int, tuple[str, ...]]
) -> tuple[str, tuple[str, ...]]:
    """Return the version of a set of `num` questions, and notes for who reads its score.

    known: number of questions -> edition and notes on it, the usual one first. A smaller set is a
    subset: its score is not the benchmark's, and says so. Raises: UserError for a set without
    questions, and for one that no edition is large enough for.
    """
    if num in known:
        return known[num][0], known[num][1:]
    if num == 0:
        raise UserError(f"{name}: there are no questions.", "", "Give the benchmark's files.")
    larger = [size for size in known if size > num]
    if not larger:
        listed = "; ".join(f"{size}: {texts[0]}" for size, texts in known.items())
        raise UserError(
            f"{name}: {num} questions are more than any edition has.",
            f"Known: {listed}. Several splits or editions may be mixed.",
            "Give the files of one edition and one split.",
        )
    note = f"{num} of {larger[0]} questions: the score of a subset, not the benchmark's"
    return f"subset of {larger[0]}", (note,)


def refuse_hidden_answers(questions: QuestionSet, hint: str) -> None:
    """Raise a UserError when some answers are not in the files. hint: what can be done instead."""
    hidden = [one.id for one in questions.questions if one.answer is None]
    if hidden:
        raise UserError(
            f"{questions.benchmark}: {len(hidden)} of {len(questions.questions)} questions have "
            f"no answer in these files, e.g. {hidden[0]}.",
            "They cannot be scored here.",
            hint,
        )


def refuse_twice(name: str, questions: Sequence[Question]) -> None:
    """Raise a UserError when two questions have one id."""
    seen: set[str] = set()
    for one in questions:
        if one.id in seen:
            raise UserError(
                f"{name}: two questions have the id {one.id}.",
                "Two files or editions are mixed.",
                "Give the files of one edition and one split.",
            )
        seen.add(one.id)


def percent(num: int, of: int, digits: int = 2) -> float:
    """Return 100 * num / of, rounded; 0.0 of nothing."""
    return round(100 * num / of, digits) if of else 0.0
