"""What a site asks of us in the headers of an image: X-Robots-Tag and tdm-reservation.

Form: `X-Robots-Tag: [agent:] directive[, directive ...]`, any number of times. Directives after an
agent's name are for that agent alone; proxies join several headers into one, so a value may hold
several names. Some directives have a value behind a colon and are no agent.

Sources: Google's robots meta tag specification; TDM Reservation Protocol (W3C community group).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

TDM_RESERVATION = "tdm-reservation"

_WITH_VALUE = {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"}
_AGENT = re.compile(r"\*|[A-Za-z][\w.\-/]*")  # a date's "25 Jun 2010 15" before a colon is none
_SEPARATOR = re.compile(r"[,;]")
_ALIASES = {"none": "noindex"}  # noindex, nofollow


def opt_out(
    robots: Iterable[str],
    tdm_reservation: str | None,
    directives: Collection[str],
    agent_names: Collection[str],
) -> str | None:
    """Return the header that asks us not to use the image, or None.

    Args:
        robots: the values of all X-Robots-Tag headers.
        tdm_reservation: the value of that header, if there is one.
        directives: those honoured, lower case; with "tdm-reservation", that header too.
        agent_names: our names, lower case.
    """
    if tdm_reservation is not None and TDM_RESERVATION in directives:  # noqa: SIM102
        if tdm_reservation.strip() == "1":
            return "tdm-reservation: 1"
    for value in robots:
        for agent, directive in _directives(value):
            is_ours = agent in ("", "*") or agent in agent_names
            if is_ours and _ALIASES.get(directive, directive) in directives:
                return f"X-Robots-Tag: {agent + ': ' if agent else ''}{directive}"
    return None


def _directives(value: str) -> Iterator[tuple[str, str]]:
    """Yield (agent or "", directive) for each directive without a value, lower case."""
    agent = ""
    for part in _SEPARATOR.split(value.lower()):
        name, colon, rest = (text.strip() for text in part.partition(":"))
        if not colon:
            rest = name
        elif name in _WITH_VALUE or not _AGENT.fullmatch(name):
            continue
        else:
            agent = name
        for directive in rest.split():
            yield agent, directive
