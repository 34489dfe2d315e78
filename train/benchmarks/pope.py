"""POPE: is an object in the image? Three sets of questions; Bunny reports the mean of their F1.

Rules: Li et al., arXiv 2305.10355, and Bunny's eval/pope/eval_pope.py. lmms: lmms-eval,
tasks/pope/utils.py. Bunny's published numbers are of the questions at commit e3e3926 of
RUCAIBox/POPE, 8910 of them; that repository and the hub have 9000 since, not all the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from manifests.errors import UserError
from train.benchmarks import files
from train.benchmarks.contract import (
    Benchmark,
    ImageSource,
    Profile,
    Question,
    QuestionSet,
    Report,
    Texts,
)
from train.benchmarks.wording import SINGLE_WORD, bare

FIRST_IDS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""Category -> what Bunny adds to the official ids, which begin at 1 in each file."""

PINNED = {"adversarial": 3000, "random": 2910, "popular": 3000}
NEWER = dict.fromkeys(PINNED, 3000)
EDITIONS = {
    **dict.fromkeys(("03d82fffdb8693e7", "d82bcb0388a947a9", "6f1e6dfc61bac688"), "e3e3926"),
    **dict.fromkeys(("e97476d3c21492db", "aff9e495270a71ed", "64cdd2c21d1b55c9"), "newer"),
}
"""Start of the sha256 of a whole category's sorted ids, by lines -> its edition. Computed from
coco_pope_*.json of both commits."""


def parse(text: str, profile: Profile = "bunny") -> str:
    """Return "yes" or "no"; in profile lmms also any other text, in lower case.

    bunny: "no" when "No", "no" or "not", in that case, is a word of what stands before the first
    "."; words are told apart by blanks alone, and commas do not count. All else is "yes".
    lmms: the whole text, in lower case and without blanks around it.
    """
    if profile == "lmms":
        return text.lower().strip()
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score(questions: QuestionSet, texts: Texts, profile: Profile = "bunny") -> Report:
    """Return 100 * F1: the mean over categories (bunny), or of all questions at once (lmms).

    The table has fractions, as the official script prints. A question without an answer is wrong.
    """
    read = {one.id: _read(one, texts[one.id], profile) for one in questions.questions}
    rows = []
    for name in FIRST_IDS:
        asked = [one for one in questions.questions if one.category == name]
        if asked:
            rows.append({"category": name, **_rates(asked, read)})
    mean = sum(row["f1"] for row in rows) / len(rows)
    pooled = _rates(questions.questions, read)
    f1 = mean if profile == "bunny" else pooled["f1"]
    return Report(
        "pope",
        profile,
        {"f1": 100 * f1, "mean_f1": 100 * mean, "pooled_f1": 100 * pooled["f1"]},
        len(questions.questions),
        missing=[one.id for one in questions.questions if texts[one.id] is None],
        unreadable=[one for one, text in texts.items() if text is not None and not _is_clear(text)],
        tables={"categories": [*rows, {"category": "all", **pooled}]},
        notes=_notes(questions, [row["category"] for row in rows], profile),
    )


def _read(question: Question, text: str | None, profile: Profile) -> str:
    """Return what an answer says; a question without one counts as answered wrongly."""
    if text is not None:
        return parse(text, profile)
    return "no" if question.answer == "yes" else "yes"


def _is_clear(text: str) -> bool:
    """Return whether an answer says yes or no at all, as a word of any case."""
    words = "".join(one if one.isalpha() else " " for one in text.lower()).split()
    return bool({"yes", "no", "not"} & set(words))


