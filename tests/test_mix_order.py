"""What a mix takes and in which order: against the rules followed row by row, and by hand."""

from __future__ import annotations

import random
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.rows.mix_config import MixConfig, identity
from curate.rows.mix_order import Decisions, decide, shuffled
from manifests.errors import UserError

GAMMA = 0x9E3779B97F4A7C15
Row = dict[str, Any]


def config_of(**values: Any) -> MixConfig:
    return MixConfig.load(values, where="recipe.mix")


def row(uid: int, source: str, key: str, image: str | None = None, *, says: str = "") -> Row:
    """Return a row; those that say the same, and show the same, are duplicates."""
    return {
        "uid": uid,
        "source": source,
        "key": key,
        "num_images": 0 if image is None else 1,
        "first_image": image,
        "conversation_hash": md5(f"{image} {says or uid}".encode(), usedforsecurity=False).digest(),
    }


def frame_of(rows: list[Row]) -> pl.DataFrame:
    schema = {
        "uid": pl.UInt64,
        "source": pl.String,
        "key": pl.String,
        "num_images": pl.UInt16,
        "first_image": pl.String,
        "conversation_hash": pl.Binary,
    }
    return pl.DataFrame(rows, schema=schema)


def fates(made: Decisions) -> dict[int, str | int]:
    """Return uid -> copies of a kept row, or the reason of a dropped one."""
    found: dict[int, str | int] = dict(zip(made.uids.tolist(), made.copies.tolist(), strict=True))
    lost = {one["uid"]: one["reason"] for one in made.lost.to_pylist()}
    assert sorted(lost) == [uid for uid, copies in found.items() if copies == 0]
    return found | lost


# ---- the rules, one row at a time


def met(one: Row, rule: dict[str, Any]) -> bool:
    image = one["first_image"]
    held = {
        "has_image": lambda value: (one["num_images"] > 0) == value,
        "id_prefix": lambda value: one["key"].startswith(tuple(value)),
        "id_not_prefix": lambda value: not one["key"].startswith(tuple(value)),
        "image_under": lambda value: image is not None and image.split("/")[0] == value,
    }
    return all(held[name](value) for name, value in rule.items())


def by_hand(rows: list[Row], values: dict[str, Any], seed: int) -> dict[int, str | int]:
    """Follow the definitions: replace, include, exclude, duplicates, then samples by hash."""
    found: dict[int, str | int] = {}
    seen: set[bytes] = set()
    left: dict[str, list[int]] = {}
    replace = values.get("replace")
    for one in sorted(rows, key=lambda one: one["uid"]):
        rules = values.get("sources", {}).get(one["source"], {})
        include, exclude = rules.get("include"), rules.get("exclude", [])
        if replace and one["source"] in replace["text_only_of"] and one["num_images"] == 0:
            found[one["uid"]] = "replaced"
        elif include and not any(met(one, rule) for rule in include):
            found[one["uid"]] = "not_included"
        elif any(met(one, rule) for rule in exclude):
            found[one["uid"]] = "excluded"
        elif values["dedup"] == "all" and one["conversation_hash"] in seen:
            found[one["uid"]] = "duplicate_conversation"
        else:
            seen.add(one["conversation_hash"])
            left.setdefault(one["source"], []).append(one["uid"])
    for source, uids in left.items():
        rules = values.get("sources", {}).get(source, {})
        share = Decimal(repr(float(rules.get("weight", 1)))) * len(uids)
        wanted = rules.get("num_rows", int(share.to_integral_value(ROUND_HALF_UP)))
        ranked = sorted(uids, key=lambda uid: oracle.splitmix64(uid + seed * GAMMA))
        for rank, uid in enumerate(ranked):
            found[uid] = wanted // len(uids) + (rank < wanted % len(uids)) or "not_sampled"
    return found


def order_by_hand(copies: dict[int, int], seed: int) -> list[tuple[int, int]]:
    def rank(one: tuple[int, int]) -> tuple[int, int, int]:
        uid, copy = one
        start = oracle.splitmix64(uid + seed * GAMMA)
        return oracle.splitmix64(start + oracle.splitmix64(copy)), uid, copy

    return sorted(((uid, copy) for uid in copies for copy in range(copies[uid])), key=rank)


