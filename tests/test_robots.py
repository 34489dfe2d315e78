"""X-Robots-Tag and tdm-reservation: what concerns us and what does not."""

from __future__ import annotations

import pytest

from curate.download.fetch_config import FetchConfig
from curate.download.robots import opt_out

CONFIG = FetchConfig()


def asked(robots: list[str], tdm: str | None = None) -> str | None:
    return opt_out(robots, tdm, CONFIG.opt_out_directives, CONFIG.agent_names)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["noai"], "noai"),
        (["NOAI"], "noai"),
        (["nofollow,noimageai"], "noimageai"),
        (["  noindex  "], "noindex"),
        (["nofollow", "noimageindex"], "noimageindex"),
        (["noarchive; noml"], "noml"),
        (["noarchive noai"], "noai"),
        (["none"], "none"),
        (["max-image-preview:large, noai"], "noai"),
        (["max-image-preview: large, max-snippet:-1, noai"], "noai"),
        (["unavailable_after: 25 Jun 2031 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: Wed, 25-Jun-31 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: 2031-06-25T15:00:00+00:00, noai"], "noai"),
        (["warren: noai"], "warren: noai"),
        (["Warren : NoAI"], "warren: noai"),
        (["*: noai"], "*: noai"),
        (["otherbot: nofollow, warren: noai"], "warren: noai"),
        (["warren: nofollow, noai"], "warren: noai"),
        (["otherbot: noai", "noml"], "noml"),
    ],
)
def test_what_concerns_us(values: list[str], reason: str) -> None:
    assert asked(values) == f"X-Robots-Tag: {reason}"


@pytest.mark.parametrize(
    "values",
    [
        *([], [""], ["all"], ["nofollow, noarchive"], ["noaix"], ["no ai"], [",,;"], [":"]),
        *(["otherbot: noai"], ["otherbot: noai, noindex"], ["warren: nofollow, otherbot: noai"]),
        *(["max-image-preview:none"], ["unavailable_after: noai"], ["warrenbot: noai"]),
        ["otherbot: max-snippet:0, noai"],
    ],
)
def test_what_does_not(values: list[str]) -> None:
    assert asked(values) is None


@pytest.mark.parametrize(
    ("value", "is_out"), [("1", True), (" 1 ", True), ("0", False), ("", False)]
)
def test_the_reservation_of_text_and_data_mining(value: str, is_out: bool) -> None:
    assert asked([], value) == ("tdm-reservation: 1" if is_out else None)


def test_only_the_directives_of_the_config_are_honoured() -> None:
    assert opt_out(["noindex, noai"], "1", ["noai"], []) == "X-Robots-Tag: noai"
    assert opt_out(["noindex"], "1", ["noai"], []) is None
    assert opt_out(["none"], None, ["noindex"], []) == "X-Robots-Tag: none"
    assert opt_out(["noindex, noai"], "1", [], []) is None
