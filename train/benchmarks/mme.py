"""MME: 14 subtasks of yes-no questions, two an image; perception of 2000 and cognition of 800.

Rules: Fu et al., arXiv 2306.13394, and the benchmark's own calculation, which Bunny runs unchanged
(eval/mme/calculation_mme.py). lmms: lmms-eval, tasks/mme/utils.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
from train.benchmarks.wording import SINGLE_WORD, YES_OR_NO, bare

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = (
    *("commonsense_reasoning", "numerical_calculation"),
    *("text_translation", "code_reasoning"),
)
SIZES = {
    **dict.fromkeys(("existence", "count", "position", "color"), 60),
    **{"posters": 294, "celebrity": 340, "OCR": 40},
    **dict.fromkeys(("scene", "landmark", "artwork"), 400),
    **{"commonsense_reasoning": 140, "numerical_calculation": 40},
    **{"text_translation": 40, "code_reasoning": 40},
}
RELEASE = "MME_Benchmark_release_version"


def parse(text: str, profile: Profile = "bunny") -> str:
    """Return "yes", "no" or "other" from an answer.

    bunny: the first four characters as they are, in lower case, contain "yes", else "no". A tab is
    a blank (the official script would lose the line).
    lmms: blanks around it and every "." are dropped first; "y" and "n" alone are answers.
    """
    text = text.replace("\t", " ").lower()
    if profile == "lmms":
        text = text.strip().replace(".", "")
        text = {"y": "yes", "n": "no"}.get(text, text)
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score(questions: QuestionSet, texts: Texts, profile: Profile = "bunny") -> Report:
    """Return perception, cognition and every subtask: 100 * (accuracy + accuracy+).

    accuracy: of questions. accuracy+: of images, both of whose questions are right. What is neither
    yes nor no is wrong.
    """
    read = {
        one.id: None if texts[one.id] is None else parse(str(texts[one.id]), profile)
        for one in questions.questions
    }
    rows = [_subtask(name, asked, read) for name, asked in _by_category(questions).items()]
    metrics = {}
    for title, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        scores = [row["score"] for row in rows if row["subtask"] in names]
        if scores:
            metrics[title] = float(sum(scores))
    return Report(
        "mme",
        profile,
        metrics,
        len(questions.questions),
        missing=[name for name, found in read.items() if found is None],
        unreadable=[name for name, found in read.items() if found == "other"],
        tables={"subtasks": rows},
        notes=list(questions.notes),
    )


def _by_category(questions: QuestionSet) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {name: [] for name in (*PERCEPTION, *COGNITION)}
    for one in questions.questions:
        found[one.category].append(one)
    return {name: asked for name, asked in found.items() if asked}


def _subtask(
    name: str, asked: Sequence[Question], read: Mapping[str, str | None]
) -> dict[str, Any]:
    images: dict[str, list[bool]] = defaultdict(list)
    for one in asked:
        images[one.details["image"]].append(read[one.id] == one.answer)
    accuracy = sum(sum(pair) for pair in images.values()) / len(asked)
    both = sum(all(pair) for pair in images.values()) / len(images)
    return {
        "subtask": name,
        "score": 100 * (accuracy + both),
        "accuracy": 100 * accuracy,
        "accuracy_plus": 100 * both,
        "questions": len(asked),
        "images": len(images),
    }


def question_id(image: str, question: str) -> str:
    """Return a question's id: "category/image|question", without folders, suffix and wording."""
    return f"{image_id(image)}|{bare(question)}"


def image_id(image: str) -> str:
    """Return an image's "category/name": files without pictures do not tell its suffix."""
    return f"{Path(image).parts[0]}/{Path(image).stem}"


def answer_id(row: Mapping[str, Any]) -> str:
    """Return the id that an answers row's `question_id` and `prompt` mean."""
    if not row.get("prompt"):
        return image_id(str(row["question_id"]))
    return question_id(str(row["question_id"]), str(row["prompt"]))


def read(path: str) -> QuestionSet:
    """Return MME's questions; see LAYOUTS. Raises: UserError when files are missing or odd."""
    root = files.require(path)
    tables = files.parquet_files(root)
    if tables:
        return _question_set(_from_parquet(tables), tables)
    asked = [root] if root.is_file() else files.question_lines(root, "*mme*")
    release = _release(root if root.is_dir() else root.parent)
    sources = _text_files(release) if release else []
    if not asked and not sources:
        raise UserError(
            f"{path} holds no questions of MME.", f"It has no folder {RELEASE}.", LAYOUTS[0]
        )
    official = [one for source in sources for one in _from_text(source)]
    if not asked:
        return _question_set(official, sources)
    rows = files.read_jsonl(asked[0])
    return _question_set(
        _from_jsonl(rows, official, release or root.parent), [*asked[:1], *sources]
    )


