"""Benchmarks answered: batched as single, stopped as whole, by Ray's workers as here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ray_env import ray_cluster, ray_env  # noqa: F401
from small_chats import save_talkative_llava
from small_questions import save_questions

from manifests.errors import UserError
from pipelines.cli import main
from pipelines.evaluating.run import EvalConfig, evaluate, sets_in
from train.benchmarks.answer_config import AnswerConfig, begin, differences, header_of
from train.benchmarks.contract import Question, QuestionSet
from train.benchmarks.demo import read
from train.benchmarks.run import (
    Chunk,
    answer_chunk,
    chunks_of,
    join_chunks,
    load_chatter,
)
from train.models.origin import files_hash
from train.serve.generate import Chatter

NUM_QUESTIONS = 200
NUM_TOKENS = 8
TOKENS = f"max_new_tokens={NUM_TOKENS}"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_talkative_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_questions(tmp_path_factory.mktemp("data") / "demo", NUM_QUESTIONS)


@pytest.fixture(scope="module")
def config() -> AnswerConfig:
    values = {"image_mode": "pad", "max_new_tokens": NUM_TOKENS, "num_chunks": 1}
    return AnswerConfig.load(values, where="eval")


@pytest.fixture(scope="module")
def chatter(model_dir: str, config: AnswerConfig) -> Chatter:
    return load_chatter(model_dir, config)


@pytest.fixture(scope="module")
def header(model_dir: str, asked: Path, config: AnswerConfig) -> dict[str, Any]:
    return header_of(read(str(asked)), model_dir, config)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def whole(asked: Path) -> Chunk:
    return chunks_of(read(str(asked)).questions, 1)[0]


@pytest.fixture(scope="module")
def answered(
    tmp_path_factory: pytest.TempPathFactory, chatter: Chatter, asked: Path, header: dict[str, Any]
) -> bytes:
    """The bytes of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    assert answer_chunk(chatter, whole(asked), str(out), header, batch_size=8) == NUM_QUESTIONS
    return Path(join_chunks([whole(asked)], str(out))).read_bytes()


def test_batched_answers_are_the_single_ones(
    tmp_path: Path, chatter: Chatter, asked: Path, header: dict[str, Any], answered: bytes
) -> None:
    answer_chunk(chatter, whole(asked), str(tmp_path), header, batch_size=1)
    assert (tmp_path / whole(asked).name).read_bytes() == answered
    texts = [json.loads(line)["text"] for line in answered.splitlines()]
    assert len(set(texts)) > 25
    assert all(texts)


def test_a_line_is_of_bunny_s_schema(
    asked: Path, model_dir: str, answered: bytes, chatter: Chatter
) -> None:
    rows = [json.loads(line) for line in answered.splitlines()]
    told = [json.loads(line) for line in (asked / "questions.jsonl").read_text().splitlines()]
    keys = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert list(rows[0]) == keys
    assert [(row["question_id"], row["prompt"]) for row in rows] == [
        (one["question_id"], one["text"]) for one in told
    ]
    assert {row["model_id"] for row in rows} == {Path(model_dir).name}
    assert len({row["answer_id"] for row in rows}) == NUM_QUESTIONS
    assert chatter.prompts.template.__class__.__name__ == "BunnyTemplate"


def test_a_question_may_add_columns_to_its_line(
    tmp_path: Path, chatter: Chatter, header: dict[str, Any]
) -> None:
    more = {"round_id": 0, "options": ["x", "y"], "option_char": ["A", "B"]}
    question = Question("1", 1, "Which?", details={"row": more})
    answer_chunk(chatter, Chunk(0, 1, [question]), str(tmp_path), header, batch_size=1)
    assert more.items() <= rows_of(tmp_path / "chunks/00000-of-00001.jsonl")[0].items()


