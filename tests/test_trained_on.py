"""Whether a sample, or the very bytes of an image, were trained on: the plan itself answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_inputs import picture
from small_runs import lost, tiny_config, tiny_llava, tiny_mix, told_run, train_here

from manifests.errors import UserError
from train.config import TrainConfig
from train.data.index import Index
from train.data.plan import Columns, plan_hash, walk
from train.models.export import export
from train.models.trained_on import Finding, trained_on

EPOCHS = {"epochs": 3, "seed": 7}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_mix(tmp_path_factory.mktemp("data"), num_rows=12)


@pytest.fixture(scope="module")
def index(data: str) -> Index:
    return Index.load([data])


def truth(
    index: Index,
    config: TrainConfig,
    columns: Columns | None = None,
    rows: np.ndarray | None = None,
) -> dict[str, list[tuple[int, int]]]:
    """Return key -> (epoch, step) of each draw, as the trainer itself walks its plan.

    columns: what is planned by, of only these rows of the index.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    rows = np.arange(len(index)) if rows is None else rows
    steps = walk(
        columns or index.columns(),
        **{"seed": config.seed, "config": config.plan},
        **{"world_size": 1, "num_epochs": config.epochs},
    )
    for step, (plan, cursor) in enumerate(steps):
        for row in rows[plan.batch(cursor.step)]:
            found.setdefault(key_of(index, int(row)), []).append((cursor.epoch, step))
    return found


def the_one(run: str, name: str) -> Finding:
    (found,) = trained_on(run, name)
    return found


def key_of(index: Index, row: int) -> str:
    return str(index.key[row].as_py())


def write_subset(path: Path, uids: np.ndarray) -> str:
    pq.write_table(pa.table({"uid": uids}), path)
    return str(path)


def test_every_draw_of_every_sample_is_told(data: str, index: Index, tmp_path: Path) -> None:
    weights = {"svit": 0.5, "scans": 2.0}
    config = tiny_config("adapter", {"weights": weights, "global_batch_size": 7}, **EPOCHS)
    run = told_run(tmp_path / "run", config, [data])
    expected = truth(index, config)
    counts = set()
    for row in range(len(index)):
        found = the_one(run, key_of(index, row))
        assert list(found.draws) == expected.get(found.key, [])
        assert (found.trained, found.warnings) == (bool(found.draws), ())
        assert (found.run, found.directory) == ("finetune", data)
        assert found.source == index.sources[index.source[row]]
        assert found.uid == index.uid[row]
        named = trained_on(run, str(found.uid))  # the mix copied some samples
        assert found in named
        assert len(named) == (index.uid == index.uid[row]).sum()
        counts.add(len(found.draws))
    assert {1, 2, 3, 6} == counts


def test_rows_outside_the_subset_were_not_trained_on(
    data: str, index: Index, tmp_path: Path
) -> None:
    uids = np.unique(index.uid)[::2]
    subset = write_subset(tmp_path / "subset.parquet", uids)
    config = tiny_config("projector", {"global_batch_size": 5}, **EPOCHS)
    run = told_run(tmp_path / "run", config, [data], subset=subset)
    expected = truth(index.subset(uids), config)
    for row in range(len(index)):
        found = the_one(run, key_of(index, row))
        assert found.trained is (found.uid in uids)
        assert list(found.draws) == expected.get(found.key, [])
        assert found.why == ("" if found.uid in uids else f"not in the subset {subset}")
        assert found.warnings == ()


def test_dropped_and_refused_rows_were_not_trained_on(
    data: str, index: Index, tmp_path: Path
) -> None:
    dropped = [lost(index, 3, "image_damaged"), lost(index, 5, "first_round_too_long", step=-1)]
    config = tiny_config("adapter", {"global_batch_size": 5}, **EPOCHS)
    run = told_run(tmp_path / "run", config, [data], dropped=dropped)
    left = np.setdiff1d(index.uid, index.uid[5])
    expected = truth(index.subset(left), config)  # as if the refused one were not there
    reasons = {int(index.uid[3]): "image_damaged", int(index.uid[5]): "first_round_too_long"}
    for row in range(len(index)):
        found = the_one(run, key_of(index, row))
        reason = reasons.get(int(index.uid[row]))
        why = "" if reason is None else f"dropped: {reason}"
        assert (found.why, found.trained, found.warnings) == (why, not why, ())
        assert list(found.draws) == ([] if why else expected[found.key])


