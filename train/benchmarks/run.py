"""A model's answers to a benchmark's questions, one JSON line each, in Bunny's schema.

    run.json                          what the answers depend on (train.benchmarks.answer_config)
    chunks/00000-of-00004.jsonl       answers to consecutive questions, as they are made
    answers.jsonl                     all of them, in the order of the questions

Lines are written in order, as they come, and a line that a kill cut short is made again. Questions
are generated together by their places alone, so a stopped run ends with the same bytes as a whole
one. (Within a batch no answer depends on the others in float32; in half precision it may.)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from manifests import paths, store
from manifests.errors import UserError
from train.benchmarks.answer_config import AnswerConfig
from train.benchmarks.contract import Question
from train.data.images import ImageDamaged, decode
from train.serve.generate import Chatter, Decoding, load_model
from train.serve.prompts import Question as Asked

ANSWERS = "answers.jsonl"
ROW = "row"
"""Key of Question.details: columns that the answers file of its benchmark has besides, or instead
(MMBench: round_id, options, option_char)."""
_BATCHES_AT_ONCE = 8  # so many batches are sorted by length together


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive questions of a benchmark: the `index`th of `of` slices."""

    index: int
    of: int
    questions: Sequence[Question]

    @property
    def name(self) -> str:
        """The file of its answers, below the run's folder."""
        return f"chunks/{self.index:05d}-of-{self.of:05d}.jsonl"


def chunks_of(questions: Sequence[Question], num_chunks: int) -> list[Chunk]:
    """Return slices of ceil(questions / num_chunks) questions, as Bunny cuts them.

    The last ones may be shorter, or empty.
    """
    size = -(-len(questions) // num_chunks)
    starts = [min(size * at, len(questions)) for at in range(num_chunks + 1)]
    return [
        Chunk(index, num_chunks, questions[start:stop])
        for index, (start, stop) in enumerate(pairwise(starts))
    ]


def load_chatter(model_dir: str, config: AnswerConfig) -> Chatter:
    """Return the model, ready to answer greedily. config: a settled one. Raises: UserError."""
    assert config.image_mode is not None
    assert config.max_new_tokens is not None
    return load_model(
        model_dir,
        adapter=config.adapter,
        device=config.device,
        dtype=config.dtype,
        template=config.template,
        image_mode=config.image_mode,
        decoding=Decoding(max_new_tokens=config.max_new_tokens),
    )


def answer_chunk(
    chatter: Chatter, chunk: Chunk, out: str, header: Mapping[str, Any], *, batch_size: int
) -> int:
    """Write the answers of a chunk that are not there yet; return how many were.

    A second process that answers the same chunk waits for the first, and then goes on behind it.
    Raises: UserError for a picture that cannot be read, a question that the model cannot take, or
    a file of other answers.
    """
    path = Path(out) / chunk.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as file:
        num_done = _cut_torn_tail(file, chunk, str(path))
        size = batch_size * _BATCHES_AT_ONCE
        first = num_done // size * size  # the same questions together as in a whole run
        for start, texts in _answered(chatter, chunk.questions, first, size, batch_size):
            new = list(enumerate(texts, start))[max(num_done - start, 0) :]
            for at, text in new:
                line = json.dumps(answer_row(chunk.questions[at], text, header))
                file.write(line.encode() + b"\n")
                file.flush()
    return len(chunk.questions) - num_done


def answer_row(question: Question, text: str, header: Mapping[str, Any]) -> dict[str, Any]:
    """Return one line of an answers file: Bunny's columns, and those of the question's own.

    answer_id is drawn from what it depends on, so that the same run writes the same file.
    """
    model, benchmark = header["model"], header["benchmark"]
    decides = json.dumps([model["hash"], model["adapter"], benchmark, question.id, text])
    return {
        "question_id": question.question_id,
        "prompt": question.prompt,
        "text": text,
        "answer_id": hashlib.sha256(decides.encode()).hexdigest()[:22],
        "model_id": model["name"],
        "metadata": {},
        **question.details.get(ROW, {}),
    }


def is_finished(chunk: Chunk, out: str) -> bool:
    """Tell whether each question of a chunk has its line."""
    path = Path(out) / chunk.name
    num_lines = path.read_bytes().count(b"\n") if path.exists() else 0
    return num_lines == len(chunk.questions)


def join_chunks(chunks: Sequence[Chunk], out: str) -> str:
    """Write answers.jsonl of finished chunks and return its path.

    Raises: UserError when a chunk is not finished.
    """
    for chunk in chunks:
        if not is_finished(chunk, out):
            raise UserError(
                f"{chunk.name} of {out} does not hold an answer to each of its questions.",
                fix="Give the same command again.",
            )
    parts = [(Path(out) / chunk.name).read_bytes() for chunk in chunks if chunk.questions]
    return paths.join(out, store.write(out, ANSWERS, b"".join(parts)).path)


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read and append, alone; the lock dies with its process."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _cut_torn_tail(file: IO[bytes], chunk: Chunk, path: str) -> int:
    """Leave whole lines only; return how many. Raises: UserError for answers to other questions."""
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    file.truncate(len(whole))
    file.seek(len(whole))
    lines = whole.splitlines()
    for at, line in enumerate(lines):
        expected = chunk.questions[at].question_id if at < len(chunk.questions) else None
        if _question_id(line) != expected:
            raise UserError(
                f"{path}: line {at + 1} answers another question than the {at + 1}th.",
                "Someone else has written into it.",
                "Move it away; its questions are answered anew.",
            )
    return len(lines)


def _question_id(line: bytes) -> Any:
    try:
        return json.loads(line)["question_id"]
    except (ValueError, TypeError, KeyError):
        return None


def _answered(
    chatter: Chatter, questions: Sequence[Question], first: int, size: int, batch_size: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield answers to `size` questions at a time, with the position of the first of them.

    A thread reads and decodes the next questions' pictures meanwhile.
    """
    starts = range(first, len(questions), size)
    slices = (questions[start : start + size] for start in starts)
    for start, asked in zip(starts, _one_ahead(slices), strict=True):
        try:
            yield start, chatter.generate_batch(asked, batch_size=batch_size)
        except UserError as error:
            raise _named(chatter, questions[start : start + size], asked, error) from error


def _one_ahead(slices: Iterable[Sequence[Question]]) -> Iterator[list[Asked]]:
    with ThreadPoolExecutor(max_workers=1) as reader:
        waiting: Future[list[Asked]] | None = None
        for some in slices:
            coming = reader.submit(_with_all_pictures, some)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def _with_all_pictures(questions: Sequence[Question]) -> list[Asked]:
    return [_with_pictures(one) for one in questions]


def _with_pictures(question: Question) -> Asked:
    try:
        return Asked(question.prompt, [decode(one.read()) for one in question.images])
    except ImageDamaged as error:
        raise UserError(
            f"The picture of question {question.id} cannot be read.",
            str(error),
            "Mend the benchmark's files: no figure is made of fewer questions.",
        ) from error


def _named(
    chatter: Chatter, questions: Sequence[Question], asked: Sequence[Asked], error: UserError
) -> UserError:
    """Return the error with the id of the question that caused it, where one did."""
    for question, one in zip(questions, asked, strict=True):
        try:
            chatter.check(one)
        except UserError as found:
            return UserError(f"Question {question.id}: {found.what}", found.why, found.fix)
    return error