@pytest.mark.parametrize("cut_at", [0, 1, 4000, -1])
def test_a_file_that_a_kill_cut_anywhere_ends_the_same(
    tmp_path: Path,
    chatter: Chatter,
    asked: Path,
    header: dict[str, Any],
    answered: bytes,
    cut_at: int,
) -> None:
    chunk = Chunk(0, 1, read(str(asked)).questions[:40])
    expected = b"".join(answered.splitlines(keepends=True)[:40])
    path = tmp_path / chunk.name
    path.parent.mkdir()
    path.write_bytes(expected[:cut_at])
    num_kept = expected[:cut_at].count(b"\n")
    made = answer_chunk(chatter, chunk, str(tmp_path), header, batch_size=3)
    assert made == 40 - num_kept
    assert path.read_bytes() == expected


def test_chunks_are_bunny_s_slices_and_join_in_order(
    tmp_path: Path, chatter: Chatter, asked: Path, header: dict[str, Any], answered: bytes
) -> None:
    chunks = chunks_of(read(str(asked)).questions, 3)
    assert [len(one.questions) for one in chunks] == [67, 67, 66]
    for one in reversed(chunks):
        answer_chunk(chatter, one, str(tmp_path), header, batch_size=16)
    assert Path(join_chunks(chunks, str(tmp_path))).read_bytes() == answered
    assert [len(one.questions) for one in chunks_of(range(5), 4)] == [2, 2, 1, 0]  # type: ignore[arg-type]


def test_an_unfinished_chunk_is_not_joined(tmp_path: Path, asked: Path) -> None:
    with pytest.raises(UserError, match="does not hold an answer to each"):
        join_chunks([whole(asked)], str(tmp_path))


def test_answers_of_someone_else_are_not_gone_on_with(
    tmp_path: Path, chatter: Chatter, asked: Path, header: dict[str, Any]
) -> None:
    chunk = whole(asked)
    (tmp_path / "chunks").mkdir()
    (tmp_path / chunk.name).write_text('{"question_id": 0}\n{"question_id": 7}\n')
    with pytest.raises(UserError, match="line 2 answers another question"):
        answer_chunk(chatter, chunk, str(tmp_path), header, batch_size=8)


def test_a_run_of_other_things_is_refused_with_what_changed(
    tmp_path: Path, header: dict[str, Any]
) -> None:
    begin(str(tmp_path), header)
    begin(str(tmp_path), header)
    other = header | {
        "model": header["model"] | {"hash": "f" * 64},
        "settings": header["settings"] | {"template": "chat"},
    }
    with pytest.raises(UserError) as refused:
        begin(str(tmp_path), other)
    assert "model.hash" in refused.value.why
    assert "settings.template: bunny, now chat" in refused.value.why
    assert len(differences(header, other)) == 2


def test_other_questions_are_another_run(model_dir: str, config: AnswerConfig) -> None:
    one, two = (
        header_of(QuestionSet("demo", "1", [Question("1", 1, text)]), model_dir, config, "hash")
        for text in ("Why?", "How?")
    )
    assert [text.partition(":")[0] for text in differences(one, two)] == ["questions.asked"]


def test_a_question_that_is_too_long_is_named(
    tmp_path: Path, chatter: Chatter, header: dict[str, Any]
) -> None:
    chunk = Chunk(0, 1, [Question("short", 0, "Why?"), Question("long", 1, "Why? " * 500)])
    with pytest.raises(UserError, match="Question long: The conversation has"):
        answer_chunk(chatter, chunk, str(tmp_path), header, batch_size=8)


@pytest.mark.parametrize(("spoil", "told"), [("cut", "picture of question 0"), ("lose", "images")])
def test_a_picture_that_cannot_be_read_stops_the_run(
    tmp_path: Path, chatter: Chatter, header: dict[str, Any], spoil: str, told: str
) -> None:
    folder = save_questions(tmp_path / "demo", 3)
    picture = folder / "images/0.png"
    if spoil == "cut":
        picture.write_bytes(picture.read_bytes()[:50])
    else:
        picture.unlink()
    with pytest.raises(UserError, match=told):
        answer_chunk(chatter, whole(folder), str(tmp_path), header, batch_size=8)


