"""Lengths before planning are those of the rows that are made later, so no budget is exceeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_inputs import picture
from small_llava import NUM_PATCHES, save_language_model, save_tower
from test_train_data import Planted, write_stage

from train.config import TrainConfig
from train.data.batches import batches
from train.data.index import Index, SampleFailed
from train.data.lengths import Measured, exact_columns
from train.data.plan import PlanConfig, make_plan
from train.data.samples import Row, RowMaker
from train.models.compose import compose

MAX_LENGTH = 60
PLAN = {"tokens_per_image": NUM_PATCHES, "max_length": MAX_LENGTH}


def conversation(at: int) -> dict[str, Any]:
    """Return a row of one to three rounds, some too long; every fifth is refused."""
    rng = np.random.default_rng(at)
    said = [
        turn
        for _ in range(1 + at % 3)
        for turn in (
            {"from": "human", "value": "q" * int(rng.integers(1, 6))},
            {"from": "gpt", "value": "a" * int(rng.integers(1, 9))},
        )
    ]
    images = [f"{at}.{k}.jpg" for k in range(at % 3)]
    said[0]["value"] = "<image>" * len(images) + said[0]["value"]
    if at % 5 == 4:
        said[0]["value"] = "a first round over the limit " * 4
        images = []
    return {"id": at, "conversations": said} | ({"images": images} if images else {})


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> str:
    jpg = picture()
    rows: Planted = [
        (100 + at, row, [jpg] * len(row.get("images", [])))
        for at, row in enumerate(map(conversation, range(40)))
    ]
    rows[6] = (106, rows[6][1] | {"images": ["6.jpg"]}, [])  # no placeholder: refused
    lost = rows[7][1]
    rows[7] = (107, lost, [])  # its image is not in the shard
    return write_stage(tmp_path_factory.mktemp("stage") / "mix", rows)


@pytest.fixture(scope="module")
def make_row(tmp_path_factory: pytest.TempPathFactory) -> RowMaker:
    folder = tmp_path_factory.mktemp("model")
    tower, lm = save_tower(folder / "tower"), save_language_model(folder / "lm", "qwen2")
    model_dir = compose(str(tower), str(lm), str(folder / "llava")).path
    values = {"stage": "projector", "template": "bunny", "projector_lr": 1e-3, "plan": PLAN}
    config = TrainConfig.load(values, where="train")
    return short_of(RowMaker.load(model_dir, config, image_token_id=300))


def short_of(made: RowMaker) -> RowMaker:
    """Return the same with a short system turn, as the tiny tokenizer has a token a byte."""
    template: Any = made.template
    object.__setattr__(template, "system", "S")
    return made


def measured_by(make_row: RowMaker, stage: str, folder: Path, num_workers: int = 0) -> Measured:
    key = make_row.measures_by
    index = Index.load([stage])
    return exact_columns(index, make_row.measure, str(folder), key=key, num_workers=num_workers)


def test_lengths_and_refusals_are_those_of_the_rows(
    make_row: RowMaker, stage: str, tmp_path: Path
) -> None:
    index = Index.load([stage])
    made = [make_row(index.sample(row)) for row in range(len(index))]
    found = measured_by(make_row, stage, tmp_path)
    assert found.refused == {row: one for row, one in enumerate(made) if isinstance(one, str)}
    assert {"first_round_too_long", "image_missing", "placeholder_count"} == {
        *found.refused.values()
    }
    rows = [one for one in made if isinstance(one, Row)]
    config = PlanConfig(tokens_per_image=NUM_PATCHES, max_length=MAX_LENGTH)
    assert found.columns.lengths(config).tolist() == [len(one.ids) for one in rows]
    assert found.columns.num_images.tolist() == [len(one.pixels) for one in rows]
    kept = [100 + row for row in range(len(index)) if row not in found.refused]
    assert found.rows.uid.tolist() == kept
    assert [found.rows.sample(at).uid for at in range(len(kept))] == kept
    in_workers = measured_by(make_row, stage, tmp_path / "workers", num_workers=2)
    assert in_workers.columns.digest == found.columns.digest


def test_lengths_are_measured_once(make_row: RowMaker, stage: str, tmp_path: Path) -> None:
    first = measured_by(make_row, stage, tmp_path)
    index = Index.load([stage])

    def never(_row: Any, _num_images: int) -> str:
        raise AssertionError

    again = exact_columns(index, never, str(tmp_path), key=make_row.measures_by)
    assert again.columns.digest == first.columns.digest
    assert again.refused == first.refused
    for other, key in ((index, "other"), (index.taken(np.arange(3)), make_row.measures_by)):
        with pytest.raises(SampleFailed, match="k100 .* tokenized"):
            exact_columns(other, never, str(tmp_path), key=key)
    assert len(list(tmp_path.iterdir())) == 1


@given(
    st.integers(20, 200),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([1, 2]),
    st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_no_micro_batch_is_over_its_budget_but_a_single_row(
    made: tuple[Measured, list[Row | str]],
    budget: int,
    size: int,
    packing: bool,
    multiple_of: int,
    seed: int,
) -> None:
    found, rows = made
    config = PlanConfig(
        **PLAN,
        tokens_per_micro_batch=budget,
        global_batch_size=size,
        packing=packing,
        micro_batches_multiple_of=multiple_of,
    )
    plan = make_plan(found.columns, seed=seed, epoch=0, config=config, world_size=2)
    for step in range(plan.num_steps):
        for rank in range(2):
            for micro in plan.micro_batches(step, rank):
                lengths = [len(rows[row].ids) for row in micro]  # type: ignore[union-attr]
                tokens = sum(lengths) if packing else max(lengths) * len(lengths)
                assert tokens <= budget or len(lengths) == 1


@pytest.fixture(scope="module")
def made(
    make_row: RowMaker, stage: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Measured, list[Row | str]]:
    found = measured_by(make_row, stage, tmp_path_factory.mktemp("lengths"))
    return found, [make_row(found.rows.sample(row)) for row in range(len(found.rows))]


def test_steps_have_their_full_number_of_rows(
    made: tuple[Measured, list[Row | str]], make_row: RowMaker
) -> None:
    found, _ = made
    config = PlanConfig(**PLAN, global_batch_size=5, keep_last=False)
    plan = make_plan(found.columns, seed=0, epoch=0, config=config, world_size=1)
    counts = np.zeros(plan.num_steps, int)
    for micro in batches(plan, 0, found.rows, make_row, 0):
        counts[micro.step] += sum(isinstance(one, Row) for one in micro.items)
    assert counts.tolist() == [5] * plan.num_steps


def test_what_decides_lengths_is_in_their_key(make_row: RowMaker) -> None:
    first = make_row.measures_by
    assert first == make_row.measures_by
    for name, value in {"max_length": 61, "tokens_per_image": 3, "image_token_id": 301}.items():
        changed = RowMaker(**{**vars(make_row), name: value})
        assert changed.measures_by != first
