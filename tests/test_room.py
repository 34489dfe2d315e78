"""What URLs in flight share: bytes, connections to a host, and a clock that can stand still."""

from __future__ import annotations

import asyncio

import pytest

from curate.download.room import ByteRoom, Deadline, Holding, HostRoom, RecentHosts


def test_bytes_beyond_the_limit_wait_but_for_one_file_until_it_is_taken() -> None:
    async def story() -> list[str]:
        room, done = ByteRoom(10), []
        first, second, third = Holding(), Holding(), Holding()
        async with asyncio.timeout(60) as timeout:
            deadline = Deadline(timeout)

            async def take(name: str, holding: Holding, num_bytes: int) -> None:
                await room.take(holding, num_bytes, deadline)
                done.append(name)

            await take("first: 6 of 10", first, 6)
            await take("second: 12, let through", second, 6)
            waiting = asyncio.create_task(take("third: 7", third, 1))
            await asyncio.sleep(0)
            await take("second: 100 more, still the one", second, 100)
            room.set(second, 106)  # read to its end; nobody has taken it
            await asyncio.sleep(0)
            done.append("second is taken")
            room.set(second, 0)
            await waiting
        return done

    assert asyncio.run(story()) == [
        "first: 6 of 10",
        "second: 12, let through",
        "second: 100 more, still the one",
        "second is taken",
        "third: 7",
    ]


def test_time_that_we_wait_for_ourselves_does_not_count_and_then_goes_on() -> None:
    async def story() -> None:
        async with asyncio.timeout(0.05) as timeout:
            async with Deadline(timeout).standing_still():
                await asyncio.sleep(0.3)
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        asyncio.run(story())


def test_a_host_that_nobody_asks_any_more_is_forgotten() -> None:
    async def story() -> None:
        room = HostRoom(1)
        async with asyncio.timeout(60) as timeout:
            for number in range(3):
                async with room.connection(f"{number}.test", Deadline(timeout)):
                    pass
        assert not room._hosts

    asyncio.run(story())


def test_the_last_hosts_asked_are_known() -> None:
    recent = RecentHosts(most=2)
    asked = [(host, recent.ask(host)) for host in "abacab"]
    assert asked == [
        *(("a", False), ("b", False), ("a", True)),
        *(("c", False), ("a", True), ("b", False)),  # c and a are the last two
    ]
