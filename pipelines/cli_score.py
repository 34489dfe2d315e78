"""Commands about answers files: a benchmark's figures, and the file that its server takes."""

from __future__ import annotations

import click

from pipelines.cli_options import answer as print_answer
from pipelines.cli_options import json_flag

_questions = click.option(
    "--questions", required=True, metavar="FILE|DIR", help="The benchmark's own files."
)
_answers = click.option(
    "--answers", required=True, metavar="FILE", help="JSON lines with question_id and text."
)
_allow_missing = click.option(
    "--allow-missing",
    is_flag=True,
    help="Questions without an answer count as wrong.",
)


@click.command()
@click.argument("name", metavar="BENCH")
@_questions
@_answers
@click.option(
    "--profile",
    type=click.Choice(["bunny", "lmms"]),
    default="bunny",
    show_default=True,
    help="Rules: of Bunny's published numbers, or lmms-eval's.",
)
@_allow_missing
@json_flag
def score(
    name: str, questions: str, answers: str, profile: str, allow_missing: bool, as_json: bool
) -> None:
    """Score any model's answers to a benchmark from files on disk.

    BENCH is one of mme, pope, gqa, vqav2, scienceqa, mmmu, mmmu-test, seed, mmbench, mmbench-test,
    mmvet, demo; SEED-Bench, mm-vet, mmbench-dev and the like are understood, too. Its files may be
    the official ones, Bunny's JSON lines, or the hub's parquet, with or without their pictures;
    train/README.md lists them. No figure is printed, and the exit code is 2, when answers are
    missing, double or of other questions.

    Example: warren score pope --questions benchmarks/pope --answers answers.jsonl
    """
    from pipelines.scoring import PROFILES, report_text
    from pipelines.scoring import score as report_of

    found = report_of(name, questions, answers, PROFILES[profile], allow_missing=allow_missing)
    print_answer(found, as_json, report_text)


@click.command()
@click.argument("name", metavar="BENCH")
@_questions
@_answers
@click.option("--out", required=True, metavar="FILE", help="The file to write.")
@_allow_missing
@json_flag
def submission(
    name: str, questions: str, answers: str, out: str, allow_missing: bool, as_json: bool
) -> None:
    """Write the file that a benchmark's server takes (vqav2, mmbench, mmmu, mmvet, seed).

    Example: warren submission vqav2 --questions vqav2 --answers answers.jsonl --out upload.json
    """
    from pipelines.scoring import submission_text, write_submission

    found = write_submission(name, questions, answers, out, allow_missing=allow_missing)
    print_answer(found, as_json, submission_text)


COMMANDS = (score, submission)
