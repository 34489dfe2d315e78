"""The fetcher against a server that does everything wrong: each case and its status."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hostile_cases
import hostile_images as images
import pytest
from hostile_cases import CONFIG, HASTY, HASTY_TO_CONNECT, LIMITS, Case
from hostile_server import HostileServer, Peer, answer, self_signed

from curate.download.content import look, status_of
from curate.download.fetch import FetchConfig, Fetched, Wanted, fetch
from curate.download.statuses import TRANSIENT, Status, img2dataset_status
from curate.media.images import ImageError, decode

ROOT = Path(__file__).parents[1]
MAX_RSS_MB = 300
SPELLED = ("spelled ", "host ")  # cases whose path on the wire is another, or is shared
Hashes = tuple[bytes | None, bytes | None]  # md5, sha256
OPEN = FetchConfig(allow_private_addresses=True, retry_wait_seconds=0.0)


def fetched_all(
    urls: list[str],
    config: FetchConfig,
    hashes: list[tuple[bytes | None, bytes | None]] | None = None,
) -> list[Fetched]:
    pairs = hashes or [(None, None)] * len(urls)
    wanted = (Wanted(row, url, *pairs[row]) for row, url in enumerate(urls))
    found = {one.row: one for one in fetch(wanted, config, network=hostile_cases.network())}
    return [found[row] for row in range(len(urls))]


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[HostileServer, HostileServer]]:
    with HostileServer() as server, HostileServer("127.0.0.2") as forbidden:
        yield server, forbidden


@pytest.fixture(scope="module")
def found(world: tuple[HostileServer, HostileServer]) -> list[tuple[Case, Fetched]]:
    cases = hostile_cases.made(*world)
    return list(zip(cases, fetched_all([case.url for case in cases], CONFIG), strict=True))


def test_every_case_has_its_status(found: list[tuple[Case, Fetched]]) -> None:
    wrong = [
        f"{case.name}: {one.status}, not {case.fetch} ({one.detail})"
        for case, one in found
        if one.status is not case.fetch
    ]
    assert not wrong, "\n".join(wrong)
    assert len({case.name for case, _ in found}) == len(found) >= 220


def test_every_image_has_its_status_in_the_end(found: list[tuple[Case, Fetched]]) -> None:
    wrong = [
        f"{case.name}: {final_status(one)}, not {case.final_status}"
        for case, one in found
        if final_status(one) is not case.final_status
    ]
    assert not wrong, "\n".join(wrong)


def final_status(one: Fetched) -> Status:
    if one.data is None:
        return one.status
    seen = look(one.data, LIMITS)
    if seen.status is not Status.OK:
        return seen.status
    try:
        decode(one.data, max_pixels=LIMITS.max_pixels)
    except ImageError as error:
        return status_of(error)
    return Status.OK


def test_there_is_data_and_its_hash_exactly_where_it_is_ok(
    found: list[tuple[Case, Fetched]],
) -> None:
    for _, one in found:
        assert (one.data is not None) == (one.status is Status.OK) == (one.detail == "")
        expected = None if one.data is None else hashlib.sha256(one.data).digest()
        assert one.sha256 == expected
        assert one.detail.encode().decode().isprintable(), "a line that any file may hold"
        assert (one.final_url or "").isascii()


def test_only_what_may_pass_is_asked_again_and_what_is_refused_is_never_asked(
    world: tuple[HostileServer, HostileServer], found: list[tuple[Case, Fetched]]
) -> None:
    server, _ = world
    wrong = []
    for case, one in found:
        asked = server.times_asked[case.url.removeprefix(server.url().removesuffix("/"))]
        is_shared = "/to/" in case.url  # other redirects lead there too
        if asked != case.times_asked and not is_shared and not case.name.startswith(SPELLED):
            wrong.append(f"{case.name}: asked {asked} times, not {case.times_asked}")
        if one.num_attempts > 1 and one.status not in TRANSIENT and case.times_asked == 1:
            wrong.append(f"{case.name}: {one.num_attempts} attempts")
    assert not wrong, "\n".join(wrong)


def test_answers_changed_at_random_have_a_status_too(
    world: tuple[HostileServer, HostileServer],
) -> None:
    """No answer may end the whole call, and none may be waited for without end."""
    server, _ = world
    damaged = hostile_cases.damaged(num_answers=600, seed=2)
    urls = [server.serve_raw(f"/damaged/{row}", data) for row, data in enumerate(damaged)]
    found = fetched_all(urls, CONFIG.model_copy(update={"attempts": 1}))
    assert len({one.status for one in found}) >= 8


def test_nothing_reaches_the_forbidden_server(
    world: tuple[HostileServer, HostileServer], found: list[tuple[Case, Fetched]]
) -> None:
    """It listens: a plain connection to it counts."""
    _, forbidden = world
    assert sum(one.status is Status.BLOCKED_IP for _, one in found) >= 30
    assert forbidden.num_connections == 0
    with socket.create_connection((forbidden.host, forbidden.port)) as peer:
        peer.sendall(b"GET /secret HTTP/1.1\r\n\r\n")
        assert peer.recv(12) == b"HTTP/1.1 404"
    assert forbidden.num_connections == 1


def test_only_a_deadline_ends_what_does_not_end(world: tuple[HostileServer, HostileServer]) -> None:
    cases = hostile_cases.endless(world[0])
    found = fetched_all([case.url for case in cases], HASTY)
    assert [one.status for one in found] == [case.fetch for case in cases]


def test_a_handshake_that_does_not_end_is_a_connection_not_made() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        (one,) = fetched_all([f"https://127.0.0.1:{port}/"], HASTY_TO_CONNECT)
    assert one.status is Status.TIMEOUT_CONNECT


def test_the_machine_itself_is_refused_without_any_setting() -> None:
    with HostileServer() as server:
        url = server.serve_bytes("/a.jpg", images.jpeg())
        (refused,) = fetch([Wanted(0, url)], FetchConfig())
        assert refused.status is Status.BLOCKED_IP
        assert server.num_connections == 0
        (taken,) = fetch([Wanted(0, url)], OPEN)
        assert taken.data == images.jpeg()


def test_localhost_by_the_machines_own_resolver_is_refused() -> None:
    with HostileServer() as server:
        (one,) = fetch([Wanted(0, f"http://localhost:{server.port}/")], FetchConfig())
        assert one.status is Status.BLOCKED_IP
        assert server.num_connections == 0


def test_a_certificate_that_nobody_vouches_for(tmp_path: Path) -> None:
    with HostileServer(tls=self_signed(tmp_path)) as server:
        url = server.serve_bytes("/a.jpg", images.jpeg())
        (refused,) = fetch([Wanted(0, url)], OPEN)
        assert refused.status is Status.TLS
        assert not server.requests
        (taken,) = fetch([Wanted(0, url)], OPEN.model_copy(update={"verify_tls": False}))
        assert taken.status is Status.OK


def test_hashes_are_compared_before_anything_else_is_done() -> None:
    data = images.jpeg()
    md5, sha256 = hashlib.md5(data, usedforsecurity=False).digest(), hashlib.sha256(data).digest()
    hashes = [
        (md5, None),
        (None, sha256),
        (md5, sha256),
        (None, None),
        (md5, bytes(32)),
        (bytes(16), None),
    ]
    expected = ["match", "match", "match", "absent", "mismatch", "mismatch"]
    with HostileServer() as server:
        urls = [server.serve_bytes("/a.jpg", data)] * len(hashes)
        dropped = fetched_all(urls, CONFIG, hashes)
        flagged = fetched_all(urls, CONFIG.model_copy(update={"on_hash_mismatch": "flag"}), hashes)
    assert [one.hash_check for one in dropped] == expected
    assert [one.hash_check for one in flagged] == expected
    assert {one.status for one in dropped[:4] + flagged} == {Status.OK}
    assert {(one.status, one.data) for one in dropped[4:]} == {(Status.HASH_MISMATCH, None)}
    assert {one.sha256 for one in dropped} == {sha256}


def test_who_asks_is_said_and_nothing_else_is_told() -> None:
    with HostileServer() as server:
        server.serve_bytes("/a", images.jpeg(), {"Set-Cookie": "id=1; Path=/"})
        fetched_all([server.url("/a")] * 3, CONFIG.model_copy(update={"concurrency": 1}))
        assert server.num_connections == 2, "one for a new host, one for all that follow"
        for number, request in enumerate(server.requests):
            assert request.headers.pop("host") == f"127.0.0.1:{server.port}"
            assert request.headers.pop("connection", "") == ("" if number else "close")
            assert request.headers == {
                "user-agent": CONFIG.user_agent,
                "accept": "image/*, */*;q=0.5",
                "accept-encoding": "identity",
            }


def test_a_server_is_not_asked_by_more_connections_than_allowed() -> None:
    """The others wait their turn, and that is not counted as the server's time."""
    lock, now, most = threading.Lock(), [0], [0]

    with HostileServer() as server:

        async def script(peer: Peer) -> None:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            await asyncio.sleep(0.1)
            with lock:
                now[0] -= 1
            await peer.send(answer(images.jpeg()))

        url = server.serve("/a.jpg", script, keep_open=True)
        config = CONFIG.model_copy(update={"connections_per_host": 2, "total_timeout_seconds": 1.0})
        found = fetched_all([url] * 40, config)  # 2 s in all
    assert {one.status for one in found} == {Status.OK}
    assert most == [2]


