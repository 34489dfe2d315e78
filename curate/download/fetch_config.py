"""How URLs are fetched: limits, patience, manners."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from manifests.strict import Strict


class FetchConfig(Strict):
    """How one worker fetches. Every limit holds for each URL, whatever its server does."""

    concurrency: int = Field(default=64, ge=1)
    """URLs in flight at once; with max_bytes it bounds the memory."""
    connections_per_host: int = Field(default=8, ge=1)
    """Connections to one host at once; more URLs of it wait their turn."""
    connect_timeout_seconds: float = Field(default=10.0, gt=0)
    """For the name, the connection and the TLS handshake of one hop."""
    total_timeout_seconds: float = Field(default=30.0, gt=0)
    """For one attempt from its start to its last byte, redirects included. A server that drips is
    not waited for."""
    max_bytes: int = Field(default=32 * 2**20, ge=1)
    """Longest file, also once inflated."""
    max_bytes_in_flight: int = Field(default=32 * 2**20, ge=1)
    """Bytes of all files in flight and not yet taken, and as many again of those that are being
    encoded: where they are more, reading waits. A file alone may always go on."""
    max_redirects: int = Field(default=5, ge=0)
    """Redirects followed, each one checked as the first URL was."""
    attempts: int = Field(default=2, ge=1)
    """How often a URL is tried when what failed may pass."""
    retry_wait_seconds: float = Field(default=1.0, ge=0)
    """Before the second attempt; doubled before each further one. A server's Retry-After is waited
    for if it is longer."""
    max_retry_wait_seconds: float = Field(default=30.0, ge=0)
    """The longest wait before an attempt, whatever a server asks for."""
    user_agent: str = Field(default="warren/0.1 (image-text curation)", pattern=r"^[!-~][ -~]*$")
    """Who asks. Add a page or an address where you can be reached."""
    agent_names: list[str] = ["warren"]
    """The names under which a site may address us in X-Robots-Tag, besides all."""
    opt_out_directives: list[str] = [
        "noai",
        "noimageai",
        "noindex",
        "noimageindex",
        "noml",
        "tdm-reservation",
    ]
    """X-Robots-Tag directives that are honoured; `tdm-reservation` in this list stands for the
    header of that name. Empty: none is."""
    on_hash_mismatch: Literal["drop", "flag"] = "drop"
    """A file that is not the one the source has hashed: hash_mismatch, or ok and flagged."""
    allow_private_addresses: bool = False
    """Fetch from addresses that are not public too: for tests and intranets."""
    verify_tls: bool = True
    """Refuse certificates that are not valid."""
    max_url_characters: int = Field(default=8192, ge=1)
    """Longer URLs are bad_url."""
