"""The clean stage: conversations that a trainer can use, and why the others are not.

    part-00000.parquet             CLEANED: digest and figures of each kept row, names of its mends
    verdicts/part-00000.parquet    VERDICTS of all rows

A row is mended first (curate/rows/mend.py), then judged (curate/rows/clean_rules.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.media.llava_rows import CHARS_PER_TOKEN, IMAGE_PLACEHOLDER
from curate.rows import clean_rules, token_counts
from curate.rows.clean_config import CleanConfig, benchmark_images, identity
from curate.rows.conversation_hash import hashes
from curate.rows.conversation_parts import read_conversations
from curate.rows.mend import SEPARATOR, Names, mend_all
from curate.rows.turns import GPT, Images, Ints, Mask, Turns
from manifests import ledger
from manifests.schemas import CLEANED, conform
from manifests.work import Item, Output, View, part_name

__all__ = ["CleanConfig", "clean", "identity", "plan", "work"]

STAGE = "clean"


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What became of some conversations.

    table: CLEANED, of the kept rows; verdicts: VERDICTS, of all; mended: mend -> kept rows with it.
    """

    table: pa.Table
    verdicts: pa.Table
    mended: dict[str, int]


@dataclass(frozen=True, slots=True)
class Judged:
    """Why each row is dropped, object [n], "" for kept; tokens: float64 [n], NaN if not counted."""

    reasons: Names
    tokens: npt.NDArray[np.float64]


def plan(view: View) -> list[Item]:
    """One item per source part."""
    return [Item(part_name(one["part"]), {"part": one["part"]}) for one in view.parts()]


def work(view: View, item: Item) -> Output:
    """Clean one part."""
    config = CleanConfig.model_validate(view.config)
    made = clean(_conversations(view, item.payload["part"]), config)
    return Output(
        files={f"{item.name}.parquet": made.table},
        verdicts=made.verdicts,
        notes={"mended": made.mended},
    )


def clean(conversations: pa.Table, config: CleanConfig) -> Cleaned:
    """Mend and judge a CONVERSATIONS table.

    Raises: UserError for a list or tokenizer that cannot be read.
    """
    images = Images.of(conversations)
    mends, turns = mend_all(Turns.of(conversations), config)
    judged = judge(turns, images, config)
    kept = judged.reasons == ""
    uids = conversations.column("uid").to_numpy()
    return Cleaned(
        _figures(uids, mends, turns, images, np.flatnonzero(kept)),
        _verdicts(uids, mends, judged, config),
        _num_mended(mends[kept]),
    )


def judge(turns: Turns, images: Images, config: CleanConfig) -> Judged:
    """Return the first rule that drops each of n mended conversations."""
    rules = clean_rules.shape_rules(turns, images)
    rules["message_is_empty"] = clean_rules.has_failed_answer(turns, images)
    if config.repeated_output_min_chars is not None:
        min_chars = config.repeated_output_min_chars
        rules["repeated_output"] = clean_rules.repeats_question(turns, min_chars)
    if config.leakage:
        rules["benchmark_leakage"] = clean_rules.is_leaked(images, benchmark_images(config))
    reasons: Names = np.full(turns.num_rows, "", object)
    for reason, applies in rules.items():
        reasons[applies & (reasons == "")] = reason
    tokens = np.full(turns.num_rows, np.nan)
    if config.max_tokens is not None:
        good = reasons == ""
        tokens[good] = _tokens(turns, images, good, config)[good]
        reasons[tokens > config.max_tokens] = "too_long"  # NaN is not greater
    return Judged(reasons, tokens)


def _tokens(turns: Turns, images: Images, rows: Mask, config: CleanConfig) -> Ints:
    tokenizer = token_counts.load(config.tokenizer or "")
    of_text = token_counts.num_tokens(turns, rows, tokenizer)
    found: Ints = of_text + config.image_tokens * images.counts
    return found


def _figures(
    uids: npt.NDArray[np.uint64], mends: Names, turns: Turns, images: Images, rows: Ints
) -> pa.Table:
    """Return CLEANED of the kept rows. Args: rows: their numbers, ascending."""
    num_chars = turns.num_chars() - len(IMAGE_PLACEHOLDER) * turns.num_placeholders()
    columns = {
        "uid": pa.array(uids[rows]),
        "mended": pa.array(mends[rows], pa.string()),
        "conversation_hash": hashes(turns, images, rows),
        "rounds": pa.array(turns.sums(turns.code == GPT)[rows]),
        "num_images": pa.array(images.counts[rows]),
        "token_estimate": pa.array(-(-turns.sums(num_chars) // CHARS_PER_TOKEN)[rows]),
    }
    return conform(pa.table(columns), CLEANED)


def _verdicts(
    uids: npt.NDArray[np.uint64], mends: Names, judged: Judged, config: CleanConfig
) -> pa.Table:
    reasons = judged.reasons.copy()
    mended = (reasons == "") & (mends != "")
    reasons[mended] = ledger.MENDED_PREFIX + mends[mended]
    too_long = judged.reasons == "too_long"
    scores = np.where(too_long, judged.tokens, np.nan)
    cutoffs = np.where(too_long, float(config.max_tokens or 0), np.nan)
    return ledger.verdicts(STAGE, uids, reasons=reasons, scores=scores, cutoffs=cutoffs)


def _num_mended(mends: Names) -> dict[str, int]:
    lists = Counter(mends[mends != ""])
    found: Counter[str] = Counter()
    for names, count in lists.items():
        found.update(dict.fromkeys(names.split(SEPARATOR), count))
    return dict(sorted(found.items()))


def _conversations(view: View, part: int) -> pa.Table:
    """Return the CONVERSATIONS rows of one part that the previous stage kept."""
    table = read_conversations(view.before["ingest"], part)
    if view.previous.stage == "ingest":
        return table
    return table.filter(pc.is_in(table.column("uid"), pa.array(view.kept_in_part(part))))
