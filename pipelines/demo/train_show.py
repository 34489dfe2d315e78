"""The last part of the demo: train a model on what was curated, and ask it about new pictures."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from manifests import store
from manifests.paths import name_of
from pipelines.demo.vlm_questions import HeldOut, accuracy_by_kind, grey, held_out
from pipelines.show import table_text
from pipelines.training.launch import ready_for_models
from pipelines.training.recipe import TrainingRecipe, load_training
from pipelines.training.run import run_training
from train.benchmarks.demo import QUESTIONS

RECIPE = "warren:recipes/train_demo.yaml"
QUESTIONS_PER_KIND = 20
SHOWN_QUESTIONS = 8
_MAX_ANSWER_TOKENS = 16


def run_train_demo(out: str, *, say: Callable[[str], Any], tell: Callable[[str], Any]) -> None:
    """Train in OUT/model on the shards of OUT/run and OUT/mix, and say what was learned.

    Args: say: is called with results; tell: with lines of progress.
    """
    ready_for_models(quiet=True)
    started = time.monotonic()
    made = run_training(demo_recipe(out), f"{out}/model", say=tell)
    tell("asking about pictures that no stage has seen")
    asked = held_out(QUESTIONS_PER_KIND)
    write_questions(asked, f"{out}/benchmark")
    answers = answers_of(made, asked)
    write_answers(answers, asked, f"{out}/benchmark")
    say(accuracy_table(answers, asked))
    say(answers_table(answers["finetuned"], asked))
    say(_closing(f"{out}/model/{name_of(made['export'])}", time.monotonic() - started))


def demo_recipe(out: str) -> TrainingRecipe:
    """Return the demo's training recipe for the runs that lie in OUT."""
    data = {"pretrain.data": [f"{out}/run"], "finetune.data": [f"{out}/mix"]}
    return load_training(RECIPE, [f"{name}={json.dumps(value)}" for name, value in data.items()])


def answers_of(made: dict[str, str], asked: Sequence[HeldOut]) -> dict[str, list[str]]:
    """Return the answers before finetuning, after it, and after it to grey pictures.

    Args: made: stage -> directory, of a training run.
    """
    from train.models.export import export

    before = Path(made["export"]).parent / f"{name_of(made['pretrain'])}-exported"
    if not (before / "config.json").exists():
        export(made["pretrain"], str(before), dtype="float32")
    return {
        "pretrained": _answers(str(before), asked),
        "finetuned": _answers(made["export"], asked),
        "blind": _answers(made["export"], [grey(one) for one in asked]),
    }


def write_questions(asked: Sequence[HeldOut], out: str) -> None:
    """Write what was asked as files of the benchmark `demo`: questions.jsonl, and its pictures."""
    rows = [
        {
            **{"question_id": at, "image": f"images/{at:03d}.jpg", "text": one.question},
            **{"category": one.kind, "answer": one.answer},
        }
        for at, one in enumerate(asked)
    ]
    for row, one in zip(rows, asked, strict=True):
        store.write(out, str(row["image"]), one.image)
    store.write(out, QUESTIONS, _lines(rows))


def write_answers(answers: dict[str, list[str]], asked: Sequence[HeldOut], out: str) -> None:
    """Write OUT/answers/NAME.jsonl, which `warren score demo` reads."""
    for name, texts in answers.items():
        rows = [
            {"question_id": at, "prompt": one.question, "text": text, "model_id": name}
            for at, (one, text) in enumerate(zip(asked, texts, strict=True))
        ]
        store.write(out, f"answers/{name}.jsonl", _lines(rows))


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _answers(model_dir: str, asked: Sequence[HeldOut]) -> list[str]:
    from train.serve.generate import Decoding, load_model
    from train.serve.prompts import Question

    chatter = load_model(model_dir, decoding=Decoding(max_new_tokens=_MAX_ANSWER_TOKENS))
    questions = [
        Question(one.question, images=(Image.open(io.BytesIO(one.image)).convert("RGB"),))
        for one in asked
    ]
    return chatter.generate_batch(questions, batch_size=64)


def accuracy_table(answers: dict[str, list[str]], asked: Sequence[HeldOut]) -> str:
    """Return the share of right answers by kind of question."""
    found = {name: accuracy_by_kind(some, asked) for name, some in answers.items()}
    rows = [
        (kind, *(f"{100 * found[name][kind]:.0f}%" for name in answers)) for kind in found["blind"]
    ]
    title = f"{QUESTIONS_PER_KIND} questions of each kind about new pictures"
    heads = ("kind", "before finetuning", "after", "after, picture hidden")
    return table_text(title, heads, rows)


def answers_table(answers: Sequence[str], asked: Sequence[HeldOut]) -> str:
    """Return some questions with the model's answers and the true ones."""
    step = max(len(asked) // SHOWN_QUESTIONS, 1)
    rows = [
        (one.question.partition("\n")[0], answer, one.answer)
        for answer, one in list(zip(answers, asked, strict=True))[::step]
    ]
    return table_text("some answers", ("question", "model", "truth"), rows)


def _closing(model: str, seconds: float) -> str:
    return "\n".join(
        [
            f"{seconds:.0f} s for the model.",
            f"  the model        {model}",
            f"  talk to it       warren chat {model} --image PICTURE",
            f"  was it trained on?  warren why {model} 000000012",
        ]
    )
