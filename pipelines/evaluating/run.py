"""Benchmarks answered by a model over an executor, and scored.

    <out>/<set>/run.json, chunks/, answers.jsonl     see train.benchmarks.run
    <out>/<set>/report.json                          its figures, and what they were made of
    <out>/<set>/submission.json                      what its server takes, where it takes anything

A set is a benchmark's files: a folder of DATA with the benchmark's name, or with that name and an
ending ("mmbench-dev", "mmbench-test"), or DATA itself when one benchmark is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from manifests import paths, store
from manifests.errors import StageFailed, UserError
from pipelines.executors import Executor, Failed, Resources, make_executor
from train.benchmarks import answers
from train.benchmarks.answer_config import HEADER, AnswerConfig, begin, header_of
from train.benchmarks.contract import Benchmark, Profile, Question, QuestionSet, Report, Texts
from train.benchmarks.table import MODULES, benchmark, read_questions

REPORT = "report.json"
"""Of profile bunny; another's is called by it too: report-lmms.json."""
SUBMISSION = "submission"
_TEXT_ONLY = "text only"
"""Category of ScienceQA's questions that have no picture."""
_NO_FIGURES = {"metrics": {}, "tables": {}, "items": 0, "missing": [], "unreadable": []}
Say = Callable[[str], Any]


class EvalConfig(AnswerConfig):
    """How a model is asked, where, and by whose rules its answers are scored."""

    profile: Profile = "bunny"
    """bunny: the rules of the published numbers. lmms: lmms-eval's."""
    executor: Literal["local", "ray"] = "ray"

    def asking(self) -> AnswerConfig:
        """Return what decides the answers."""
        return AnswerConfig(**{name: getattr(self, name) for name in AnswerConfig.model_fields})


@dataclass(frozen=True, slots=True)
class BenchmarkFiles:
    """One benchmark's files, and the name of the folder that its answers go to."""

    label: str
    benchmark: Benchmark
    path: str


def sets_in(data: str, names: Sequence[str] | None) -> list[BenchmarkFiles]:
    """Return the sets of these benchmarks in DATA; of all that are there, for None.

    Raises: UserError for a benchmark that is unknown, or not there.
    """
    found: list[BenchmarkFiles] = []
    for name in MODULES if names is None else names:
        known = benchmark(name)
        here = _folders(data, name) or _folders(data, known.name)
        if not here and names is not None:
            here = {name: _elsewhere(data, name, is_alone=len(names) == 1)}
        found += [BenchmarkFiles(label, known, path) for label, path in here.items()]
    if not found:
        raise _not_there(data, next(iter(MODULES)))
    return found


def _folders(data: str, name: str) -> dict[str, str]:
    """Return DATA/name and DATA/name-*, but for other benchmarks' names; a file may have any end.

    Example: mmbench -> {"mmbench-dev": "data/mmbench-dev"}, without "mmbench-test".
    """
    folder = Path(data)
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    named = {one.stem if one.is_file() else one.name: str(one) for one in entries}
    return {
        label: path
        for label, path in named.items()
        if label == name or (label.startswith(f"{name}-") and label not in MODULES)
    }


def _elsewhere(data: str, name: str, *, is_alone: bool) -> str:
    """Return where a benchmark without a folder of its name is: with its other split, or DATA."""
    both = paths.join(data, name.removesuffix("-test"))
    if paths.exists(both):
        return both
    if not is_alone or not paths.exists(data):
        raise _not_there(data, name)
    return data


def _not_there(data: str, name: str) -> UserError:
    return UserError(
        f"{data} has no files of {name}.",
        f"A benchmark's files are looked for in {data}/NAME, or in {data}/NAME-dev and the like.",
        f"Known names: {', '.join(MODULES)}.",
    )


