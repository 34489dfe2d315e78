"""Every benchmark from its native files and from parquet, by one command, into one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import FILES, rows_of, vqav2_upload
from click.testing import CliRunner
from small_chats import save_talkative_llava

from pipelines.cli import main
from pipelines.demo.language import ASKED_KINDS
from pipelines.demo.train_show import write_answers, write_questions
from pipelines.demo.vlm_questions import held_out
from pipelines.evaluating.table import markdown, table_of
from train.benchmarks.published import COLUMNS, published
from train.benchmarks.table import MODULES, benchmark, read_questions
from train.models.origin import files_hash

FIGURES = {
    **{"mme": ["MME-P", "MME-C"], "pope": ["POPE"], "gqa": ["GQA"], "vqav2": ["VQAv2"]},
    **{"scienceqa": ["SQA-I"], "mmmu": ["MMMU-V"], "seed": ["SEED", "SEED-IMG"]},
    **{"mmbench": ["MMB-D"], "mmvet": []},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_talkative_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["native", "parquet"])
def evaluated(request: Any, tmp_path_factory: pytest.TempPathFactory, model_dir: str) -> Path:
    """The folder of all benchmarks answered by `warren eval --all`; DATA lies beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    for name, kinds in FILES.items():
        kinds[request.param](folder / "data" / name)
    words = ["eval", model_dir, "--all", "--data", str(folder / "data")]
    more = ["--set", "executor=local", "--set", "max_new_tokens=2", "--json"]
    done = CliRunner().invoke(main, [*words, "--out", str(folder / "out"), *more])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((folder / "out/table.json").read_text())
    return folder / "out"


def test_every_question_of_every_benchmark_is_answered(evaluated: Path) -> None:
    for name in FILES:
        asked = read_questions(benchmark(name), str(evaluated.parent / "data" / name)).questions
        answers = rows_of(evaluated / name / "answers.jsonl")
        assert [row["question_id"] for row in answers] == [one.question_id for one in asked]
        assert all(one.images for one in asked if one.category != "text only")


def test_cells_are_the_reports_figures_and_know_what_they_were_made_of(
    evaluated: Path, model_dir: str
) -> None:
    table = json.loads((evaluated / "table.json").read_text())
    assert table["columns"] == list(COLUMNS)
    (ours,) = [row for row in table["rows"] if row["source"] is None]
    wanted = {column for columns in FIGURES.values() for column in columns}
    assert set(ours["cells"]) == wanted
    for name, columns in FIGURES.items():
        report = json.loads((evaluated / name / "report.json").read_text())
        for column in columns:
            cell = ours["cells"][column]
            assert cell["value"] == report["columns"][column]
            assert cell["model"]["hash"] == files_hash(model_dir)
            assert cell["files"] == report["files"] != {}
            assert (cell["profile"], cell["version"]) == ("bunny", report["version"])
    assert "| Bunny-v1.0-3B | 1488.8 | 289.3 | 69.2 |" in (evaluated / "table.md").read_text()


def test_score_of_the_same_answers_gives_the_same_figures(evaluated: Path) -> None:
    for name in ("mme", "mmbench", "vqav2"):
        data = str(evaluated.parent / "data" / name)
        answers = str(evaluated / name / "answers.jsonl")
        words = ["score", name, "--questions", data, "--answers", answers, "--json"]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
        report = json.loads((evaluated / name / "report.json").read_text())
        assert json.loads(done.stdout)["metrics"] == report["metrics"]


def test_rows_of_mmbench_and_scienceqa_are_as_bunny_writes_them(evaluated: Path) -> None:
    row = rows_of(evaluated / "mmbench" / "answers.jsonl")[0]
    assert (row["round_id"], row["options"], row["option_char"]) == (0, ["NA", "None"], ["A", "B"])
    row = rows_of(evaluated / "scienceqa" / "answers.jsonl")[0]
    assert row["prompt"].startswith("<image>\n")
    settings = json.loads((evaluated / "scienceqa" / "run.json").read_text())["settings"]
    assert settings["image_mode"] == "square"


def test_what_a_judge_must_score_has_a_file_and_no_figure(evaluated: Path) -> None:
    report = json.loads((evaluated / "mmvet" / "report.json").read_text())
    assert report["metrics"] == report["columns"] == {}
    assert "no figure" in report["notes"][-1]
    sent = json.loads(Path(report["submission"]).read_text())
    assert sent == {"v1_0": rows_of(evaluated / "mmvet" / "answers.jsonl")[0]["text"]}


