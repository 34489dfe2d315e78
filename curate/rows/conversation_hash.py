"""A digest of what a conversation says and shows: equal for equal rows, whatever their ids."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.rows.turns import Flat, Images, Turns, as_strings

NUM_BYTES = 16


class _Bytes:
    """The UTF-8 of all entries, row after row, and where each row's begins."""

    def __init__(self, flat: Flat, strings: pa.Array) -> None:
        _, offsets, data = strings.buffers()
        ends = np.frombuffer(offsets or b"\0\0\0\0", np.int32)[: len(strings) + 1]
        self.data = memoryview(data or b"")
        self.sizes = np.diff(ends).astype("<i8")
        self.starts = ends[flat.starts].tolist()


def hashes(turns: Turns, images: Images, rows: npt.NDArray[np.int64]) -> pa.Array:
    """Return the digests of some rows, binary(16) [rows].

    Digested are the numbers of images and turns, each one's length in bytes, the roles, and then
    the images' paths and the turns' texts: so no two conversations give the same bytes. Roles that
    the schema does not know count as one. Args: rows: int64, row numbers.
    """
    shown, said = _Bytes(images, as_strings(images.path)), _Bytes(turns, as_strings(turns.text))
    counts = np.stack([images.counts, turns.counts], axis=1).astype("<i8").tobytes()
    path_sizes, text_sizes, roles = (
        array.tobytes() for array in (shown.sizes, said.sizes, turns.code)
    )
    first_image, first_turn = images.starts.tolist(), turns.starts.tolist()
    found = []
    for row in rows.tolist():
        a, b = first_image[row], first_image[row + 1]
        c, d = first_turn[row], first_turn[row + 1]
        content = (
            counts[16 * row : 16 * row + 16],
            path_sizes[8 * a : 8 * b],
            text_sizes[8 * c : 8 * d],
            roles[c:d],
            shown.data[shown.starts[row] : shown.starts[row + 1]],
            said.data[said.starts[row] : said.starts[row + 1]],
        )
        found.append(hashlib.blake2b(b"".join(content), digest_size=NUM_BYTES).digest())
    return pa.array(found, pa.binary(NUM_BYTES))
