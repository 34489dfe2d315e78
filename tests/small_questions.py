"""Questions about noisy pictures, as files of the benchmark `demo`, and a model to answer them."""

from __future__ import annotations

import json
from pathlib import Path

from small_chats import save_pictures

WORDS = ("Why?", "What is on the table, and who put it there?", "Is it so?", "Now then, how many")


def save_questions(folder: Path, number: int) -> Path:
    """Save questions of different lengths about three pictures, each fifth without one."""
    (folder / "images").mkdir(parents=True)
    names = [f"images/{Path(one).name}" for one in save_pictures(folder / "images")]
    rows = [
        {
            "question_id": at,
            "text": f"{at * 7919 % 1000} {WORDS[at % len(WORDS)]}",
            "category": f"kind {at % 3}",
            "answer": "3",
            **({} if at % 5 == 4 else {"image": names[at % 3]}),
        }
        for at in range(number)
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "questions.jsonl").write_text("".join(lines))
    return folder
