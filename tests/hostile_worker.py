"""Fetches the URLs on stdin in a process of its own, and says how much memory that took."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]


def main() -> None:
    """Print {"peak_mb": ..., "statuses": [...]}, as JSON."""
    import hostile_cases

    from curate.download.fetch import FetchConfig, Wanted, fetch

    urls = json.load(sys.stdin)
    config = FetchConfig(attempts=3, retry_wait_seconds=0.0, max_redirects=3)
    wanted = (Wanted(row, url) for row, url in enumerate(urls))
    found = fetch(wanted, config, network=hostile_cases.network())
    statuses = {one.row: one.status for one in found}
    answer = {"peak_mb": peak_mb(), "statuses": [statuses[row] for row in range(len(urls))]}
    sys.stdout.write(json.dumps(answer))


def peak_mb() -> float:
    """Return the most memory this process has had resident, in MB. See proc(5)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


if __name__ == "__main__":
    main()