def test_a_plan_by_measured_lengths_is_made_again_by_them(
    data: str, index: Index, tmp_path: Path
) -> None:
    config = tiny_config("adapter", {"global_batch_size": 5}, **EPOCHS)
    subset = write_subset(tmp_path / "subset.parquet", np.unique(index.uid)[1:])
    run = told_run(tmp_path / "run", config, [data], subset=subset)
    chosen = index.subset(np.unique(index.uid)[1:])
    reasons = [None if row != 4 else "first_round_too_long" for row in range(len(chosen))]
    kept = np.delete(np.arange(len(chosen)), 4)
    tokens = np.arange(9, 9 + len(chosen))
    columns = chosen.columns()
    names = ("identity", "num_images", "source")
    rest = {name: getattr(columns, name)[kept] for name in names} | {"tokens": tokens[kept]}
    measured = replace(columns, **rest)
    done = json.loads((tmp_path / "run" / "done.json").read_text())
    done["identity"]["plan"] = plan_hash(measured, seed=config.seed, config=config.plan)
    expected = truth(chosen, config, measured, kept)
    done["steps"] = 1 + max(step for draws in expected.values() for _, step in draws)
    (tmp_path / "run" / "done.json").write_text(json.dumps(done))
    assert the_one(run, key_of(chosen, 0)).warnings
    table = {"tokens": tokens, "num_images": columns.num_images, "reason": reasons}
    pq.write_table(pa.table(table), tmp_path / "run" / "lengths-0123.parquet")
    for row in range(len(chosen)):
        found = the_one(run, key_of(chosen, row))
        assert found.warnings == ()
        assert list(found.draws) == expected.get(found.key, [])
        assert found.why == ("" if row != 4 else "dropped: first_round_too_long")


def test_rows_that_were_never_drawn_are_told_why(data: str, index: Index, tmp_path: Path) -> None:
    plan = {"weights": {"wizard": 0.0}, "global_batch_size": 8, "keep_last": False}
    config = tiny_config("adapter", plan)
    run = told_run(tmp_path / "run", config, [data])
    expected = truth(index, config)
    reasons: dict[str, int] = {}
    for row in range(len(index)):
        found = the_one(run, key_of(index, row))
        assert found.trained is (found.key in expected)
        reasons[found.why] = reasons.get(found.why, 0) + 1
    sources = [index.sources[one] for one in index.source]
    drawable = len(index) - sources.count("wizard")
    assert reasons == {
        "": drawable // 8 * 8,
        "never drawn: its source wizard has the weight 0": sources.count("wizard"),
        "never drawn: it was left over when the last step was full (keep_last: false)": drawable
        % 8,
    }
    assert drawable % 8


def test_an_image_is_met_by_its_bytes_and_not_by_its_size(
    data: str, index: Index, tmp_path: Path
) -> None:
    run = told_run(tmp_path / "run", tiny_config("adapter"), [data])
    row = int(np.flatnonzero(np.diff(index.image_starts) == 2)[0])
    for at, image in enumerate(index.sample(row).images):
        (tmp_path / f"{at}.jpg").write_bytes(image)
        found = trained_on(run, str(tmp_path / f"{at}.jpg"))
        holding = {
            key_of(index, other)
            for other in range(len(index))
            if image in index.sample(other).images
        }
        assert {one.key for one in found} == holding
        assert key_of(index, row) in holding
        assert all(one.trained for one in found)
        other = image[:-3] + bytes([image[-3] ^ 1]) + image[-2:]
        (tmp_path / "other.jpg").write_bytes(other)
        assert len(other) in index.image_size
        assert trained_on(run, str(tmp_path / "other.jpg")) == []
    (tmp_path / "new.png").write_bytes(picture(50, 50, kind="PNG"))
    assert trained_on(run, str(tmp_path / "new.png")) == []


def test_what_no_data_hold_is_not_found(data: str, tmp_path: Path) -> None:
    run = told_run(tmp_path / "run", tiny_config("adapter"), [data])
    for name in ("no such key", "123456789", "9" * 30, str(tmp_path)):
        assert trained_on(run, name) == []