def _question_set(questions: Sequence[Question], sources: Sequence[Path]) -> QuestionSet:
    images: dict[str, int] = defaultdict(int)
    for one in questions:
        images[one.details["image"]] += 1
    odd = sorted(name for name, count in images.items() if count != 2)
    if odd:
        raise UserError(
            f"{len(odd)} images of MME do not have two questions, e.g. {odd[0]}.",
            "accuracy+ counts images both of whose questions are right.",
            "Give whole files of one version.",
        )
    sizes = {name: sum(one.category == name for one in questions) for name in SIZES}
    whole = sizes == SIZES
    version = "release" if whole else f"subset of {len(questions)} questions"
    notes = [] if whole else [f"{len(questions)} questions; the release has {sum(SIZES.values())}"]
    return QuestionSet("mme", version, questions, files.digests_of_many(sources), notes)


def _question(
    image: str, text: str, answer: Any, images: Sequence[ImageSource], origin: str | Path
) -> Question:
    """Return a question; image: its name in the release. Raises: UserError when it is not MME's."""
    category = Path(image).parts[0]
    right = str(answer).strip().lower().rstrip(".")
    if category not in SIZES or right not in ("yes", "no"):
        raise UserError(
            f"{origin}: {image} is no question of MME.",
            f"Its subtask is {category!r}, its answer {answer!r}.",
            f"Subtasks are {', '.join(SIZES)}; answers Yes and No.",
        )
    named = image_id(image)
    details = {"image": named, "shared_id": named, "text": bare(text)}
    asked = text.replace(SINGLE_WORD, "").replace(YES_OR_NO, "").strip() + SINGLE_WORD
    return Question(question_id(image, text), image, asked, tuple(images), category, right, details)


def _from_parquet(tables: Sequence[Path]) -> list[Question]:
    found = []
    for row in files.parquet_rows(tables):
        one = row.values
        image = f"{one['category']}/{Path(str(one['question_id'])).name}"
        found.append(_question(image, one["question"], one["answer"], row.images(), row.path))
    return found


def _from_text(path: Path) -> Iterable[Question]:
    """Yield a text file's two questions; its image lies beside it, or in its subtask's `images`."""
    folder = path.parent
    category = folder.parent if folder.name == "questions_answers_YN" else folder
    places = [category / "images", category] if category != folder else [folder]
    image = next(
        (one for place in places for one in sorted(place.glob(f"{path.stem}.*")) if one != path),
        places[0] / f"{path.stem}.jpg",
    )
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        question, tab, answer = line.strip().partition("\t")
        if not tab:
            raise files.unreadable(path, f"Line {number} has no tab between question and answer.")
        name = image.relative_to(category.parent).as_posix()
        yield _question(name, question, answer, [files.FileImage(str(image))], path)


def _from_jsonl(
    rows: Sequence[Mapping[str, Any]], official: Sequence[Question], folder: Path
) -> list[Question]:
    """Return the questions of Bunny's file with the answers that it, or the release, has."""
    answers = {one.id: one.answer for one in official}
    found = []
    for row in rows:
        image, text = str(row["question_id"]), str(row.get("text") or row["question"])
        if Path(image).parts[0] not in SIZES and row.get("category") in SIZES:
            image = f"{row['category']}/{image}"
        name = question_id(image, text)
        right = row.get("answer", row.get("label", answers.get(name)))
        if right is None:
            raise UserError(
                f"The answer to {name} is not known.",
                f"{len(answers)} questions with answers were found in {folder}.",
                f"Put {RELEASE} beside the JSONL file.",
            )
        source = files.FileImage(str(folder / str(row.get("image", image))))
        found.append(_question(image, text, right, [source], folder))
    return found


def _release(folder: Path) -> Path | None:
    """Return the folder that has the subtasks' folders: this one, or one below it."""
    below = (folder / RELEASE, folder / RELEASE / "MME_Benchmark", *sorted(folder.glob("*/")))
    for place in (folder, *below):
        if any((place / name).is_dir() for name in SIZES):
            return place
    return None


def _text_files(release: Path) -> list[Path]:
    found: list[Path] = []
    for name in SIZES:
        here = release / name
        inner = here / "questions_answers_YN"
        found += sorted((inner if inner.is_dir() else here).glob("*.txt"))
    return found


LAYOUTS = (
    f"{RELEASE}/ (SUBTASK/*.txt with its images, or SUBTASK/questions_answers_YN/ and images/)",
    f"bunny_mme.jsonl, alone with an `answer` a row, or with {RELEASE}/ beside it",
    "parquet of the hub: question_id, image, question, answer, category",
)

BENCHMARK = Benchmark(
    name="mme",
    title="MME",
    read=read,
    score=score,
    columns={"MME-P": "perception", "MME-C": "cognition"},
    answer_id=answer_id,
    layouts=LAYOUTS,
)