KEYS = ["svit_detail_1", "svit_complex_1", "wizardlm_1", "1"]
IMAGES = [None, "coco/a.jpg", "coco2/a.jpg", "vg/b.jpg"]
SOURCES = ["svit", "wizardlm", "allava"]
a_row = st.builds(
    row,
    st.integers(0, 2**64 - 1),
    st.sampled_from(SOURCES),
    st.sampled_from(KEYS),
    st.sampled_from(IMAGES),
    says=st.sampled_from(["", "yes", "no"]),
)
a_rule = st.fixed_dictionaries(
    {},
    optional={
        "has_image": st.booleans(),
        "id_prefix": st.lists(st.sampled_from(["svit_", "wizardlm_", "1"]), min_size=1),
        "id_not_prefix": st.lists(st.sampled_from(["svit_d", "w"]), min_size=1),
        "image_under": st.sampled_from(["coco", "vg"]),
    },
).filter(bool)
rules_of_a_source = st.fixed_dictionaries(
    {}, optional={"include": st.lists(a_rule, max_size=2), "exclude": st.lists(a_rule, max_size=2)}
)
how_many = st.one_of(
    st.builds(lambda w: {"weight": w}, st.sampled_from([0, 0.1, 0.5, 0.29, 1, 1.5, 2, 3.7])),
    st.builds(lambda n: {"num_rows": n}, st.integers(0, 40)),
)
a_source = st.builds(lambda rules, number: rules | number, rules_of_a_source, how_many)
a_mix = st.fixed_dictionaries(
    {
        "dedup": st.sampled_from(["all", "none"]),
        "sources": st.dictionaries(st.sampled_from(SOURCES), a_source),
    },
    optional={"replace": st.just({"text_only_of": ["svit"], "with": "wizardlm"})},
)


@settings(max_examples=100, deadline=None)
@given(st.lists(a_row, max_size=25, unique_by=lambda one: one["uid"]), a_mix, st.integers(0, 5))
def test_fates_and_order_are_those_of_the_rules_followed_row_by_row(
    rows: list[Row], values: dict[str, Any], seed: int
) -> None:
    expected = by_hand(rows, values, seed)
    config = config_of(**values)
    none_left = [
        name
        for name, one in values["sources"].items()
        if one.get("num_rows")
        and not any(
            one["source"] == name and expected[one["uid"]] not in DROPPED_BEFORE for one in rows
        )
    ]
    if none_left:
        with pytest.raises(UserError, match="has no row left"):
            decide(frame_of(rows), config, seed)
        return
    made = decide(frame_of(rows), config, seed)
    assert fates(made) == expected
    copies = {uid: fate for uid, fate in expected.items() if isinstance(fate, int)}
    uids, numbers = shuffled(made.uids, made.copies, seed=seed)
    assert list(zip(uids.tolist(), numbers.tolist(), strict=True)) == order_by_hand(copies, seed)
    uids, numbers = shuffled(made.uids, made.copies, seed=seed, shuffle=False)
    in_files = zip(uids.tolist(), numbers.tolist(), strict=True)
    assert list(in_files) == sorted(order_by_hand(copies, seed))


DROPPED_BEFORE = {"replaced", "not_included", "excluded", "duplicate_conversation"}


# ---- worked examples


def small_bunny() -> list[Row]:
    """SVIT-mix in little: its core, LLaVA's rows, ShareGPT's; and WizardLM."""
    return [
        row(0, "svit", "svit_detail_0", "vg/VG_100K/1.jpg"),
        row(1, "svit", "llavav1.5_1", "coco/train2017/1.jpg"),
        row(2, "svit", "wgByO4Y_0", says="what ShareGPT says"),
        row(3, "svit", "wgByO4Y_1"),
        row(1 << 24, "wizardlm", "wizardlm_0"),
        row(1 << 24 | 1, "wizardlm", "wizardlm_1", says="what ShareGPT says"),
    ]


