"""A few questions of every benchmark in its native files: JSON or TSV, and the hub's parquet.

write(name, kind, folder)     kind: native | parquet
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from score_cases import hub_image, png, write_json, write_jsonl, write_parquet

PNG = png((200, 30, 30))
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
Rows = list[dict[str, Any]]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PNG)


def hub(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_parquet(path, [{**row, "image": hub_image(PNG)} for row in rows])


def mme_native(folder: Path) -> None:
    release = folder / "MME_Benchmark_release_version"
    rows = []
    for subtask in ("count", "code_reasoning"):
        picture(release / subtask / "0001.png")
        asked = [("Is it red?", "Yes"), ("Is it blue?", "No")]
        lines = [f"{text} Please answer yes or no.\t{answer}\n" for text, answer in asked]
        (release / subtask / "0001.txt").write_text("".join(lines))
        name = f"{subtask}/0001.png"
        rows += [{"question_id": name, "image": name, "text": text + SHORT} for text, _ in asked]
    write_jsonl(folder / "bunny_mme.jsonl", rows)


def mme_parquet(folder: Path) -> None:
    rows = [
        {
            **{"question_id": f"{subtask}/0001.png", "category": subtask, "answer": answer},
            "question": f"Is it {colour}? Please answer yes or no.",
        }
        for subtask in ("count", "code_reasoning")
        for colour, answer in (("red", "Yes"), ("blue", "No"))
    ]
    hub(folder / "test-00000-of-00001.parquet", rows)


def pope_native(folder: Path) -> None:
    rows = []
    for base, category in enumerate(("adversarial", "random", "popular")):
        official: Rows = [
            {"question_id": at, "image": f"{at}.jpg", "text": f"Is there a {thing}?", "label": yes}
            for at, (thing, yes) in enumerate([("dog", "yes"), ("cat", "no")], start=1)
        ]
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", official)
        rows += [
            {
                "question_id": base * 10_000_000 + row["question_id"],
                "image": row["image"],
                "text": row["text"] + SHORT,
                "category": category,
            }
            for row in official
        ]
    for at in (1, 2):
        picture(folder / "val2014" / f"{at}.jpg")
    write_jsonl(folder / "bunny_pope_test.jsonl", rows)


def pope_parquet(folder: Path) -> None:
    rows: Rows = [
        {
            **{"id": str(at), "question_id": str(at), "question": f"Is there a {thing}?"},
            **{"answer": yes, "image_source": f"COCO_{at}", "category": category},
        }
        for category in ("adversarial", "random", "popular")
        for at, (thing, yes) in enumerate([("dog", "yes"), ("cat", "no")], start=1)
    ]
    hub(folder / "test-00000-of-00001.parquet", rows)


def _gqa(at: int) -> dict[str, Any]:
    types = {"structural": "query" if at else "verify", "semantic": "attr", "detailed": "x"}
    told = {"question": f"What is it, {at}?", "answer": "red", "imageId": "n1"}
    return told | {"isBalanced": True, "types": types}


def gqa_native(folder: Path) -> None:
    picture(folder / "images" / "n1.jpg")
    write_json(folder / "testdev_balanced_questions.json", {str(at): _gqa(at) for at in range(3)})
    rows = [
        {"question_id": str(at), "image": "n1.jpg", "text": _gqa(at)["question"] + SHORT}
        for at in range(3)
    ]
    write_jsonl(folder / "bunny_gqa_testdev_balanced.jsonl", rows)


def gqa_parquet(folder: Path) -> None:
    rows = [{"id": str(at), **_gqa(at)} for at in range(3)]
    write_parquet(folder / "testdev_balanced_instructions" / "testdev-00000-of-1.parquet", rows)
    hub(folder / "testdev_balanced_images" / "testdev-00000-of-1.parquet", [{"id": "n1"}])


def _vqa_answers() -> Rows:
    return [{"answer": "red", "answer_confidence": "yes", "answer_id": at} for at in range(10)]


def vqav2_native(folder: Path) -> None:
    picture(folder / "val2014" / "COCO_val2014_000000000009.jpg")
    asked = [{"question_id": 90 + at, "image_id": 9, "question": f"Is it {at}?"} for at in range(3)]
    told = [
        {
            **{"question_id": row["question_id"], "image_id": 9, "question_type": "is it"},
            **{"answer_type": "other", "multiple_choice_answer": "red", "answers": _vqa_answers()},
        }
        for row in asked
    ]
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"questions": asked, "data_subtype": "val2014"},
    )
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": told})


def vqav2_parquet(folder: Path) -> None:
    rows: Rows = [
        {
            **{"question_id": 90 + at, "image_id": 9, "question": f"Is it {at}?"},
            **{"question_type": "is it", "answer_type": "other", "answers": _vqa_answers()},
            "multiple_choice_answer": "red",
        }
        for at in range(3)
    ]
    hub(folder / "validation-00000-of-00001.parquet", rows)


def vqav2_upload(folder: Path) -> None:
    """Test2015 of four questions, two of them test-dev's, whose pictures alone are there."""
    name = "COCO_test2015_000000000001.jpg"
    picture(folder / "test2015" / name)
    rows = [
        {"question_id": at, "image": name if at < 3 else "gone.jpg", "text": f"Is it {at}?{SHORT}"}
        for at in range(1, 5)
    ]
    write_jsonl(folder / "bunny_vqav2_mscoco_test2015.jsonl", rows)
    write_jsonl(folder / "bunny_vqav2_mscoco_test-dev2015.jsonl", rows[:2])


