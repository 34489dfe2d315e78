"""What is particular to LAION's tables: the hash that joins them, swapped sizes, old releases.

Sources: the hash, github.com/LAION-AI/laion5B (safety/compute_hashes.py): murmur3 x64 128 of URL
and TEXT, seed 0, its first half as a signed number. Swapped sizes: its watermark/big_join.py
exchanges WIDTH and HEIGHT of the base tables. The releases: laion.ai/blog/relaion-5b.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import mmh3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_SIZES_SWAPPED = {"SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE"}
_BASE = _SIZES_SWAPPED | {"NSFW", "similarity"}
_JOINED = {"URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "hash", "punsafe", "pwatermark"}
_FETCHED = {"url", "caption", "NSFW", "similarity", "LICENSE"}
"""As img2dataset names them beside what it fetched, and clip-retrieval beside the embeddings."""

SAFER_RELEASE = "Re-LAION-2B-en-research-safe"
WITHDRAWN = (
    "{shown} has the columns of the original LAION-400M and LAION-5B tables, which were withdrawn: "
    "some of their links led to suspected child sexual abuse material. "
    f"Use {SAFER_RELEASE} (laion/relaion2B-en-research-safe) instead: from that release 2,236 such "
    "links are removed, found with lists of child protection organisations "
    "(laion.ai/blog/relaion-5b)"
)


def hash_of(url: bytes | None, caption: bytes | None) -> int:
    """Return LAION's `hash` of a row, signed 64 bits; a missing value counts as empty."""
    return int(mmh3.hash64((url or b"") + (caption or b""), 0, signed=True)[0])


def hashes(urls: pa.Array, captions: pa.Array) -> npt.NDArray[np.int64]:
    """Return LAION's `hash` of each row, int64 [n]. Args: bytes [n] as the source has them."""
    rows = zip(urls.to_pylist(), captions.to_pylist(), strict=True)
    return np.fromiter((hash_of(url, caption) for url, caption in rows), np.int64, len(urls))


def known_hashes(
    given: pa.Array | pa.ChunkedArray | None,
    urls: pa.Array,
    captions: pa.Array,
    counts: Counter[str],
) -> pa.Array | pa.ChunkedArray:
    """Return LAION's `hash` of each row, int64 [n]: the given one, else one that is computed.

    Args: given: int64 [n] with nulls, or None; urls, captions: bytes [n] as the source has them;
    counts: gets how many were computed, and how many of the given ones are the same or differ.
    """
    computed = pa.array(hashes(urls, captions))
    if given is None:
        counts["hash_computed"] += len(computed)
        return computed
    same = pc.equal(given, computed)
    counts["hash_same"] += pc.sum(same).as_py() or 0
    counts["hash_differs"] += pc.sum(pc.invert(same)).as_py() or 0
    counts["hash_computed"] += given.null_count
    return pc.coalesce(given, computed)


def has_swapped_sizes(names: Collection[str]) -> bool:
    """Tell whether a table with these columns has each WIDTH under HEIGHT and the reverse."""
    return set(names) >= _SIZES_SWAPPED


def is_withdrawn(names: Collection[str]) -> bool:
    """Tell whether these are the columns of LAION's tables from before Re-LAION."""
    return any(set(names) >= known for known in (_BASE, _JOINED, _FETCHED))