def test_bunny_leaves_the_text_only_rows_of_svit_out_for_those_of_wizardlm() -> None:
    config = config_of(replace={"text_only_of": "svit", "with": "wizardlm"})
    made = decide(frame_of(small_bunny()), config, seed=0)
    first, second = 1 << 24, 1 << 24 | 1
    assert fates(made) == {0: 1, 1: 1, 2: "replaced", 3: "replaced", first: 1, second: 1}
    without = decide(frame_of(small_bunny()), config_of(), seed=0)
    assert fates(without)[second] == "duplicate_conversation"


def test_a_duplicate_names_the_first_row_that_was_not_dropped_before() -> None:
    rows = [row(uid, source, "k", says="same") for uid, source in enumerate("aabbc")]
    config = config_of(sources={"a": {"exclude": [{"id_prefix": "k"}]}})
    made = decide(frame_of(rows), config, seed=0)
    found = {one["uid"]: (one["reason"], one["evidence_uid"]) for one in made.lost.to_pylist()}
    assert found == {
        0: ("excluded", None),
        1: ("excluded", None),
        3: ("duplicate_conversation", 2),
        4: ("duplicate_conversation", 2),
    }


@pytest.mark.parametrize("byte", [0, 7, 8, 15])
def test_hashes_that_differ_in_one_byte_are_not_the_same(byte: int) -> None:
    other = bytearray(16)
    other[byte] = 1
    rows = [row(0, "a", "k") | {"conversation_hash": bytes(16)}]
    rows.append(row(1, "a", "k") | {"conversation_hash": bytes(other)})
    rows.append(row(2, "a", "k") | {"conversation_hash": bytes(16)})
    made = decide(frame_of(rows), config_of(), 0)
    assert fates(made) == {0: 1, 1: 1, 2: "duplicate_conversation"}


def test_an_image_is_under_a_folder_and_not_under_one_that_begins_so() -> None:
    images = ["coco/1.jpg", "coco2/1.jpg", "coco", None, "a/coco/1.jpg", "coco/train/1.jpg"]
    rows = [row(uid, "a", "k", image) for uid, image in enumerate(images)]
    for under in ("coco", "coco/"):
        config = config_of(sources={"a": {"include": [{"image_under": under}]}})
        made = decide(frame_of(rows), config, 0)
        assert [uid for uid, fate in fates(made).items() if fate == 1] == [0, 5]


def test_rows_that_a_file_lists_are_those_with_its_ids(tmp_path: Path) -> None:
    listed = tmp_path / "ids.txt"
    listed.write_bytes(b"\xef\xbb\xbfk1\r\n  k3 \n\nk4\nunknown")
    rows = [row(uid, "ab"[uid % 2], f"k{uid}") for uid in range(6)]
    config = config_of(sources={"b": {"exclude": [{"ids": str(listed)}]}})
    assert fates(decide(frame_of(rows), config, 0)) == {
        0: 1, 1: "excluded", 2: 1, 3: "excluded", 4: 1, 5: 1,
    }  # fmt: skip
    before = identity(config)
    listed.write_text("k1")
    assert identity(config) != before
    moved = listed.rename(tmp_path / "moved.txt")
    other = config_of(sources={"b": {"exclude": [{"ids": str(moved)}]}})
    assert other.canonical() == config.canonical()
    assert identity(config_of(sources={"b": {"weight": 2}})) == {}
    for look in (identity, lambda one: decide(frame_of(rows), one, 0)):
        with pytest.raises(UserError, match=r"ids\.txt' cannot be read(.|\n)*one id a line"):
            look(config)


# ---- how often


def many(num_rows: int, source: str = "a") -> pl.DataFrame:
    return frame_of([row(uid, source, str(uid)) for uid in range(num_rows)])


@pytest.mark.parametrize(
    ("weight", "num_rows", "counts"),
    [
        (0.5, 1001, {0: 500, 1: 501}),
        (2.5, 1000, {2: 500, 3: 500}),
        (0.29, 100, {0: 71, 1: 29}),
        (3, 10, {3: 10}),
        (0, 10, {0: 10}),
        (0.001, 10, {0: 10}),
        (1, 10, {1: 10}),
        (0.5, 0, {}),
    ],
)
def test_a_weight_gives_each_row_as_many_copies_and_a_share_one_more(
    weight: float, num_rows: int, counts: dict[int, int]
) -> None:
    made = decide(many(num_rows), config_of(sources={"a": {"weight": weight}}), 3)
    assert Counter(made.copies.tolist()) == counts