def test_vqav2_asks_test_dev_and_uploads_all_of_test2015(tmp_path: Path, model_dir: str) -> None:
    vqav2_upload(tmp_path / "data")
    words = ["eval", model_dir, "--bench", "vqav2", "--data", str(tmp_path / "data")]
    more = ["--set", "executor=local", "--set", "max_new_tokens=2"]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "out"), *more])
    assert done.exit_code == 0, done.output
    assert "2 questions, 1 of 1 chunks to do" in done.stderr
    assert "no figure" in done.stdout
    sent = json.loads((tmp_path / "out/vqav2/submission.json").read_text())
    assert [row["question_id"] for row in sent] == [1, 2, 3, 4]
    assert [bool(row["answer"]) for row in sent[2:]] == [False, False]


def test_the_published_rows_have_a_source_and_known_columns() -> None:
    rows = {one.model: one for one in published()}
    assert len(rows) == 12
    for one in rows.values():
        assert set(one.values) == set(COLUMNS)
        assert one.source.startswith("https://github.com/BAAI-DCAI/Bunny/blob/")
    # As evaluation of Bunny-v1.0-3B is quoted everywhere: SEED of all and of images apart.
    three_b = rows["Bunny-v1.0-3B"].values
    assert (three_b["MME-P"], three_b["SEED"], three_b["SEED-IMG"]) == (1488.8, 62.5, 70.7)


def test_columns_of_benchmarks_are_columns_of_the_table() -> None:
    named = {column for name in MODULES for column in benchmark(name).columns}
    assert named - {"MM-Vet"} == set(COLUMNS)


def test_a_missing_cell_is_blank() -> None:
    lines = markdown(table_of([])).splitlines()
    assert lines[2].startswith("| bunny-phi-1.5-eva-lora | 1213.7 |")
    report = {
        **{"columns": {"GQA": 12.345}, "profile": "lmms", "set": "gqa", "benchmark": "gqa"},
        **{"version": "subset", "items": 1, "files": {}, "warren": "0"},
        "model": {"name": "m", "hash": "1", "adapter": None},
        "unreadable": [],
    }
    (row,) = [line for line in markdown(table_of([report])).splitlines() if "| m (lmms)" in line]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [*[""] * 9, "12.3", "", ""]


def test_what_the_demo_asked_is_a_benchmark_that_score_reads(tmp_path: Path) -> None:
    asked = held_out(2)
    out = str(tmp_path / "benchmark")
    write_questions(asked, out)
    write_answers({"finetuned": [one.answer for one in asked]}, asked, out)
    files = ["--questions", out, "--answers", f"{out}/answers/finetuned.jsonl"]
    done = CliRunner().invoke(main, ["score", "demo", *files, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["metrics"] == {"accuracy": 100.0}
    assert [row["category"] for row in found["tables"]["categories"]] == list(ASKED_KINDS)
    pictures = read_questions(benchmark("demo"), out).questions
    assert [one.images[0].read() for one in pictures] == [one.image for one in asked]


def test_models_of_one_name_and_profiles_have_rows_of_their_own(evaluated: Path) -> None:
    report = json.loads((evaluated / "gqa" / "report.json").read_text())
    other = report | {"model": report["model"] | {"hash": "2"}}
    rows = table_of([report, other, report | {"profile": "lmms"}])["rows"]
    assert [row["model"] for row in rows[:3]] == ["llava", "llava", "llava (lmms)"]
    assert rows[3]["source"]


def test_another_profile_scores_the_same_answers_and_both_stay(
    evaluated: Path, model_dir: str
) -> None:
    words = ["eval", model_dir, "--bench", "pope", "--data", str(evaluated.parent / "data")]
    more = ["executor=local", "max_new_tokens=2", "profile=lmms"]
    sets = [word for one in more for word in ("--set", one)]
    done = CliRunner().invoke(main, [*words, "--out", str(evaluated), *sets])
    assert done.exit_code == 0, done.output
    assert "pope: 6 questions, 0 of 1 chunks to do" in done.stderr
    profiles = {
        name: json.loads((evaluated / "pope" / name).read_text())["profile"]
        for name in ("report.json", "report-lmms.json")
    }
    assert profiles == {"report.json": "bunny", "report-lmms.json": "lmms"}


@pytest.mark.parametrize(("name", "lacks"), [("vqav2", "text"), ("mmmu", "picture")])
def test_files_that_are_enough_to_score_only_are_not_asked(
    tmp_path: Path, model_dir: str, name: str, lacks: str
) -> None:
    folder = tmp_path / name
    FILES[name]["native"](folder)
    if name == "vqav2":
        (folder / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    else:
        rows = [row | {"image_1": None} for row in rows_of(folder / "rows.jsonl")]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "eval",
        model_dir,
        "--bench",
        name,
        "--data",
        str(tmp_path),
        "--out",
        f"{tmp_path}/out",
    ]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert f"3 of 3 questions in {folder} have no {lacks}" in done.stderr