def evaluate(
    model_dir: str, sets: Sequence[BenchmarkFiles], out: str, config: EvalConfig, say: Say
) -> list[dict[str, Any]]:
    """Answer and score sets in OUT, or go on with that; return their reports, JSON-ready.

    say: takes lines of progress. Raises: UserError; StageFailed when a chunk failed for good.
    """
    if not paths.is_local(out):
        raise UserError(
            f"--out {out} is on an object store.",
            "Answers are files that grow line by line.",
            "Choose a local folder.",
        )
    from train.models.origin import files_hash

    model_dir, out = paths.absolute(model_dir), paths.absolute(out)
    config = config.located()
    model_hash = files_hash(model_dir)
    executor = make_executor(config.executor)
    try:
        return [_one(model_dir, one, out, config, model_hash, executor, say) for one in sets]
    finally:
        executor.close()


def _one(
    model_dir: str,
    files: BenchmarkFiles,
    out: str,
    config: EvalConfig,
    model_hash: str,
    executor: Executor,
    say: Say,
) -> dict[str, Any]:
    from train.benchmarks.run import chunks_of, is_finished, join_chunks

    asked = files.benchmark
    questions = read_questions(asked, files.path)
    to_ask = needed(questions.questions)
    _check_can_be_asked(files, to_ask)
    settled = config.asking().settled(asked.asking, len(to_ask))
    header = header_of(questions, model_dir, settled, model_hash)
    folder = paths.join(out, files.label)
    begin(folder, header)
    chunks = chunks_of(to_ask, settled.num_chunks or 1)
    todo = [one for one in chunks if not is_finished(one, folder)]
    say(f"{files.label}: {len(to_ask)} questions, {len(todo)} of {len(chunks)} chunks to do")
    worker = Answerer(model_dir, settled, folder, header)
    resources = Resources(
        num_cpus=settled.num_threads,
        num_gpus=0 if settled.device == "cpu" else executor.gpus_per_worker(),
    )
    failures = []
    for at, one in enumerate(executor.map(worker, todo, resources), start=1):
        if isinstance(one, Failed):
            failures.append(one)
        say(f"{files.label}: {at} of {len(todo)} chunks")
    if failures:
        raise _failed(files.label, failures)
    join_chunks(chunks, folder)
    return report_of(files, questions, folder, config.profile, trained_on(model_dir))


def _check_can_be_asked(files: BenchmarkFiles, questions: Sequence[Question]) -> None:
    """Raises: UserError for files of answers alone, and for questions that lack their picture."""
    untold = [one.id for one in questions if not one.details.get("text", one.prompt).strip()]
    blind = [one.id for one in questions if not one.images and one.category != _TEXT_ONLY]
    if not untold and (not blind or files.benchmark.name == "demo"):
        return
    what, some = ("text", untold) if untold else ("picture", blind)
    raise UserError(
        f"{len(some)} of {len(questions)} questions in {files.path} have no {what}: {some[0]}.",
        "These files are enough to score answers, and not to ask for them.",
        f"Give one of: {'; '.join(files.benchmark.layouts)}.",
    )


def needed(questions: Sequence[Question]) -> Sequence[Question]:
    """Return the questions to ask: those that are not `optional`, all where there are no others.

    VQAv2's upload holds test2015 whole, of which only test-dev is scored.
    """
    return [one for one in questions if not one.details.get("optional")] or questions


def trained_on(model_dir: str) -> list[str]:
    """Return the fingerprints of the data that a model was trained on, as far as it tells."""
    from train.models.provenance import TRAINING, runs_in

    runs = runs_in(store.read_json(paths.join(model_dir, TRAINING)))
    return sorted({one for run in runs for one in run["identity"]["data"]})