def scienceqa_native(folder: Path) -> None:
    picture(folder / "test" / "7" / "image.png")
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None}
    problems = {"7": problem | {"image": "image.png"}, "8": problem}
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": ["7", "8"]})
    text = "Context: N/A\nWhich?\nA. a\nB. b"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "B"}]
    with_image = [{"from": "human", "value": f"<image>\n{text}"}, turns[1]]
    rows = [
        {"id": "7", "image": "7/image.png", "conversations": with_image},
        {"id": "8", "conversations": turns},
    ]
    write_json(folder / "bunny_test_CQM-A.json", rows)


def scienceqa_parquet(folder: Path) -> None:
    rows: Rows = [
        {"question": f"Which, {at}?", "choices": ["a", "b"], "answer": 1, "hint": "", "lecture": ""}
        for at in range(2)
    ]
    hub(folder / "test-00000-of-00001.parquet", rows)


def _mmmu(at: int) -> dict[str, Any]:
    is_open = at == 2
    return {
        "id": f"validation_Art_{at}",
        "question": "Which one in <image 1>?",
        "options": "[]" if is_open else "['x', 'y']",
        "answer": "red" if is_open else "B",
        "question_type": "open" if is_open else "multiple-choice",
        "subfield": "any",
    }


def mmmu_native(folder: Path) -> None:
    picture(folder / "one.png")
    write_jsonl(folder / "rows.jsonl", [{**_mmmu(at), "image_1": "one.png"} for at in range(3)])


def mmmu_parquet(folder: Path) -> None:
    rows = [{**_mmmu(at), "image_1": hub_image(PNG), "image_2": hub_image(PNG)} for at in range(3)]
    write_parquet(folder / "validation-00000-of-00001.parquet", rows)


def _seed(at: int) -> dict[str, Any]:
    choices = {f"choice_{letter}": letter * 2 for letter in "abcd"}
    which = {"data_type": "video" if at == 2 else "image", "data_id": f"{at}.png"}
    told = {"question_id": str(at), "question": f"What is it, {at}?", "answer": "B"}
    return {**told, **which, **choices, "question_type_id": 10 if at == 2 else 1}


def seed_native(folder: Path) -> None:
    for at in (0, 1):
        picture(folder / "SEED-Bench-image" / f"{at}.png")
    picture(folder / "SEED-Bench-video-image" / "10_2.png")
    types = {"Scene Understanding": 1, "Action Recognition": 10}
    rows = [_seed(at) for at in range(3)]
    write_json(folder / "SEED-Bench.json", {"questions": rows, "question_type": types})


def seed_parquet(folder: Path) -> None:
    rows = [{**_seed(at), "image": [hub_image(PNG)]} for at in range(3)]
    write_parquet(folder / "test-00000-of-00001.parquet", rows)


def _mmbench(rotation: int) -> dict[str, Any]:
    return {
        **{"index": 5 + rotation * 1_000_000, "question": "Which?", "hint": "Look.", "A": "NA"},
        **{"B": "None", "answer": "AB"[rotation], "category": "color", "l2-category": "fine"},
        **{"source": "x", "split": "dev"},
    }


def mmbench_native(folder: Path) -> None:
    rows = [{**_mmbench(at), "image": base64.b64encode(PNG).decode()} for at in range(2)]
    lines = ["\t".join(rows[0])] + ["\t".join(map(str, row.values())) for row in rows]
    folder.mkdir(parents=True)
    (folder / "MMBench_DEV_EN_legacy.tsv").write_text("\n".join(lines) + "\n")


def mmbench_parquet(folder: Path) -> None:
    names = {"l2-category": "L2-category"}
    rows = [{names.get(k, k): v for k, v in _mmbench(at).items()} for at in range(2)]
    hub(folder / "dev-00000-of-00001.parquet", rows)


def mmvet_native(folder: Path) -> None:
    picture(folder / "images" / "v1_0.png")
    row = {"imagename": "v1_0.png", "question": "What?", "answer": "red", "capability": ["rec"]}
    write_json(folder / "mm-vet.json", {"v1_0": row})


def mmvet_parquet(folder: Path) -> None:
    told = {"question_id": "v1_0", "question": "What?", "answer": "red", "capability": "rec,ocr"}
    hub(folder / "test-00000-of-00001.parquet", [told])


FILES: dict[str, dict[str, Callable[[Path], None]]] = {
    "mme": {"native": mme_native, "parquet": mme_parquet},
    "pope": {"native": pope_native, "parquet": pope_parquet},
    "gqa": {"native": gqa_native, "parquet": gqa_parquet},
    "vqav2": {"native": vqav2_native, "parquet": vqav2_parquet},
    "scienceqa": {"native": scienceqa_native, "parquet": scienceqa_parquet},
    "mmmu": {"native": mmmu_native, "parquet": mmmu_parquet},
    "seed": {"native": seed_native, "parquet": seed_parquet},
    "mmbench": {"native": mmbench_native, "parquet": mmbench_parquet},
    "mmvet": {"native": mmvet_native, "parquet": mmvet_parquet},
}


def rows_of(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]
