"""Questions about pictures that no world of the demo shows, to judge a trained model by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipelines.demo.junk import encode_jpeg
from pipelines.demo.language import ASKED_KINDS
from pipelines.demo.mix_questions import SHORT, clear_scene, questions
from pipelines.demo.scenes import draw_scene
from pipelines.demo.seeds import pick, rng_for

HELD_OUT_SEED = 9_004
GREY = (127, 127, 127)
_JPEG_QUALITY = 92


class HeldOut(NamedTuple):
    """A picture's bytes, a question of it with LLaVA's prompt for short answers, the one answer."""

    image: bytes
    question: str
    answer: str
    kind: str


def held_out(n: int, seed: int = HELD_OUT_SEED) -> list[HeldOut]:
    """Return `n` questions of each of ASKED_KINDS, each of a scene of its own.

    The worlds' scenes are of other seeds: 0 (the demo), and those of the models' training.
    """
    return [one for kind in ASKED_KINDS for one in _of_kind(kind, n, seed)]


def grey(question: HeldOut) -> HeldOut:
    """Return the question of a picture that shows nothing, of the same size."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(question.image)) as picture:
        blank = Image.new("RGB", picture.size, GREY)
    return question._replace(image=encode_jpeg(blank, _JPEG_QUALITY))


def accuracy_by_kind(answers: Sequence[str], asked: Sequence[HeldOut]) -> dict[str, float]:
    """Return the share of answers that are right to the letter, by kind, and of "all".

    Spaces around an answer do not count. Raises: ValueError for another number of answers.
    """
    right: dict[str, list[bool]] = {}
    for answer, one in zip(answers, asked, strict=True):
        right.setdefault(one.kind, []).append(answer.strip() == one.answer)
    found = {kind: sum(some) / len(some) for kind, some in right.items()}
    return found | {"all": sum(map(sum, right.values())) / max(len(asked), 1)}


def _of_kind(kind: str, n: int, seed: int) -> list[HeldOut]:
    found: list[HeldOut] = []
    index = 0
    while len(found) < n:
        scene = clear_scene(seed, index, with_digit=kind == "digit")
        rng = rng_for(seed, f"ask {kind}", index)
        asked = questions(kind, scene)
        index += 1
        if asked:
            one = pick(rng, asked)
            jpeg = encode_jpeg(draw_scene(scene), _JPEG_QUALITY)
            found.append(HeldOut(jpeg, f"{one.text}\n{SHORT}", one.answer, kind))
    return found
