"""The model in lmms-eval itself, where that is installed; see train/README.md for a lean way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from benchmark_files import mme_parquet
from datasets import Dataset
from datasets import Image as HubImage
from PIL import Image
from small_chats import save_talkative_llava

from manifests.errors import UserError

lmms_eval = pytest.importorskip("lmms_eval", reason="the extra `lmms` is not installed")

from pipelines.evaluating.lmms_plugin import (  # noqa: E402
    WarrenModel,
    manifest,
    write_task,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> WarrenModel:
    folder = tmp_path_factory.mktemp("model")
    return WarrenModel(save_talkative_llava(folder), batch_size="2", max_batch_size=None)


def request(context: str, wanted: dict[str, Any], shown: list[Any]) -> Any:
    return SimpleNamespace(args=(context, wanted, lambda doc: shown, 0, "task", "test"))


def test_requests_get_the_model_s_own_answers_cut_where_the_task_says(model: WarrenModel) -> None:
    from train.serve.generate import Decoding
    from train.serve.prompts import Question

    model.task_dict = {"task": {"test": [{}]}}
    picture = Image.new("RGBA", (20, 30), (200, 10, 10, 255))
    long, short = {"max_new_tokens": 12, "until": ["\n\n"]}, {"max_new_tokens": 3}
    asked = [request(text, wanted, [picture]) for text in "abc" for wanted in (long, short)]
    shown = picture.convert("RGB")
    expected = [
        model.chatter.answer(
            Question(text, [shown]), Decoding(max_new_tokens=wanted["max_new_tokens"])
        ).partition("\n\n")[0]
        for text in "abc"
        for wanted in (long, short)
    ]
    assert model.generate_until(asked) == expected
    mark = expected[0][1]
    cut = request("a", {"max_new_tokens": 12, "until": [mark]}, [picture])
    assert model.generate_until([cut]) == [expected[0].partition(mark)[0]]


def test_what_it_cannot_do_it_says(model: WarrenModel) -> None:
    model.task_dict = {"task": {"test": [{}]}}
    with pytest.raises(UserError, match="compares likelihoods"):
        model.loglikelihood([])
    with pytest.raises(UserError, match="several rounds"):
        model.generate_until_multi_round([])
    with pytest.raises(UserError, match="several beams"):
        model.generate_until([request("a", {"num_beams": 5}, [])])
    with pytest.raises(UserError, match="something else than pictures"):
        model.generate_until([request("a", {}, ["clip.mp4"])])
    with pytest.raises(UserError, match=r"Unknown: beam\."):
        WarrenModel("nowhere", beam=3)


def test_a_task_reads_local_parquet_files_and_the_harness_scores_them(
    tmp_path: Path, model: WarrenModel
) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    mme_parquet(tmp_path / "raw")
    rows = pq.read_table(next((tmp_path / "raw").glob("*.parquet"))).to_pylist()
    (tmp_path / "mme").mkdir()  # as the hub has it: the file says which column is a picture
    Dataset.from_list(rows).cast_column("image", HubImage()).to_parquet(
        tmp_path / "mme" / "test-00000-of-00001.parquet"
    )
    assert write_task("mme", str(tmp_path / "mme"), str(tmp_path / "tasks")) == "warren_mme"
    found = simple_evaluate(
        model=model,
        tasks=["warren_mme"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )
    assert found["results"]["warren_mme"]["mme_perception_score,none"] == 0.0
    samples = found["samples"]["warren_mme"]
    assert len(samples) == 4
    assert manifest().simple_class_path.endswith(".WarrenModel")


def test_a_task_without_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Use `warren eval`"):
        write_task("mme", str(tmp_path), str(tmp_path))
