"""Instruction files of several forms through the ingest stage: every row's fate is known."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_inputs import bad_rows, record, rows_of, run_here, stages

from curate.rows import llava_source
from curate.source_config import SourceConfig
from manifests import store
from manifests.errors import StageFailed, UserError
from manifests.ledger import Tally, tally
from manifests.work import Output, StageDir

Row = dict[str, Any]


def said(*texts: str) -> list[Row]:
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]


def ingest(folder: Path, files: dict[str, str], **options: Any) -> StageDir:
    """Ingest files by source name, each relative to the folder; check that the accounts add up."""
    source = {"kind": "llava_json", "files": {k: str(folder / v) for k, v in files.items()}}
    recipe = {"source": source | options, "max_quarantine_fraction": 1.0}
    directory = stages(run_here(recipe, folder / "out"))["ingest"]
    counts, kept = record(directory), rows_of(directory)
    bad, talks = rows_of(directory, "quarantine"), rows_of(directory, "conversations")
    assert (counts["rows_in"], counts["kept"]) == (len(kept) + len(bad), len(kept))
    assert [row["uid"] for row in talks] == [row["uid"] for row in kept]
    uids = [row["uid"] for row in rows_of(directory, "verdicts")]
    assert sorted(uids) == sorted(row["uid"] for row in kept + bad)
    assert uids == sorted(set(uids))
    return directory


def turns_of(talk: Row) -> list[tuple[str, str]]:
    return [(turn["role"], turn["text"]) for turn in talk["turns"]]


MIXED: list[tuple[str, str | None]] = [  # line of JSON, its error class or None
    (
        json.dumps({"id": "a", "image": "a.jpg", "conversations": said("What?\n<image>", "A.")}),
        None,
    ),
    (json.dumps({"id": 7, "instruction": "Add", "input": "2 3", "output": "5"}), None),
    (json.dumps({"messages": [{"role": "user", "content": "Hi"}], "model": ""}), None),
    ('{"id": "cut", "conversations": [{"from": "human"', "bad_json"),
    ('{"id": "surrogate \\ud800", "conversations": [], "score": NaN}', None),
    (json.dumps(["a", "list"]), "not_an_object"),
    (json.dumps({"id": "b", "text": "x"}), "unknown_format"),
    (json.dumps({"id": "c", "conversations": [{"from": "human", "value": None}]}), "bad_field"),
    (json.dumps({"id": "d", "url": "http://d", "conversations": said("x" * 300)}), None),
    ("[" * 3000 + "]" * 3000, "bad_json"),
]


@pytest.mark.parametrize("bytes_per_part", [1, 300, 1 << 25])
def test_every_line_of_a_mixed_file_has_its_fate(tmp_path: Path, bytes_per_part: int) -> None:
    content = "\n\n".join(line for line, _ in MIXED)
    (tmp_path / "mixed.jsonl").write_text(content)
    directory = ingest(tmp_path, {"mine": "mixed.jsonl"}, bytes_per_part=bytes_per_part)
    kept = [at for at, (_, error) in enumerate(MIXED) if error is None]
    assert bad_rows(directory) == [(f"mine_{at}", e) for at, (_, e) in enumerate(MIXED) if e]
    rows = rows_of(directory)
    assert [row["uid"] for row in rows] == kept
    assert [row["key"] for row in rows] == ["a", "7", "mine_2", "surrogate \ufffd", "d"]
    assert {(row["source"], row["shard"]) for row in rows} == {("mine", "mine/mixed.jsonl")}
    assert [row["caption"] for row in rows] == ["What?", "Add\n2 3", "Hi", "", "x" * 200]
    assert [row["url"] for row in rows] == [None, None, None, None, "http://d"]
    extras = [row["extra"] and json.loads(row["extra"]) for row in rows]
    assert extras == [None, None, {"model": ""}, {"score": None}, None]
    for row, at in zip(rows, kept, strict=True):
        line = content.encode()[row["offset"] : row["offset"] + row["size"]]
        assert line.decode() == MIXED[at][0]


def test_conversations_are_in_one_form(tmp_path: Path) -> None:
    (tmp_path / "mixed.jsonl").write_text("\n".join(line for line, _ in MIXED))
    talks = rows_of(ingest(tmp_path, {"mine": "mixed.jsonl"}), "conversations")
    assert [talk["images"] for talk in talks] == [["a.jpg"], [], [], [], []]
    assert [turns_of(talk) for talk in talks] == [
        [("human", "<image>\nWhat?"), ("gpt", "A.")],
        [("human", "Add\n2 3"), ("gpt", "5")],
        [("human", "Hi")],
        [],
        [("human", "x" * 300)],
    ]


def test_an_array_gives_the_same_rows_as_lines(tmp_path: Path) -> None:
    values = [
        json.loads(line) for line, error in MIXED if error != "bad_json" and "NaN" not in line
    ]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=2))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(value) for value in values))
    found = [ingest(tmp_path, {"s": name}) for name in ("a.json", "a.jsonl")]
    array, lines = ([row | {"shard": "", "offset": 0} for row in rows_of(one)] for one in found)
    sizes = [(row.pop("size"), other.pop("size")) for row, other in zip(array, lines, strict=True)]
    assert array == lines
    assert all(pretty >= plain for pretty, plain in sizes)
    assert rows_of(found[0], "conversations") == rows_of(found[1], "conversations")
    assert bad_rows(found[0]) == bad_rows(found[1])


def test_broken_lines_cannot_make_good_rows_together(tmp_path: Path) -> None:
    row = json.dumps({"id": "a", "conversations": []})
    halves = ['{"id": "b", "n": [1', '2], "conversations": []}']
    (tmp_path / "a.jsonl").write_text("\n".join([f"{row},{row}", *halves, row]))
    directory = ingest(tmp_path, {"s": "a.jsonl"})
    assert bad_rows(directory) == [("s_0", "bad_json"), ("s_1", "bad_json"), ("s_2", "bad_json")]
    assert [one["uid"] for one in rows_of(directory)] == [3]


def test_text_that_is_not_utf8_is_not_mended(tmp_path: Path) -> None:
    good = json.dumps({"id": "é", "conversations": said("\x00 <\U0001f600>")}, ensure_ascii=False)
    bad = b'{"id": "caf\xe9", "conversations": []}'
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[" + bad + b"," + good.encode() + b"]")
    directory = ingest(tmp_path, {"s": "a.json"})
    assert bad_rows(directory) == [("s_0", "bad_json")]
    (detail,) = [row["detail"] for row in rows_of(directory, "quarantine")]
    assert detail == "invalid continuation byte at byte 11 of the row"
    (talk,) = rows_of(directory, "conversations")
    assert turns_of(talk) == [("human", "\x00 <\U0001f600>")]


def plain(*keys: str) -> str:
    return json.dumps([{"id": key, "conversations": []} for key in keys])


def test_files_are_numbered_by_source_then_name_and_rows_within(tmp_path: Path) -> None:
    for name, keys in {"b/10.json": "xy", "b/9.json": "z", "a.json": "ab"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(plain(*keys))
    directory = ingest(tmp_path, {"second": "b/*.json", "first": "a.json"}, bytes_per_part=1)
    rows = rows_of(directory)
    assert [(row["uid"] >> 24, row["uid"] & 0xFFFFFF, row["key"]) for row in rows] == [
        (0, 0, "z"),
        (1, 0, "x"),
        (1, 1, "y"),
        (2, 0, "a"),
        (2, 1, "b"),
    ]
    shards = ["second/9.json", "second/10.json", "second/10.json", "first/a.json", "first/a.json"]
    assert [row["shard"] for row in rows] == shards
    payloads = [marker["payload"] for marker in directory.markers()]
    assert [one["part"] for one in payloads] == [0, 1, 2, 3, 4]
    assert [(one["first_row"], one["rows"]) for one in payloads] == [
        (0, 1),
        (0, 1),
        (1, 1),
        (0, 1),
        (1, 1),
    ]


def test_the_order_of_files_and_a_changed_file_are_other_inputs(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(plain(name))
    forward = ingest(tmp_path, {"a": "a.json", "b": "b.json"})
    assert ingest(tmp_path, {"a": "a.json", "b": "b.json"}).path == forward.path
    backward = ingest(tmp_path, {"b": "b.json", "a": "a.json"})
    assert backward.path != forward.path
    assert [row["key"] for row in rows_of(backward)] == ["b", "a"]
    os.utime(tmp_path / "b.json", (1, 1))
    assert ingest(tmp_path, {"a": "a.json", "b": "b.json"}).path != forward.path


def test_the_saved_recipe_keeps_the_order_of_the_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(plain(name))
    ingest(tmp_path, {"b": "b.json", "a": "a.json"})
    saved = store.read_bytes(str(tmp_path / "out" / "recipe.yaml")).decode()
    assert saved.index("b.json") < saved.index("a.json")


def test_too_many_bad_rows_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"id": "a", "conversations": []}, 5]')
    source = {"kind": "llava_json", "files": {"s": str(tmp_path / "a.json")}}
    with pytest.raises(StageFailed, match="not_an_object"):
        run_here({"source": source}, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'[{"id": "a"', "within row 0, which begins at byte 1"),
        (b"PK\x03\x04", "zip archive"),
        (b"a,b\n", "neither a JSON array nor JSON Lines"),
    ],
)
def test_a_file_that_is_no_list_of_rows_is_refused_before_any_part(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        ingest(tmp_path, {"s": "a.json"})
    with pytest.raises(UserError, match="does not exist"):
        ingest(tmp_path, {"s": "none.json"})


@pytest.mark.parametrize("depth", [200, 249, 260, 480, 1000, 1020, 1100, 200_000])
@pytest.mark.parametrize("value", ["1", '"\\ud800"', "NaN", "123456789012345678901234567890"])
def test_a_field_is_kept_or_its_row_is_bad_by_its_depth(
    tmp_path: Path, depth: int, value: str
) -> None:
    deep = '{"id": "d", "conversations": [], "deep": ' + "[" * depth + value + "]" * depth + "}"
    (tmp_path / "a.jsonl").write_text('{"id": "a", "conversations": []}\n' + deep)
    directory = ingest(tmp_path, {"s": "a.jsonl"})
    rows = rows_of(directory)
    if depth < 250:
        assert rows[1]["extra"].count("[") == depth
    else:
        (error,) = bad_rows(directory)
        assert error in [("s_1", "bad_field"), ("s_1", "bad_json")]
        assert [row["key"] for row in rows] == ["a"]


def test_names_of_fields_may_be_any_text(tmp_path: Path) -> None:
    lines = [
        '{"\\ud800": 1}',
        '{"conversations": [], "\\ud800": ' + "[" * 300 + "]" * 300 + "}",
        '{"conversations": [], "\\ud800\\u0000": 5}',
    ]
    (tmp_path / "a.json").write_text(f"[{','.join(lines)}]")
    directory = ingest(tmp_path, {"s": "a.json"})
    assert bad_rows(directory) == [("s_0", "unknown_format"), ("s_1", "bad_field")]
    (row,) = rows_of(directory)
    assert json.loads(row["extra"]) == {"\ufffd\x00": 5}


def test_files_damaged_at_random_are_rows_or_user_errors(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [json.loads(line) for line, error in MIXED if error != "bad_json"] * 2
    whole = {
        "a.json": json.dumps(values).encode(),
        "a.jsonl": "\n".join(json.dumps(value) for value in values).encode(),
    }
    kept = bad = refused = 0
    for attempt in range(300):
        name = ("a.json", "a.jsonl")[attempt % 2]
        (tmp_path / name).write_bytes(damaged(whole[name], rng))
        source = SourceConfig(
            kind="llava_json",
            files={"s": str(tmp_path / name)},
            bytes_per_part=rng.choice([9, 999]),
        )
        try:
            items = llava_source.plan(source)
        except UserError:
            refused += 1
            continue
        for item in items:
            counts = fates(llava_source.ingest_part(source, item.payload))
            assert counts.rows_in == item.payload["rows"]
            kept, bad = kept + counts.kept, bad + counts.num_quarantined
    assert min(kept, bad, refused) > 20


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to four changed, cut out or repeated stretches."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data)), rng.randrange(1, 40)
        stretch = rng.choice([rng.randbytes(1), b"", bytes(data[at : at + length]) * 2, b'"', b"]"])
        data[at : at + rng.choice([1, length])] = stretch
    return bytes(data)


def fates(output: Output) -> Tally:
    """Check that the tables of a part agree with each other; return the accounts."""
    samples, talks = output.files.values()
    assert isinstance(samples, pa.Table)
    assert isinstance(talks, pa.Table)
    assert output.verdicts is not None
    assert output.quarantine is not None
    counts = tally(output.verdicts)
    assert counts.adds_up
    for table in (samples, talks):
        table.validate(full=True)
        assert table.num_rows == counts.kept
    assert output.quarantine.num_rows == counts.num_quarantined
    return counts