def test_hosts_that_are_asked_once_keep_no_connection() -> None:
    """Their server would keep each open; a process may have about a thousand."""
    with HostileServer() as server:
        server.serve_bytes("/a.jpg", images.jpeg())
        urls = [f"http://once-{number}.test:{server.port}/a.jpg" for number in range(200)]
        found = fetched_all(urls, CONFIG.model_copy(update={"concurrency": 8}))
        assert {one.status for one in found} == {Status.OK}
        assert server.num_connections == 200
        assert server.most_open <= 3 * 8, "as many again may not have seen the end yet"


def test_urls_are_read_as_there_is_room_and_closing_early_ends_all() -> None:
    read = []
    with HostileServer() as server:
        url = server.serve_bytes("/a.jpg", images.jpeg())

        def endless() -> Iterator[Wanted]:
            while True:
                read.append(url)
                yield Wanted(len(read), url)

        results = fetch(endless(), OPEN.model_copy(update={"concurrency": 4}))
        for _ in range(50):
            assert next(results).status is Status.OK
        threads = threading.active_count()
        results.close()
        assert threading.active_count() == threads - 1
    assert 50 <= len(read) <= 50 + 2 * 4 + 200


def test_bytes_that_nobody_takes_are_not_read() -> None:
    """60 files of 1 MiB, of which 4 MiB may be held, while the caller sleeps."""
    data = bytes(2**20)
    with HostileServer() as server:
        urls = [server.serve_bytes(f"/{number}", data) for number in range(60)]
        limits = {"max_bytes_in_flight": 4 * 2**20, "total_timeout_seconds": 2.0}
        results = fetch((Wanted(0, url) for url in urls), OPEN.model_copy(update=limits))
        first = next(results)
        time.sleep(2.5)  # longer than a deadline: waiting for us does not count
        found = [first, *results]
    assert [one.status for one in found] == [Status.OK] * 60


