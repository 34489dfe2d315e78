"""Every test runs in a home of its own, offline, with the same settings on every machine."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ray_env import ray_env

# Settings of the person or of CI that would change what a test sees.
_FOREIGN = ("RAY_ADDRESS", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "XDG_CACHE_HOME", "FORCE_COLOR")
_FIXED = {
    "OMP_NUM_THREADS": "1",  # sums in one order everywhere; small models are slower with more
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_COLOR": "1",
    "COLUMNS": "100",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
}


def _settle() -> None:
    """Set the environment now: libraries read it when they are imported."""
    for name in _FOREIGN:
        os.environ.pop(name, None)
    os.environ.update(_FIXED | ray_env())
    temp_dir = Path(os.environ["HOME"]) / "tmp"
    temp_dir.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temp_dir)


def _refuse_network(event: str, args: tuple[Any, ...]) -> None:
    """Stop a connection or a name look-up that leaves this machine. See sys.addaudithook."""
    if event == "socket.connect":
        opened, address = args
        # A datagram socket sends nothing here: connecting one is how Ray asks for its own address.
        if opened.family in (socket.AF_INET, socket.AF_INET6) and opened.type != socket.SOCK_DGRAM:
            _check_is_here(address[0])
    elif event == "socket.getaddrinfo":
        _check_is_here(args[0])


def _check_is_here(host: str | bytes | None) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return
    try:
        is_here = ip_address(str(name)).is_loopback
    except ValueError:
        is_here = False
    if not is_here:
        raise RuntimeError(f"a test tried to reach {name}: tests use no network")


_settle()
sys.addaudithook(_refuse_network)