@pytest.mark.parametrize("wanted", [0, 1, 7, 100, 101, 250, 300])
def test_num_rows_is_the_number_of_samples(wanted: int) -> None:
    made = decide(many(100), config_of(sources={"a": {"num_rows": wanted}}), 0)
    assert made.copies.sum() == wanted
    assert made.copies.max() - made.copies.min() <= 1
    assert set(made.lost["reason"].to_pylist()) <= {"not_sampled"}


def test_a_smaller_weight_takes_a_part_of_what_a_larger_one_takes() -> None:
    kept = [
        set(np.flatnonzero(decide(many(500), config_of(sources={"a": {"weight": w}}), 0).copies))
        for w in (0.1, 0.2, 0.9)
    ]
    assert kept[0] < kept[1] < kept[2]
    assert [len(one) for one in kept] == [50, 100, 450]


def test_rows_not_sampled_tell_how_far_they_were_from_it() -> None:
    made = decide(many(200), config_of(sources={"a": {"weight": 0.25}}), 0)
    scores = np.array(made.lost["score"].to_pylist())
    (cutoff,) = set(made.lost["cutoff"].to_pylist())
    assert cutoff == pytest.approx(0.25, abs=0.1)
    assert scores.min() > cutoff
    assert scores.max() <= 1
    none = decide(many(5), config_of(sources={"a": {"weight": 0}}), 0).lost
    assert none["cutoff"].null_count == 5


def test_another_seed_samples_and_orders_otherwise() -> None:
    config = config_of(sources={"a": {"weight": 0.5}})
    first, second = (decide(many(400), config, seed) for seed in (0, 1))
    both = int(((first.copies > 0) & (second.copies > 0)).sum())
    assert 60 < both < 140  # 100 is what independent halves share
    orders = [shuffled(first.uids, first.copies, seed=seed)[0].tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_the_order_is_even_in_sources_sampling_and_copies() -> None:
    """Neither the first rows of the files, nor those surest to be sampled, nor copies gather."""
    uids = np.arange(20_000, dtype=np.uint64)
    made = decide(many(20_000), config_of(sources={"a": {"weight": 1.5}}), 0)
    order, numbers = shuffled(made.uids, made.copies, seed=0)
    ranks = np.linspace(-1, 1, len(order))
    hashes = np.array([oracle.splitmix64(int(uid)) for uid in uids]) / 2**64
    for value in (order.astype(float), hashes[order.astype(int)], numbers.astype(float)):
        assert abs(np.corrcoef(ranks, value)[0, 1]) < 0.025  # 4 sigma of independent columns
    second = np.flatnonzero(numbers == 1)
    position = {(int(u), int(n)): i for i, (u, n) in enumerate(zip(order, numbers, strict=True))}
    gaps = [abs(int(i) - position[int(order[i]), 0]) for i in second]
    assert np.mean(gaps) == pytest.approx(len(order) / 3, rel=0.05)


def test_nothing_depends_on_the_order_or_the_pieces_in_which_rows_are_given() -> None:
    rows = [row(uid, "ab"[uid % 2], str(uid), says=str(uid % 40)) for uid in range(100)]
    mixed = random.Random(0).sample(rows, len(rows))
    config = config_of(sources={"a": {"weight": 0.5}, "b": {"num_rows": 30}})
    straight = decide(frame_of(rows), config, 5)
    pieces = pl.concat([frame_of(mixed[:33]), frame_of(mixed[33:])], rechunk=False)
    shaken = decide(pieces, config, 5)
    assert shaken.lost.equals(straight.lost)
    assert fates(shaken) == fates(straight)


def test_no_rows_give_no_order() -> None:
    made = decide(frame_of([]), config_of(replace={"text_only_of": "a", "with": "b"}), 0)
    assert made.lost.num_rows == 0
    assert [len(one) for one in shuffled(made.uids, made.copies, seed=0)] == [0, 0]