def test_what_the_list_of_urls_raises_is_raised() -> None:
    def broken() -> Iterator[Wanted]:
        yield Wanted(0, "file:///a")
        raise LookupError("row 1")

    results = fetch(broken(), CONFIG)
    assert next(results).status is Status.BLOCKED_SCHEME
    with pytest.raises(LookupError, match="row 1"):
        next(results)


def test_a_longer_wait_that_a_server_asks_for_is_kept_up_to_the_limit() -> None:
    """Retry-After: a day; the limit ends the wait."""
    with HostileServer() as server:
        busy = answer(b"", [("Retry-After", "86400")], status="503 Busy")
        url = server.serve("/a", hostile_cases.in_turn(busy, answer(images.jpeg())), keep_open=True)
        (one,) = fetched_all([url], CONFIG.model_copy(update={"max_retry_wait_seconds": 0.2}))
    assert (one.status, one.num_attempts) == (Status.OK, 2)


def test_every_status_has_img2datasets_word() -> None:
    assert img2dataset_status(Status.OK) == "success"
    assert img2dataset_status(Status.HASH_MISMATCH) == "failed_to_download"
    assert img2dataset_status(Status.TRUNCATED_IMAGE) == "failed_to_resize"
    assert {img2dataset_status(status) for status in Status if status is not Status.OK} == {
        "failed_to_download",
        "failed_to_resize",
    }


def test_a_worker_stays_small_under_the_whole_list_with_the_limits_as_they_are(
    world: tuple[HostileServer, HostileServer],
) -> None:
    """A new process with the default limits on bytes, and many files at once that exceed them."""
    server, forbidden = world
    cases = hostile_cases.made(server, forbidden)
    large = hostile_cases.large(server)
    peak_mb, statuses = in_new_process([case.url for case in [*cases, *large]])
    for case, status in zip([*cases, *large], statuses, strict=True):
        if case.fetch is not Status.TOO_LARGE or case in large:
            assert status == case.fetch, case.name
    assert peak_mb <= MAX_RSS_MB


def in_new_process(urls: list[str]) -> tuple[float, list[str]]:
    """Return the peak of resident memory in MB, and the statuses."""
    command = [sys.executable, str(ROOT / "tests" / "hostile_worker.py")]
    done = subprocess.run(
        command, cwd=ROOT, input=json.dumps(urls), capture_output=True, text=True, check=True
    )
    answer = json.loads(done.stdout)
    return answer["peak_mb"], answer["statuses"]
