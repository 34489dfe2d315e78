"""The rows at given ranks of a stream equal those of a sort, however little may be held."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from curate.rows.order_statistics import Chunk, Place, descending_codes, key_of, rows_at
from manifests.errors import PartDamaged, UserError

Keys = NDArray[np.float64]
Uids = NDArray[np.uint64]


class Stream:
    """Chunks of some keys and uids; counts how often it was read."""

    def __init__(self, keys: Keys, uids: Uids, cuts: list[int]) -> None:
        self._chunks = list(zip(np.split(keys, cuts), np.split(uids, cuts), strict=True))
        self.num_passes = 0

    def __call__(self) -> Iterator[Chunk]:
        self.num_passes += 1
        for keys, uids in self._chunks:
            yield descending_codes(keys), uids


def some_keys(rng: np.random.Generator, num_rows: int) -> Keys:
    """Return keys of one of several kinds: ties everywhere, one value, both zeros, any sign."""
    kinds: list[Callable[[], Keys]] = [
        lambda: rng.integers(-3, 4, num_rows) / 4.0,
        lambda: np.full(num_rows, rng.choice([-0.25, 0.0, 0.25])),
        lambda: rng.choice([-0.0, 0.0, -1e-310, 5e-324], num_rows),
        lambda: rng.normal(size=num_rows),
        lambda: 0.25 + rng.integers(3, size=num_rows) * 2.0**-50,
        lambda: rng.choice([np.inf, -np.inf, 1e308, -1e308, 0.0], num_rows),
    ]
    return kinds[int(rng.integers(len(kinds)))]()


def some_uids(rng: np.random.Generator, num_rows: int) -> Uids:
    """Return distinct uids, near each other or anywhere in 64 bits."""
    if rng.random() < 0.5:
        return rng.permutation(2 * num_rows + 1)[:num_rows].astype(np.uint64)
    found = np.unique(rng.integers(2**64, size=4 * num_rows + 8, dtype=np.uint64))
    return rng.permutation(found)[:num_rows]


def by_sorting(keys: Keys, uids: Uids) -> list[tuple[float, int]]:
    pairs = zip(keys.tolist(), uids.tolist(), strict=True)
    return sorted(pairs, key=lambda row: (-row[0], row[1]))


@pytest.mark.parametrize("seed", range(150))
def test_the_rows_at_some_ranks_are_those_of_a_sort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_rows = int(rng.choice([1, 2, 3, 17, 200]))
    keys, uids = some_keys(rng, num_rows), some_uids(rng, num_rows)
    cuts = np.sort(rng.integers(0, num_rows + 1, size=rng.integers(0, 9))).tolist()
    ranks = [0, num_rows - 1, *rng.integers(num_rows, size=2).tolist()]
    ranked = by_sorting(keys, uids)
    for max_held in (0, 1, 5, 1 << 20):
        read = Stream(keys, uids, cuts)
        found = rows_at(read, ranks, num_rows=num_rows, max_held=max_held)
        assert [(key_of(one.code), one.tie) for one in found] == [ranked[rank] for rank in ranks]
        assert read.num_passes <= 8


def test_each_row_is_judged_alone_against_a_place() -> None:
    rng = np.random.default_rng(3)
    keys, uids = rng.integers(-2, 3, 50) / 2.0, some_uids(rng, 50)
    order = np.lexsort((uids, -keys))
    codes = descending_codes(keys)
    for rank in range(50):
        (place,) = rows_at(lambda: [(codes, uids)], [rank], num_rows=50)
        assert set(np.flatnonzero(place.rows_before(codes, uids))) == set(order[:rank])
        assert set(np.flatnonzero(place.rows_after(codes, uids))) == set(order[rank + 1 :])


def test_hashes_of_all_64_bits_have_ranks_too() -> None:
    codes = np.array([2**64 - 1, 0, 2**63, 2**64 - 1, 1], np.uint64)
    ties = np.array([2**64 - 1, 0, 5, 7, 2], np.uint64)
    found = rows_at(lambda: [(codes, ties)], [0, 2, 3, 4], num_rows=5, max_held=0)
    assert found == [
        Place(0, 0),
        Place(2**63, 5),
        Place(2**64 - 1, 7),
        Place(2**64 - 1, 2**64 - 1),
    ]


def test_equal_keys_beyond_the_bound_are_told_apart_by_the_digits_of_the_uid() -> None:
    keys, uids = np.full(3000, 0.31), np.random.default_rng(0).permutation(3000).astype(np.uint64)
    read = Stream(keys, uids, [1000, 1000, 2500])
    found = rows_at(read, [0, 1499, 2999], num_rows=3000, max_held=10)
    assert [(key_of(one.code), one.tie) for one in found] == [(0.31, 0), (0.31, 1499), (0.31, 2999)]
    assert read.num_passes == 8


def test_few_rows_take_one_pass_and_many_take_three() -> None:
    rng = np.random.default_rng(0)
    keys, uids = rng.normal(0.3, 0.05, 20_000), np.arange(20_000, dtype=np.uint64)
    for max_held, num_passes in ((20_000, 1), (1000, 3)):
        read = Stream(keys, uids, [7000])
        rows_at(read, [8000, 11_999], num_rows=20_000, max_held=max_held)
        assert read.num_passes == num_passes


def test_codes_ascend_where_keys_descend() -> None:
    keys = np.array([np.inf, 1e308, 1.0, np.nextafter(1.0, 0.0), 5e-324, 0.0, -5e-324, -1, -np.inf])
    codes = descending_codes(keys)
    assert (np.diff(codes.astype(object)) > 0).all()
    assert [key_of(int(code)) for code in codes] == keys.tolist()
    assert (descending_codes(np.array([-0.0])) == descending_codes(np.array([0.0]))).all()


def test_a_key_that_is_no_number_is_refused() -> None:
    with pytest.raises(UserError, match="1 of 2 keys are not numbers"):
        descending_codes(np.array([0.3, np.nan]))


@pytest.mark.parametrize("max_held", [0, 100])
@pytest.mark.parametrize("num_rows", [4, 6])
def test_a_stream_of_other_length_is_found_out(num_rows: int, max_held: int) -> None:
    read = Stream(np.arange(5.0), np.arange(5, dtype=np.uint64), [2])
    with pytest.raises(PartDamaged, match=f"5 rows were read where {num_rows} should be"):
        rows_at(read, [0], num_rows=num_rows, max_held=max_held)


def peak_bytes(num_chunks: int, keys_of: Callable[[int], Keys]) -> int:
    """Return the most memory that finding two ranks takes, of chunks made when they are read."""

    def read() -> Iterator[Chunk]:
        for chunk in range(num_chunks):
            uids = np.arange(chunk * 1000, (chunk + 1) * 1000, dtype=np.uint64)
            yield descending_codes(keys_of(chunk)), uids

    num_rows = 1000 * num_chunks
    tracemalloc.start()
    rows_at(read, [num_rows // 3, num_rows // 2], num_rows=num_rows, max_held=2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    "keys_of",
    [lambda chunk: np.random.default_rng(chunk).normal(size=1000), lambda chunk: np.zeros(1000)],
    ids=["all different", "all equal"],
)
def test_memory_does_not_grow_with_the_stream(keys_of: Callable[[int], Keys]) -> None:
    small, large = peak_bytes(10, keys_of), peak_bytes(160, keys_of)
    assert large < 1.5 * small  # 16 times the rows; a second rank may need counts of its own
    assert large < 4 << 20