STOPPED = """
import sys
from pipelines.cli import main
main(sys.argv[1:])
"""


def command(model_dir: str, data: Path, out: Path, *more: str) -> list[str]:
    words = ["eval", model_dir, "--bench", "demo", "--data", str(data), "--out", str(out)]
    return [*words, *(word for one in more for word in ("--set", one))]


def test_a_killed_run_ends_with_the_bytes_of_a_whole_one(
    tmp_path: Path, model_dir: str, asked: Path, answered: bytes
) -> None:
    words = command(model_dir, asked, tmp_path, "executor=local", TOKENS, "num_chunks=2")
    path = tmp_path / "demo/chunks/00000-of-00002.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, *words], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        until = time.monotonic() + 40
        while not (path.exists() and path.stat().st_size) and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    num_done = path.read_bytes().count(b"\n")
    assert 0 < num_done <= NUM_QUESTIONS // 2
    assert not (tmp_path / "demo/answers.jsonl").exists()
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "demo/answers.jsonl").read_bytes() == answered


def test_the_command_prints_the_report_and_knows_what_it_was_made_of(
    tmp_path: Path, model_dir: str
) -> None:
    data = save_questions(tmp_path / "data" / "demo", 9).parent
    words = command(model_dir, data, tmp_path / "out", "executor=local", "max_new_tokens=3")
    done = CliRunner().invoke(main, [*words, "--json"])
    assert done.exit_code == 0, done.output
    (report,) = json.loads(done.stdout)
    assert report["metrics"] == {"accuracy": 0.0}
    assert report["items"] == 9
    assert report["model"]["hash"] == files_hash(model_dir)
    assert list(report["files"]) == ["questions.jsonl"]
    shown = CliRunner().invoke(main, words)
    assert "kind 0" in shown.stdout
    assert "0 of 1 chunks" in shown.stderr
    refused = CliRunner().invoke(main, [*words, "--set", "batch_size=3"])
    assert refused.exit_code == 2
    assert "settings.batch_size: 8, now 3" in refused.stderr


def test_the_demo_s_figure_is_the_share_of_right_answers(tmp_path: Path) -> None:
    from train.benchmarks.table import benchmark

    one = benchmark("demo")
    questions = one.read(str(save_questions(tmp_path / "demo", 6)))
    texts = {str(at): " 3\n" if at in (0, 3, 4) else "4" for at in range(6)}
    report = one.score(questions, texts, "bunny")
    assert report.metrics == {"accuracy": 50.0}
    assert [row["accuracy"] for row in report.tables["categories"]] == [100.0, 50.0, 0.0]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ray_s_workers_write_the_same_file(
    tmp_path: Path, model_dir: str, asked: Path, answered: bytes
) -> None:
    values = {"executor": "ray", "num_chunks": 2, "max_new_tokens": NUM_TOKENS}
    config = EvalConfig.load(values, where="eval")
    lines: list[str] = []
    evaluate(model_dir, sets_in(str(asked), ["demo"]), str(tmp_path), config, lines.append)
    assert (tmp_path / "demo/answers.jsonl").read_bytes() == answered
    assert lines[0] == "demo: 200 questions, 2 of 2 chunks to do"


@pytest.mark.parametrize(
    ("names", "told"), [(["nope"], "no benchmark 'nope'"), (["demo", "mme"], "no files of mme")]
)
def test_what_is_not_there_is_told(asked: Path, names: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        sets_in(str(asked.parent), names)


def test_a_setting_that_nobody_reads_is_refused(
    tmp_path: Path, model_dir: str, asked: Path
) -> None:
    words = command(model_dir, asked, tmp_path, "batchsize=3")
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "batch_size" in done.stderr
