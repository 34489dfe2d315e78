"""Lineage: the story and the fate of each sample of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_inputs import chain_with_losses

from manifests import lineage
from manifests.errors import PartDamaged, UserError
from manifests.work import StageDir


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, StageDir]:
    return chain_with_losses(tmp_path)


def test_why_tells_each_sample_its_own_story(chain: dict[str, StageDir]) -> None:
    told = {}
    for name in ("long", "short", "broken"):
        (story,) = lineage.why(chain, name)
        told[name] = (story.uid, story.fate, [(s.stage, s.fate, s.reason) for s in story.steps])
    assert told["long"] == (0, "kept", [("ingest", "kept", ""), ("filter", "kept", "")])
    assert told["short"][1] == "dropped by filter: caption_words_below"
    assert told["broken"] == (
        1 << 24,
        "quarantined by ingest: empty_image",
        [("ingest", "quarantined", "empty_image")],
    )
    (story,) = lineage.why(chain, "short")
    assert dict(story.steps[-1].facts) == {"score": 1.0, "cutoff": 2.0}
    assert story.sample["caption"] == "one"
    (story,) = lineage.why(chain, "broken")
    assert story.steps[0].facts["detail"] == "'broken.jpg' has no bytes"
    json.dumps(story.as_json(), allow_nan=False)


def test_why_takes_a_uid_and_tells_every_sample_of_a_shared_key(chain: dict[str, StageDir]) -> None:
    assert [story.uid for story in lineage.why(chain, "twice")] == [1 << 24 | 1, 2 << 24]
    (story,) = lineage.why(chain, str(1 << 24))
    assert story.key == "broken"
    (story,) = lineage.why(chain, "3")
    assert story.uid == 2 << 24 | 1, "a key goes before a uid"
    for unknown in ("none", "99", str(2**64), "-1", "\u0663", ""):
        with pytest.raises(UserError, match="No sample has the key, uid or URL"):
            lineage.why(chain, unknown)


def test_fates_name_the_stage_and_reason_of_every_loss(chain: dict[str, StageDir]) -> None:
    found = {row["uid"]: row for row in lineage.fates(chain).iter_rows(named=True)}
    assert len(found) == 6
    assert {uid: row["reason"] for uid, row in found.items() if not row["kept"]} == {
        1: "caption_words_below",
        1 << 24: "quarantine:empty_image",
    }
    assert (found[1]["stage"], found[1]["key"]) == ("filter", "short")
    assert (found[0]["stage"], found[0]["reason"]) == ("", "")


def test_a_damaged_table_is_named_by_why(chain: dict[str, StageDir]) -> None:
    Path(chain["ingest"].files()[0]).write_bytes(b"PAR1")
    with pytest.raises(PartDamaged, match="cannot be read"):
        lineage.why(chain, "long")