def _rates(asked: Sequence[Question], read: Mapping[str, str]) -> dict[str, Any]:
    """Return the rates of one set; yes is positive, and what divides by zero is 0."""
    counts = Counter((one.answer, read[one.id]) for one in asked)
    true, false = counts["yes", "yes"], counts["no", "yes"]
    precision = _ratio(true, true + false)
    recall = _ratio(true, true + counts["yes", "no"])
    return {
        "accuracy": _ratio(true + counts["no", "no"], len(asked)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(true + false, len(asked)),
        **{"tp": true, "fp": false, "tn": counts["no", "no"], "fn": counts["yes", "no"]},
        "questions": len(asked),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _notes(questions: QuestionSet, categories: Sequence[str], profile: Profile) -> list[str]:
    notes = list(questions.notes)
    if profile == "bunny" and len(categories) < len(FIRST_IDS):
        notes.append(f"the mean is over {', '.join(categories)} alone, not over three categories")
    if profile == "lmms":
        notes.append("f1 is of all questions pooled; Bunny's is the mean of three")
    return notes


def key(category: str, image: str, question: str) -> str:
    """Return a question's id: "category/image|question", the same in every version and layout."""
    return f"{category}/{Path(image).stem}|{bare(question)}"


def answer_id(row: Mapping[str, Any]) -> str:
    """Return the id of an answers row by what it says of itself, else its `question_id`."""
    if all(isinstance(row.get(name), str) for name in ("category", "image", "prompt")):
        return key(row["category"], row["image"], row["prompt"])
    return str(row["question_id"])


def read(path: str) -> QuestionSet:
    """Return POPE's questions; see LAYOUTS. Raises: UserError when files are missing or differ."""
    root = files.require(path)
    tables = files.parquet_files(root)
    if tables:
        whole = [one for one in tables if files.split_of(one) == "test"]
        tables = whole or tables  # the hub has all questions twice: in `test`, and by category
        return _question_set(_from_parquet(tables), tables)
    folder = root if root.is_dir() else root.parent
    asked = [root] if root.is_file() else files.question_lines(folder, "*pope*")
    if root.is_file() and "label" in files.read_json_rows(root)[0] and _category(root):
        return _question_set(_from_labels(root, folder), [root])
    labels = _label_files(folder)
    official = [one for source in labels for one in _from_labels(source, folder)]
    if not asked and not official:
        fix = f"Give one of: {'; '.join(LAYOUTS)}."
        raise UserError(f"{path} holds no questions of POPE.", "", fix)
    if not asked:
        return _question_set(official, labels)
    rows = files.read_json_rows(asked[0])
    return _question_set(_from_jsonl(rows, official, folder), [asked[0], *labels])


def _question_set(questions: Sequence[Question], sources: Sequence[Path]) -> QuestionSet:
    questions = _told_apart(questions)
    counts = {name: sum(one.category == name for one in questions) for name in FIRST_IDS}
    editions = {name: _edition(name, questions) for name in FIRST_IDS}
    if {"e3e3926", "newer"} <= set(editions.values()):
        raise UserError(
            "POPE's categories are of two editions.",
            ", ".join(f"{name}: {edition}" for name, edition in editions.items()),
            "Take all three files from one commit; published numbers are of e3e3926.",
        )
    version, notes = f"subset of {len(questions)} questions", [OTHER_COUNT.format(len(questions))]
    if counts == PINNED:
        version, notes = "e3e3926, 8910 questions", []
        if set(editions.values()) != {"e3e3926"}:
            notes = ["as many questions as commit e3e3926 has, but not all the same"]
    elif counts == NEWER:
        version, notes = "newer, 9000 questions", [OTHER_COUNT.format(len(questions))]
    return QuestionSet("pope", version, questions, files.digests(sources), notes)


def _told_apart(questions: Sequence[Question]) -> list[Question]:
    """Return the questions with ids of their own, where one is asked twice under two numbers.

    Raises: UserError when a category has one number twice: files are mixed.
    """
    numbers = Counter((one.category, str(one.question_id)) for one in questions)
    twice = [number for (_, number), count in numbers.items() if count > 1]
    if twice:
        raise UserError(
            f"POPE's question {twice[0]} is there twice in its category.",
            f"{len(twice)} numbers are: files of two editions, or one file twice.",
            "Give each category's file once.",
        )
    seen: Counter[str] = Counter()
    found = []
    for one in questions:
        seen[one.id] += 1
        found.append(one if seen[one.id] == 1 else replace(one, id=f"{one.id}#{seen[one.id]}"))
    return found


OTHER_COUNT = "{} questions, not the 8910 of commit e3e3926 that published numbers are of"


def _edition(category: str, questions: Sequence[Question]) -> str:
    """Return which commit's a whole category is, "" when it is neither's."""
    names = sorted(one.id for one in questions if one.category == category)
    return EDITIONS.get(hashlib.sha256("\n".join(names).encode()).hexdigest()[:16], "")


def _question(
    category: str, number: Any, row: Mapping[str, Any], images: Sequence[ImageSource]
) -> Question:
    """Return a question. number: its id in Bunny's file, or, in an official one, that file's.

    row: has `image`, `text` and `label`. Official ids get what Bunny adds to them, and are kept.
    """
    text, label = str(row["text"]), str(row["label"]).strip().lower()
    if label not in ("yes", "no") or category not in FIRST_IDS:
        raise UserError(
            f"Question {number} is no question of POPE.",
            f"Its label is {row['label']!r}, its category {category!r}.",
            f"Labels are yes and no; categories {', '.join(FIRST_IDS)}.",
        )
    return Question(
        key(category, row["image"], text),
        number,
        bare(text) + SINGLE_WORD,
        tuple(images),
        category,
        label,
        {"text": bare(text)},
    )


def _official(
    category: str, number: Any, row: Mapping[str, Any], images: Sequence[ImageSource]
) -> Question:
    """Return a question of an official or a hub's file, which counts from 1 in each category."""
    official = int(number) if str(number).isdigit() else str(number)
    counted = isinstance(official, int) and official <= min(filter(None, FIRST_IDS.values()))
    asked = _question(category, official, row, images)
    bunny = FIRST_IDS[category] + int(number) if counted else official
    return replace(asked, question_id=bunny, details={**asked.details, "official_id": official})


def _from_parquet(tables: Sequence[Path]) -> list[Question]:
    found = []
    for row in files.parquet_rows(tables):
        one = row.values
        category = one.get("category") or files.split_of(row.path)
        told = {"image": one["image_source"], "text": one["question"], "label": one["answer"]}
        found.append(_official(category, one["question_id"], told, row.images()))
    return found


def _from_labels(path: Path, folder: Path) -> list[Question]:
    """Return the questions of an official file, whose name ends with its category."""
    category = _category(path)
    rows = files.read_json_rows(path)
    return [
        _official(category, row["question_id"], row, [_image(folder, row["image"])]) for row in rows
    ]


def _from_jsonl(
    rows: Sequence[Mapping[str, Any]], official: Sequence[Question], folder: Path
) -> list[Question]:
    """Return the questions of Bunny's file, labels joined by (category, image, question)."""
    labels = {one.id: one.answer for one in official}
    torn = [one.id for one in official if labels[one.id] != one.answer]
    if torn:
        what = f"{torn[0]} is labelled both yes and no."
        raise UserError(what, "Labels are joined by image and question.", "Give one edition.")
    found, lost = [], []
    for row in rows:
        category, text = str(row.get("category")), row.get("text") or row["question"]
        image = str(row.get("image") or row["image_source"])
        name = key(category, image, text)
        label = row.get("label", row.get("answer", labels.get(name)))
        if label is None:
            lost.append(name)
            continue
        told = {"image": image, "text": text, "label": label}
        found.append(_question(category, row["question_id"], told, [_image(folder, image)]))
    if lost:
        raise UserError(
            f"{len(lost)} of {len(rows)} questions have no label, e.g. {lost[0]}.",
            f"The label files have {len(labels)} questions: another version, or not all of them.",
            "Put coco_pope_{adversarial,popular,random}.json of commit e3e3926 beside the file.",
        )
    return found


def _image(folder: Path, name: str) -> files.FileImage:
    places = (folder / "val2014", folder.parent / "val2014", folder / "images", folder)
    place = next((one for one in places if one.is_dir() and one != folder), places[0])
    return files.FileImage(str(place / name))


def _category(path: Path) -> str:
    return next((name for name in FIRST_IDS if path.stem.endswith(name)), "")


def _label_files(folder: Path) -> list[Path]:
    for place in (folder, folder / "coco", folder / "output" / "coco"):
        found = [one for one in sorted(place.glob("*pope*.json")) if _category(one)]
        if found:
            return found
    return []


LAYOUTS = (
    "a folder with coco_pope_{adversarial,popular,random}.json (JSON lines), or coco/ in it",
    "one of those files: that category alone",
    "bunny_pope_test.jsonl with those files (or coco/) beside it, or with a `label` a row",
    "parquet of the hub: the 9000 questions of split test, or Full's three splits",
)

BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    read=read,
    score=score,
    columns={"POPE": "f1"},
    answer_id=answer_id,
    layouts=LAYOUTS,
)