def test_a_model_answers_for_its_pretraining_too(data: str, index: Index, tmp_path: Path) -> None:
    base = tiny_llava(tmp_path)
    first = tiny_config("projector", {"global_batch_size": 7})
    second = tiny_config("adapter", {"max_length": 225}, seed=1)
    train_here(first, base, data, tmp_path / "one")
    train_here(second, base, data, tmp_path / "two", projector=str(tmp_path / "one"))
    model = export(str(tmp_path / "two"), str(tmp_path / "model")).path
    refused = pq.read_table(tmp_path / "two" / "dropped.parquet")["key"].to_pylist()
    assert refused
    for key in [*refused, *(key_of(index, row) for row in range(0, len(index), 7))]:
        before, after = trained_on(model, key)
        assert (before.run, before.run_dir) == ("pretrain", str(tmp_path / "one"))
        assert (after.run, after.run_dir) == ("finetune", str(tmp_path / "two"))
        assert list(before.draws) == truth(index, first)[before.key]
        assert after.why == ("dropped: first_round_too_long" if key in refused else "")
        assert list(after.draws) == ([] if key in refused else truth(index, second)[before.key])
        assert trained_on(str(tmp_path / "two"), before.key) == [before, after]
    assert after.as_json() == {
        **{"run": "finetune", "run_dir": str(tmp_path / "two"), "directory": data},
        **{"key": after.key, "uid": after.uid, "source": after.source, "trained": True, "why": ""},
        **{"draws": [{"epoch": 0, "step": after.draws[0].step}], "warnings": []},
    }
    shutil.rmtree(tmp_path / "one")  # what it was is in the model
    assert trained_on(model, before.key)[0].draws == before.draws


def test_data_that_changed_or_are_gone_give_no_answer(data: str, tmp_path: Path) -> None:
    moved = shutil.copytree(data, tmp_path / "data")
    run = told_run(tmp_path / "run", tiny_config("adapter"), [str(moved)])
    key = key_of(Index.load([data]), 0)
    assert the_one(run, key).trained
    record = json.loads((moved / "record.json").read_text())
    (moved / "record.json").write_text(json.dumps(record | {"fingerprint": "other"}))
    found = the_one(run, key)
    assert found.trained is None
    assert "holds other data than" in found.why
    shutil.rmtree(moved)
    found = the_one(run, key)
    assert (found.trained, found.key) == (None, "")
    assert f"{moved} is not there any more" in found.why


def test_another_plan_than_the_recorded_one_is_warned_of(
    data: str, index: Index, tmp_path: Path
) -> None:
    run = told_run(tmp_path / "run", tiny_config("adapter"), [data])
    done = json.loads((tmp_path / "run" / "done.json").read_text())
    done["identity"]["plan"], done["steps"] = "other", done["steps"] + 1
    (tmp_path / "run" / "done.json").write_text(json.dumps(done))
    warnings = the_one(run, key_of(index, 0)).warnings
    assert len(warnings) == 2
    assert "another hash" in warnings[0]


def test_unfinished_runs_and_foreign_folders_are_refused(data: str, tmp_path: Path) -> None:
    run = told_run(tmp_path / "run", tiny_config("adapter"), [data])
    (tmp_path / "run" / "done.json").unlink()
    with pytest.raises(UserError, match=r"has no done\.json"):
        trained_on(run, "a")
    with pytest.raises(UserError, match=r"neither training\.json nor inputs\.json"):
        trained_on(data, "a")


def test_an_average_answers_for_its_parts_and_names_the_silent_one(
    data: str, index: Index, tmp_path: Path
) -> None:
    runs = {
        name: told_run(tmp_path / name, tiny_config("adapter", seed=seed), [data])
        for seed, name in enumerate("abc")
    }
    told = [
        {**json.loads(Path(runs[one], "done.json").read_text()), "directory": runs[one]}
        for one in runs
    ]
    for run in told:
        run["config"] = json.loads(Path(run["directory"], "config.json").read_text())
        run["inputs"] = json.loads(Path(run["directory"], "inputs.json").read_text())
    silent = {"directory": "/models/silent", "training": None}
    one, two, three = told
    base: Any = {"training": {"runs": [two]}}  # the third was trained on a model that was exported
    parts = [
        {"directory": "/models/1", "training": {"runs": [one]}},
        {"directory": "/models/2", "training": {"runs": [three, one], "base": base}},
        silent,
    ]
    (tmp_path / "training.json").write_text(json.dumps({"parts": parts}))
    found = trained_on(str(tmp_path), key_of(index, 4))
    assert [one.run_dir for one in found] == [*runs.values(), "/models/silent"]
    assert [one.trained for one in found] == [True, True, True, None]
