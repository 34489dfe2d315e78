"""What is settled stays settled, whatever end a process has met."""

from __future__ import annotations

import errno
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from curate.download import journal as journals
from curate.download.journal import Journal, Span
from manifests.errors import PartDamaged, UserError

SPAN = Span(1.0, 2.0)
ROOT = Path(__file__).parents[1]


def write(folder: Path, *uids: int, word: str = "ok", is_final: bool = True) -> Journal:
    """Settle some rows in an attempt of its own."""
    journal = Journal(folder)
    for uid in uids:
        journal.append(uid, {"status": word}, bytes([uid]) * uid, is_final=is_final)
    return journal


def test_a_new_attempt_reads_what_the_last_one_left(tmp_path: Path) -> None:
    write(tmp_path / "j", 1, 200).close()
    with Journal(tmp_path / "j") as again:
        assert sorted(again.entries) == [1, 200]
        assert again.is_settled(200)
        assert not again.is_settled(3)
        assert again.row(200) == {"status": "ok"}
        assert again.image(200) == bytes([200]) * 200


def test_a_torn_tail_is_dropped_wherever_it_is_torn(tmp_path: Path) -> None:
    write(tmp_path / "j", 10, 20, 30).close()
    (log,) = (tmp_path / "j").glob("*.log")
    whole = log.read_bytes()
    lengths = []
    for end in range(len(whole) + 1):
        log.write_bytes(whole[:end])
        with Journal(tmp_path / "j") as journal:
            lengths.append(len(journal.entries))
            assert all(journal.image(uid) == bytes([uid]) * uid for uid in journal.entries)
    assert lengths == sorted(lengths)
    assert set(lengths) == {0, 1, 2, 3}
    assert lengths.count(3) == 1


def test_changed_bytes_are_found(tmp_path: Path) -> None:
    write(tmp_path / "j", 10, 20, 30).close()
    (log,) = (tmp_path / "j").glob("*.log")
    whole = log.read_bytes()
    for at in range(0, len(whole), 5):
        log.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with Journal(tmp_path / "j") as journal:
            assert len(journal.entries) < 3, at


def test_a_failure_that_may_pass_is_asked_again_and_replaced(tmp_path: Path) -> None:
    write(tmp_path / "j", 1, 2, word="dns", is_final=False).close()
    with Journal(tmp_path / "j") as journal:
        assert not journal.is_settled(1)
        journal.append(1, {"status": "ok"}, b"x", is_final=True)
    with Journal(tmp_path / "j") as journal:
        assert journal.row(1) == {"status": "ok"}
        assert journal.row(2) == {"status": "dns"}


def test_two_attempts_at_once_end_with_what_the_first_has_sealed(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    first, second = Journal(folder), Journal(folder)
    first.append(1, {"status": "ok", "by": 1}, b"one", is_final=True)
    second.append(1, {"status": "ok", "by": 2}, b"another", is_final=True)
    first.append(2, {"status": "dns", "by": 1}, b"", is_final=False)
    second.append(2, {"status": "ok", "by": 2}, b"two", is_final=True)
    first.seal(SPAN)
    second.seal(Span(3.0, 4.0))
    with first, second, Journal(folder) as third:
        for one in (first, second, third):
            assert one.span == SPAN
            assert (one.row(1)["by"], one.image(1), one.row(2)["by"]) == (1, b"one", 1)
            assert one.is_settled(2)  # for good now: no attempt may still change it


def test_without_hard_links_the_first_seal_counts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")  # as vfat does

    monkeypatch.setattr(journals.os, "link", refuse)
    with Journal(tmp_path / "j") as first, Journal(tmp_path / "j") as second:
        first.append(1, {"by": 1}, b"", is_final=True)
        second.append(1, {"by": 2}, b"", is_final=True)
        first.seal(SPAN)
        second.seal(Span(3.0, 4.0))
        assert (second.span, second.row(1)) == (SPAN, {"by": 1})
    assert not list((tmp_path / "j").glob("*.tmp"))


def test_a_seal_counts_what_its_attempt_knew_of_a_log_that_grew(tmp_path: Path) -> None:
    growing = write(tmp_path / "j", 1)
    with Journal(tmp_path / "j") as other:
        growing.append(2, {"status": "ok"}, b"late", is_final=True)
        other.append(2, {"status": "ok"}, b"in time", is_final=True)
        other.seal(SPAN)
    growing.close()
    with Journal(tmp_path / "j") as journal:
        assert journal.image(2) == b"in time"


def test_a_sealed_journal_that_lost_bytes_says_so(tmp_path: Path) -> None:
    with write(tmp_path / "j", 5, 6) as journal:
        journal.seal(SPAN)
    (log,) = (tmp_path / "j").glob("*.log")
    log.write_bytes(log.read_bytes()[:-1])
    with pytest.raises(PartDamaged, match="Delete"):
        Journal(tmp_path / "j")


def test_a_folder_that_cannot_be_made_is_for_the_user_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        Journal(tmp_path / "file" / "j")


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from curate.download.journal import Journal\n"
        "from manifests.errors import UserError\n"
        "try:\n"
        "    with Journal(Path(sys.argv[1])) as journal:\n"
        "        for uid in range(20):\n"
        "            journal.append(uid, {}, bytes(3000), is_final=True)\n"
        "except UserError as error: sys.exit(str(error))\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "j")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit,  # the limit must not be ours
    )
    assert "No space is left to write" in done.stderr
    assert "Traceback" not in done.stderr
    with Journal(tmp_path / "j") as journal:
        assert sorted(journal.entries) == list(range(13))


def test_only_journals_of_finished_items_are_swept(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, 1).close()
    journals.sweep(tmp_path, {"a": True, "b": False})
    assert [one.name for one in tmp_path.iterdir()] == ["b"]
    journals.sweep(tmp_path, {"b": True})
    assert not tmp_path.exists()
