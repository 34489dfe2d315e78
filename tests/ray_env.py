"""A Ray cluster of its own for a test file: import the fixture `ray_cluster` and use it.

    from ray_env import ray_cluster  # noqa: F401

It starts in this process, on loopback, with a token, a home and a temp directory that no other
cluster shares, and it is gone when the file's tests are over. `RayExecutor()` then uses it.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

NUM_CPUS = 4
OBJECT_STORE_BYTES = 100 * 2**20


@cache
def ray_env() -> dict[str, str]:
    """Return the environment in which Ray touches nothing but one new temp directory.

    The directory is short because Ray's sockets lie in it and their paths have at most 107 bytes.
    """
    home = Path(tempfile.mkdtemp(prefix="wr", dir="/tmp"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return {
        "HOME": str(home),
        "RAY_TMPDIR": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A cluster with four CPUs, which is more than the machine may have: they only count."""
    before = dict(os.environ)
    os.environ.update(ray_env())
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    _reread_settings()
    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)
    _reread_settings()


def _reread_settings() -> None:
    """Make Ray forget the mode and token that it read from an earlier environment."""
    from ray import _raylet

    compiled: Any = _raylet  # without type stubs
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()
