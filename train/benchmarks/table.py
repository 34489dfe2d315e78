"""The benchmarks by name. Each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from manifests.errors import UserError
from train.benchmarks.contract import Benchmark, QuestionSet

MODULES = {
    "mme": "train.benchmarks.mme",
    "pope": "train.benchmarks.pope",
    "gqa": "train.benchmarks.gqa",
    "vqav2": "train.benchmarks.vqav2",
    "scienceqa": "train.benchmarks.scienceqa",
    "mmmu": "train.benchmarks.mmmu",
    "mmmu-test": "train.benchmarks.mmmu:TEST",
    "seed": "train.benchmarks.seed",
    "mmbench": "train.benchmarks.mmbench",
    "mmbench-test": "train.benchmarks.mmbench:TEST",
    "mmvet": "train.benchmarks.mmvet",
    "demo": "train.benchmarks.demo",
}
_SPELLINGS = {
    **dict.fromkeys(("sqa", "sqa-i", "sqa-img", "science-qa", "scienceqa-img"), "scienceqa"),
    **dict.fromkeys(("seedbench", "seed-bench", "seed-bench-1"), "seed"),
    **dict.fromkeys(("vqa", "vqa-v2", "vqav2-val"), "vqav2"),
    "mm-vet": "mmvet",
}
_SPLITS = {"mmbench-dev": f"{MODULES['mmbench']}:DEV", "mmmu-val": f"{MODULES['mmmu']}:VAL"}


def benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name, in any case, or as others spell it ("SEED-Bench").

    Raises: UserError when there is none of that name.
    """
    plain = name.lower().replace("_", "-")
    plain = _SPELLINGS.get(plain, plain)
    place = {**MODULES, **_SPLITS}.get(plain)
    if place is None:
        raise UserError(
            f"There is no benchmark {name!r}.", f"Known: {', '.join(MODULES)}.", "Name one of them."
        )
    module, _, attribute = place.partition(":")
    found: Benchmark = getattr(import_module(module), attribute or "BENCHMARK")
    return found


def read_questions(found: Benchmark, path: str) -> QuestionSet:
    """Return a benchmark's questions from its files, in any of its layouts.

    Raises: UserError when there are none, or when a row lacks a field or has one of another form.
    """
    fix = f"Give one of: {'; '.join(found.layouts)}."
    try:
        questions = found.read(path)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is no layout of {found.title} that is known.", why, fix) from error
    if not questions.questions:
        raise UserError(f"{path} holds no questions of {found.title}.", "", fix)
    return questions