@dataclass(frozen=True, slots=True)
class Answerer:
    """Made on the driver, called on a worker: loads the model there, returns what answers."""

    model_dir: str
    config: AnswerConfig
    out: str
    header: dict[str, Any]

    def __call__(self) -> Callable[[Any], int]:
        """Return the function from chunk to the number of answers that were made."""
        from pipelines.training.launch import ready_for_models

        ready_for_models(quiet=True)
        from train.benchmarks.run import load_chatter

        return partial(self._do, load_chatter(self.model_dir, self.config))

    def _do(self, chatter: Any, chunk: Any) -> int:
        from train.benchmarks.run import answer_chunk

        size = self.config.batch_size
        with _threads(self.config.num_threads):
            return answer_chunk(chatter, chunk, self.out, self.header, batch_size=size)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch use so many threads of the CPU: another number may round otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _failed(label: str, failures: Sequence[Failed[Any]]) -> StageFailed:
    first = failures[0]
    told = f"{first.error_class}: {first.message} (tried {first.attempts} times)"
    return StageFailed(
        f"{label}: {len(failures)} chunks failed, {first.item.name} with {told}. "
        "What was answered is kept; the same command goes on."
    )


def report_of(
    files: BenchmarkFiles,
    questions: QuestionSet,
    folder: str,
    profile: Profile,
    training_data: Sequence[str],
) -> dict[str, Any]:
    """Score a folder's answers.jsonl; write report.json, and the server's file if there is one.

    Returns the report, JSON-ready: a benchmark's figures, and of which model, trained on what
    data, by which files, edition and profile. A benchmark that only its server, or a judge, can
    score has no figures; its notes say why. Raises: UserError when an answer is missing.
    """
    matched = _matched(files.benchmark, questions, folder)
    header = store.read_json(paths.join(folder, HEADER))
    found: dict[str, Any] = {
        "set": files.label,
        "benchmark": files.benchmark.name,
        "title": files.benchmark.title,
        "version": questions.version,
        "profile": profile,
        "columns": {},
        "files": dict(questions.files),
        "model": {**header["model"], "training_data": list(training_data)},
        "settings": header["settings"],
        "empty": list(matched.empty),
        "warren": version("warren"),
    }
    scored, unscored = _scored(files.benchmark, questions, matched.texts, profile)
    found |= asdict(scored) if scored else dict(_NO_FIGURES)
    found["columns"] = _columns(files.benchmark, found["metrics"])
    found["submission"], unwritten = _submitted(files.benchmark, questions, matched.texts, folder)
    notes = [*questions.notes, *matched.notes, *(scored.notes if scored else ())]
    found["notes"] = list(dict.fromkeys([*notes, *unscored, *unwritten]))
    name = REPORT if profile == "bunny" else REPORT.replace(".", f"-{profile}.")
    store.write_json(folder, name, found)
    return found


def _matched(one: Benchmark, questions: QuestionSet, folder: str) -> answers.Answers:
    from train.benchmarks.run import ANSWERS

    asked = replace(questions, questions=needed(questions.questions))
    path = paths.join(folder, ANSWERS)
    answers.load(path, asked, one.answer_id)  # none of these may be missing
    return answers.load(path, questions, one.answer_id, allow_missing=True)


def _scored(
    one: Benchmark, questions: QuestionSet, texts: Texts, profile: Profile
) -> tuple[Report | None, list[str]]:
    """Return the report, or None and why. Raises: UserError where no server can score either."""
    try:
        return one.score(questions, texts, profile), []
    except UserError as error:
        if one.submission is None:
            raise
        return None, [f"no figure: {error.what} {error.fix}"]


def _columns(one: Benchmark, metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: metrics[metric] for name, metric in one.columns.items() if metric in metrics}


def _submitted(
    one: Benchmark, questions: QuestionSet, texts: Texts, folder: str
) -> tuple[str | None, list[str]]:
    """Write what the server takes; return its path, or None and why there is none."""
    if one.submission is None:
        return None, []
    name = SUBMISSION + one.submission_suffix
    try:
        store.write(folder, name, one.submission(questions, texts))
    except UserError as error:
        return None, [f"no file for the server: {error.what} {error.fix}"]
    return paths.join(folder, name), []
