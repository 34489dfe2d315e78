"""Files of instruction rows: where each row lies, what parts are, which files make them anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from small_inputs import bad_rows, record, rows_of, run_here, stages
from small_mixes import image_row, text_row, write_json, write_jsonl

from curate.rows import llava_source
from curate.source_config import SourceConfig
from manifests.errors import PartDamaged, UserError
from manifests.schemas import CONVERSATIONS, SAMPLES
from manifests.work import StageDir

FILE = 1 << 24  # uids from one file to the next


def ingest(out: Path, files: Mapping[str, Path | str], bytes_per_part: int = 300) -> StageDir:
    """Ingest files however bad they are; check the accounts and that both tables go together."""
    source = {"kind": "llava_json", "bytes_per_part": bytes_per_part}
    source["files"] = {name: str(path) for name, path in files.items()}
    links = run_here({"source": source, "max_quarantine_fraction": 1.0}, out)
    directory = stages(links)["ingest"]
    samples, verdicts = rows_of(directory), rows_of(directory, "verdicts")
    lost = rows_of(directory, "quarantine")
    uids = [row["uid"] for row in samples]
    assert [row["uid"] for row in rows_of(directory, "conversations")] == uids
    assert [row["uid"] for row in verdicts if row["keep"]] == uids
    assert [row["uid"] for row in verdicts if not row["keep"]] == [row["uid"] for row in lost]
    assert [row["uid"] for row in verdicts] == sorted({row["uid"] for row in verdicts})
    assert (record(directory)["rows_in"], record(directory)["kept"]) == (len(verdicts), len(uids))
    return directory


def source_of(path: Path | str, **more: Any) -> SourceConfig:
    return SourceConfig(kind="llava_json", files={"s": str(path)}, **more)


def test_each_rows_uid_key_and_place_are_those_of_its_file(tmp_path: Path) -> None:
    svit = [image_row(f"svit_{n}", f"coco/{n}.jpg") for n in range(20)]
    chat: list[Any] = [text_row(f"chat_{n}", f"é {n}", "x" * 40 * n) for n in range(9)]
    wizard = [{"instruction": f"Count to {n}.", "output": "1 2"} for n in range(7)]
    files = {
        "svit": write_json(tmp_path / "in/b.json", svit),
        "chat": write_jsonl(tmp_path / "in/c.jsonl", chat),
        "wizard": write_json(tmp_path / "in/a.json", wizard),
    }
    directory = ingest(tmp_path / "out", files)
    assert len(directory.files()) > 10
    samples = rows_of(directory)
    expected = [
        (at * FILE + row, key, name, f"{name}/{Path(files[name]).name}")
        for at, (name, keys) in enumerate(
            {
                "svit": [row["id"] for row in svit],
                "chat": [row["id"] for row in chat],
                "wizard": [f"wizard_{n}" for n in range(7)],
            }.items()
        )
        for row, key in enumerate(keys)
    ]
    assert [(s["uid"], s["key"], s["source"], s["shard"]) for s in samples] == expected
    for sample, row in zip(samples, [*svit, *chat, *wizard], strict=True):
        content = Path(files[sample["source"]]).read_bytes()
        text = content[sample["offset"] : sample["offset"] + sample["size"]]
        assert json.loads(text) == row
        assert text == text.strip()
    conversations = rows_of(directory, "conversations")
    assert [row["images"] for row in conversations[18:22]] == [
        ["coco/18.jpg"],
        ["coco/19.jpg"],
        [],
        [],
    ]
    assert conversations[-1]["turns"] == [
        {"role": "human", "text": "Count to 6."},
        {"role": "gpt", "text": "1 2"},
    ]
    assert bad_rows(directory) == []


def test_the_tables_have_their_schemas_and_parts_their_payloads(tmp_path: Path) -> None:
    rows = [image_row(f"k{n}", ["1.jpg", "2.jpg"]) for n in range(6)]
    path = write_json(tmp_path / "a.json", rows)
    directory = ingest(tmp_path / "out", {"s": path, "t": path})
    parts = sorted((one["payload"] for one in directory.markers()), key=lambda one: one["part"])
    names = [Path(name).name for name in directory.files()]
    assert names == [f"part-{at:05d}.parquet" for at in range(len(parts))]
    assert [Path(name).name for name in directory.files("conversations")] == names
    for name, table in [
        (directory.files(), SAMPLES),
        (directory.files("conversations"), CONVERSATIONS),
    ]:
        assert all(pq.read_schema(one).equals(table) for one in name)
    content = Path(path).read_bytes()
    for at, name in enumerate("st"):
        own = [one for one in parts if one["source"] == name]
        assert all(one["shards"] == [f"{name}/a.json"] for one in own)
        assert all(one["first_shard_index"] == at for one in own)
        firsts = [sum(one["rows"] for one in own[:n]) for n in range(len(own))]
        assert [one["first_row"] for one in own] == firsts
        cut = [json.loads(b"[%b]" % content[one["start"] : one["end"]]) for one in own]
        assert [row for part in cut for row in part] == rows
        assert [len(part) for part in cut] == [one["rows"] for one in own]


def test_an_empty_array_beside_rows_is_no_part(tmp_path: Path) -> None:
    empty = write_json(tmp_path / "none.json", [])
    some = write_json(tmp_path / "a.json", [text_row("a")])
    directory = ingest(tmp_path / "out", {"none": empty, "some": some})
    assert [(row["uid"], row["source"]) for row in rows_of(directory)] == [(FILE, "some")]


def test_a_source_of_several_files_numbers_them_and_names_them_below_their_folder(
    tmp_path: Path,
) -> None:
    for name in ("d/part_10.json", "d/part_2.json", "e/x.json"):
        write_json(tmp_path / name, [text_row(name)])
    files = {"glob": tmp_path / "d/*.json", "both": f"{tmp_path}/{{e/x,d/part_2}}.json"}
    directory = ingest(tmp_path / "out", files)
    assert [(row["uid"], row["key"], row["shard"]) for row in rows_of(directory)] == [
        (0, "d/part_2.json", "glob/part_2.json"),
        (FILE, "d/part_10.json", "glob/part_10.json"),
        (2 * FILE, "d/part_2.json", "both/d/part_2.json"),
        (3 * FILE, "e/x.json", "both/e/x.json"),
    ]
    with pytest.raises(UserError, match="No such file is at"):
        ingest(tmp_path / "out", {"glob": tmp_path / "d/*.jsonl"})
    with pytest.raises(UserError, match="does not exist"):
        ingest(tmp_path / "out", {"one": tmp_path / "none.json"})


def test_the_order_and_the_names_of_files_and_their_content_decide_and_a_folder_does_not(
    tmp_path: Path,
) -> None:
    for name in "ab":
        write_json(tmp_path / "in" / f"{name}.json", [text_row(name)])
    files = {name: tmp_path / "in" / f"{name}.json" for name in "ab"}
    out = tmp_path / "out"
    first = ingest(out, files)
    assert ingest(out, files) == first
    turned = ingest(out, dict(reversed(files.items())))
    renamed = ingest(out, {"a": files["a"], "c": files["b"]})
    (tmp_path / "in").rename(tmp_path / "moved")
    files = {name: tmp_path / "moved" / f"{name}.json" for name in "ab"}
    assert ingest(out, files) == first
    write_json(files["a"], [text_row("a"), text_row("new")])
    changed = ingest(out, files)
    assert len({one.path for one in (first, turned, renamed, changed)}) == 4
    assert [row["source"] for row in rows_of(turned)] == ["b", "a"]
    assert [row["key"] for row in rows_of(changed)] == ["a", "new", "b"]


def test_a_file_that_changes_between_plan_and_work_is_not_read_as_planned(tmp_path: Path) -> None:
    path = Path(write_jsonl(tmp_path / "b.jsonl", [text_row(str(n)) for n in range(4)]))
    source, content = source_of(tmp_path / "*.jsonl"), path.read_bytes()
    llava_source.forget_listing()
    (item,) = llava_source.plan(source)
    assert llava_source.ingest_part(source, item.payload).files
    write_jsonl(tmp_path / "a.jsonl", [text_row("came later")])
    llava_source.forget_listing()
    made = llava_source.ingest_part(source, item.payload)
    assert made.verdicts is not None
    assert made.verdicts.column("uid").to_pylist() == [0, 1, 2, 3]
    for other in (content[:-9], content.replace(b"\n", b" ", 1), b""):
        path.write_bytes(other)
        with pytest.raises(PartDamaged, match="has changed"):
            llava_source.ingest_part(source, item.payload)
    path.unlink()
    llava_source.forget_listing()
    with pytest.raises(PartDamaged, match="is gone"):
        llava_source.ingest_part(source, item.payload)
