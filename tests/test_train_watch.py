"""What a run says of itself: FLOPs against torch's own counter, dropped rows, subsets, the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_llava import NUM_PATCHES
from small_runs import (
    small_clip_phi,  # noqa: F401 - a fixture
    small_data,  # noqa: F401 - a fixture
    small_model,  # noqa: F401 - a fixture
)
from torch.utils.flop_counter import FlopCounterMode

from manifests import store
from manifests.errors import UserError
from train.config import TrainConfig
from train.data.index import Index
from train.data.plan import make_plan
from train.data.samples import Row
from train.learn.dropped import DROPPED, SCHEMA, DroppedRows, cut_dropped, write_dropped
from train.learn.flops import ModelFlops, counts_of, peak_flops
from train.learn.lines import read_lines
from train.learn.log import LOG, RunLog, clock, line_of, scalars, tensorboard_writer
from train.learn.model import TrainedLlava
from train.learn.run import DONE, INPUTS, train


def config_of(stage: str, plan: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": stage,
        "template": "bunny",
        "projector_lr": 1e-3,
        "lora": {"rank": 2, "alpha": 4},
        "plan": {
            **{"global_batch_size": 5, "tokens_per_micro_batch": 600},
            **{"tokens_per_image": NUM_PATCHES, "max_length": 225},
            **(plan or {}),
        },
    }
    return TrainConfig.load(values | changes, where="train")


@pytest.mark.parametrize("stage", ["projector", "adapter"])
@pytest.mark.parametrize("composed", ["model_dir", "clip_phi"])
def test_flops_are_those_that_torch_counts(
    composed: str, stage: str, request: pytest.FixtureRequest
) -> None:
    config = config_of(stage, lora={"rank": 2, "dropout": 0.0})
    model = TrainedLlava.load(request.getfixturevalue(composed), config)
    model.llava.set_attn_implementation("eager")  # matrix products that the counter sees
    model.llava.config.vision_feature_layer = -1  # the last layer of the tower is computed anyhow
    flops = ModelFlops.of(model, config)
    rng, length, rows = np.random.default_rng(0), 60, 3
    ids = rng.integers(0, 255, (rows, length))
    ids[:2, :NUM_PATCHES] = model.llava.config.image_token_id
    labels = np.where(rng.random(ids.shape) < 0.3, ids, -100)
    labels[:, :NUM_PATCHES] = -100
    pixels = rng.standard_normal((2, 3, 16, 16), np.float32)
    tensors = (torch.from_numpy(one) for one in (ids, labels, pixels))
    counted = FlopCounterMode(display=False)
    with counted:
        losses, _ = model.losses(*tensors)
        forward = counted.get_total_flops()
        losses.sum().backward()
    backward = counted.get_total_flops() - forward
    counts = np.array([ids.size, rows * length**2, (labels[:, 1:] != -100).sum(), 2.0])
    assert flops.forward @ counts == pytest.approx(forward, rel=0.02)
    assert flops.backward @ counts == pytest.approx(backward, rel=0.02)


def test_layers_computed_again_are_in_what_is_computed_alone(model_dir: str) -> None:
    model = TrainedLlava.load(model_dir, config_of("projector"))
    plain = ModelFlops.of(model, config_of("projector"))
    again = ModelFlops.of(model, config_of("projector", gradient_checkpointing=True))
    counts = np.array([10.0, 55, 3, 1])
    assert plain.needed(counts) == plain.computed(counts) == again.needed(counts)
    more = plain.forward[:2] @ counts[:2]
    assert again.computed(counts) == pytest.approx(plain.needed(counts) + more)


def test_pairs_of_tokens_are_those_below_the_diagonal() -> None:
    labels = [np.array([7, 7, -100, 7, 7]), np.array([-100, 7])]
    rows = [Row(one, one, np.zeros((at, 3, 2, 2), np.float32)) for at, one in enumerate(labels)]
    own, padded = counts_of(rows)
    assert own.tolist() == [7, 15 + 3, 3 + 1, 1]
    assert padded.tolist() == [10, 15 + 15, 3 + 1, 1]
    assert counts_of([])[0].tolist() == [0, 0, 0, 0]
    assert counts_of(rows, packing=True)[1].tolist() == own.tolist()
    assert counts_of(rows, dummy_images=True)[1].tolist() == [10, 15 + 15, 3 + 1, 1 + 1]


def test_every_row_of_an_epoch_is_trained_or_told_of(
    model_dir: str, data: str, tmp_path: Path
) -> None:
    estimated = {"lengths": "estimate"}  # else no row would be dropped while it trains
    config, index = config_of("projector", estimated, epochs=2), Index.load([data])
    said: list[str] = []
    train(config, model_dir, [data], str(tmp_path), say=said.append)
    log, done = read_lines(f"{tmp_path}/{LOG}"), json.loads((tmp_path / DONE).read_text())
    table = store.read_table(f"{tmp_path}/{DROPPED}")
    drawn = 0
    for epoch in range(2):
        plan = make_plan(index.columns(), seed=0, epoch=epoch, config=config.plan, world_size=1)
        drawn += sum(len(plan.batch(step)) for step in range(plan.num_steps))
    assert done["rows"] + done["dropped"] == drawn
    assert table.num_rows == done["dropped"] == sum(one["dropped"] for one in log) > 0
    assert table.schema.equals(SCHEMA)
    for one in log:
        told = [row for row in table.to_pylist() if row["step"] == one["step"]]
        assert len(told) == one["dropped"] == sum(one["dropped_reasons"].values())
        assert {row["epoch"] for row in told} <= {one["epoch"]}
    for row in table.to_pylist():
        at = int(np.flatnonzero(index.uid == row["uid"])[0])
        assert (row["key"], row["directory"]) == (index.key[at].as_py(), data)
        assert row["source"] == index.sources[index.source[at]]
        assert row["reason"] == "first_round_too_long"
    assert not [*tmp_path.glob("dropped-*")]
    assert said[-1].startswith(f"step {len(log)}/{len(log)}, loss ")
    assert all(0 < one["mfu"] <= one["hfu"] and one["memory_bytes"] > 0 for one in log)


def test_dropped_rows_of_all_ranks_are_cut_to_a_step(data: str, tmp_path: Path) -> None:
    index = Index.load([data])
    for out in (str(tmp_path), "memory://dropped"):
        first, second = (DroppedRows(out, rank, index) for rank in (0, 1))
        first.add([(0, "image_damaged")], epoch=0, step=3)
        second.add([(1, "no_round"), (2, "no_round")], epoch=0, step=4)
        first.add([(3, "no_round")], epoch=1, step=5)
        second.add([], epoch=1, step=5)
        cut_dropped(out, 5)
        DroppedRows(out, 1, index).add([(4, "no_round")], epoch=1, step=5)
        assert write_dropped(out, index, {}) == 4
        rows = store.read_table(f"{out}/{DROPPED}").to_pylist()
        assert [row["step"] for row in rows] == [3, 4, 4, 5]
        assert {row["uid"] for row in rows} == {int(index.uid[at]) for at in (0, 1, 2, 4)}
    fsspec.filesystem("memory").rm("/dropped", recursive=True)


def test_a_subset_is_trained_alone_and_named_by_its_uids(
    model_dir: str, data: str, tmp_path: Path
) -> None:
    uids = np.unique(Index.load([data]).uid)[:12]
    for name, order in (("one", uids), ("other", uids[::-1]), ("less", uids[1:])):
        pq.write_table(pa.table({"uid": order}), tmp_path / f"{name}.parquet")
    config = config_of("projector", {"max_length": 300}, checkpoint_every_steps=1)
    stopped = tmp_path / "stopped"

    def stop(_: Any) -> None:
        raise InterruptedError

    def run(name: str, out: Path, **more: Any) -> None:
        train(config, model_dir, [data], str(out), subset=f"{tmp_path}/{name}.parquet", **more)

    with pytest.raises(InterruptedError):
        run("one", stopped, on_step=stop)
    with pytest.raises(UserError, match="subset: "):
        run("less", stopped)
    with pytest.raises(UserError, match=r"subset: .*, now None"):
        train(config, model_dir, [data], str(stopped))
    run("other", stopped)
    copies = np.isin(Index.load([data]).uid, uids).sum()
    assert json.loads((stopped / DONE).read_text())["rows"] == copies
    assert json.loads((stopped / INPUTS).read_text()) == {
        "model_dir": model_dir,
        "data_dirs": [data],
        "subset": f"{tmp_path}/other.parquet",
        "projector": None,
    }


ENTRY: dict[str, Any] = {
    **{"step": 4, "epoch": 0, "loss": 2.0, "labels": 10, "loss_by_source": {"a": 1.0, "b": 2.5}},
    **{"grad_norm": {"projector": 0.5}, "lr": {"projector": 1e-3}, "tokens": 100, "images": 4},
    **{"seconds": 2.0, "mfu": 0.4, "padding_share": 0.25, "memory_bytes": 2**30, "dropped": 0},
    "dropped_reasons": {"no_round": 1},
}


def test_a_line_for_people_is_of_all_steps_since_the_last() -> None:
    other = ENTRY | {"step": 5, "loss": 5.0, "labels": 20, "seconds": 6.0, "mfu": 0.8, "dropped": 3}
    line = line_of([ENTRY, other], 40, 3725)
    assert line == (
        "step 6/40, loss 4.0000 (a 1.000, b 2.500), 25 tokens/s, 1.0 images/s, MFU 70.0%, "
        "padding 25.0%, 3 dropped, 1.0 GiB, gradient projector 0.5, lr projector 0.001, "
        "1 h 2 min left"
    )
    assert [clock(one) for one in (59.4, 60, 7199)] == ["59 s", "1 min 0 s", "1 h 59 min"]


def test_curves_have_one_point_a_number() -> None:
    points = dict(scalars(ENTRY))
    assert points["loss_by_source/b"] == 2.5
    assert points["grad_norm/projector"] == 0.5
    assert points["loss"] == 2.0
    assert not {"step", "dropped_reasons/no_round"} & set(points)


def test_lines_for_people_come_at_the_edges_and_after_a_while(tmp_path: Path) -> None:
    said: list[str] = []
    with RunLog(str(tmp_path), 6, say=said.append, every_seconds=3600) as log:
        for step in range(6):
            log.add(ENTRY | {"step": step})
    assert [line.split(",")[0] for line in said] == ["step 1/6", "step 6/6"]
    assert [one["step"] for one in read_lines(f"{tmp_path}/{LOG}")] == [*range(6)]


def test_events_can_be_read_by_tensorboard(tmp_path: Path) -> None:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(str(tmp_path), 2) as log:
        log.add(ENTRY)
    events = module.EventAccumulator(f"{tmp_path}/events").Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(4, 2.0)]


def test_without_tensorboard_there_are_no_events(tmp_path: Path) -> None:
    assert tensorboard_writer("memory://x", 0) is None
    if tensorboard_writer(str(tmp_path), 0) is None:
        assert not [*tmp_path.iterdir()]


def test_a_cpus_peak_is_what_a_matrix_product_reaches() -> None:
    peak = peak_flops(torch.device("cpu"))
    assert 1e8 < peak < 1e14
    assert peak_flops(torch.device("cpu")) == peak
