"""Serves JPEGs from memory on loopback, in a process of its own, as fast as Python does.

    python image_server.py NUM_FILES       prints the port, then the mean size in bytes

/<number>.jpg is file number modulo NUM_FILES: photos of 200 to 900 pixels a side, ~96 kB.
"""

from __future__ import annotations

import asyncio
import io
import sys

import numpy as np
from PIL import Image


class _Peer(asyncio.Protocol):
    """One connection: answers each request in turn and stays open."""

    def __init__(self, answers: list[bytes]) -> None:
        self._answers = answers
        self._asked = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the other side."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer what is whole; a peer that wants no further answer is let go."""
        self._asked += data
        while b"\r\n\r\n" in self._asked:
            head, _, self._asked = self._asked.partition(b"\r\n\r\n")
            number = int(head[5 : head.index(b".jpg")])  # "GET /12.jpg"
            self._transport.write(self._answers[number % len(self._answers)])
            if b"connection: close" in head.lower():
                self._transport.close()


def photo(rng: np.random.Generator) -> bytes:
    """Return a JPEG: large shapes with some grain, so that it has the size of a photo."""
    width, height = (int(side) for side in rng.integers(200, 901, 2))
    shapes = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = rng.normal(0, 9, pixels.shape).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=86)
    return file.getvalue()


def answer(data: bytes) -> bytes:
    """Return a whole HTTP answer."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def serve(num_files: int) -> None:
    """Serve until the process is ended."""
    rng = np.random.default_rng(0)
    answers = [answer(photo(rng)) for _ in range(num_files)]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Peer(answers), "127.0.0.1", 0, backlog=1024)
    mean_bytes = sum(map(len, answers)) // num_files
    print(server.sockets[0].getsockname()[1], mean_bytes, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
