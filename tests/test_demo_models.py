"""The models that ship with the demo: small, stock, and good enough to be taught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from small_llava import ensure_torchvision_importable

from pipelines.demo import judge_language_model, judge_tower
from pipelines.demo.patches import ASKED, answers_of, make_pictures
from pipelines.demo.scenes import SHAPES, Scene, Thing
from pipelines.demo.vlm_questions import ASKED_KINDS, accuracy_by_kind, grey, held_out
from train.models.compose import Composed, compose
from train.text.template import BUNNY_SYSTEM

ensure_torchvision_importable()

DEMO = Path(__file__).parent.parent / "pipelines" / "demo"
TOWER, LANGUAGE_MODEL = DEMO / "tower", DEMO / "language_model"
MOST_BYTES = 6_000_000


@pytest.fixture(scope="module", name="composed")
def composed_demo_models(tmp_path_factory: pytest.TempPathFactory) -> Composed:
    out = tmp_path_factory.mktemp("composed") / "llava"
    return compose(str(TOWER), str(LANGUAGE_MODEL), str(out))


def test_all_shipped_models_together_are_small() -> None:
    folders = (DEMO / "model", TOWER, LANGUAGE_MODEL)
    assert sum(path.stat().st_size for one in folders for path in one.iterdir()) <= MOST_BYTES


def test_plain_transformers_loads_the_shipped_models_whole() -> None:
    for kind, folder in (
        (transformers.SiglipVisionModel, TOWER),
        (transformers.AutoModelForCausalLM, LANGUAGE_MODEL),
    ):
        model, found = kind.from_pretrained(folder, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"]
        assert all(one.isfinite().all() for one in model.parameters())


def test_the_shipped_models_compose_without_a_warning(composed: Composed) -> None:
    assert composed.warnings == []
    assert composed.num_image_tokens == 64
    tokenizer = transformers.AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    assert composed.image_token_id >= len(tokenizer)  # a row that no text used


def test_the_tower_tells_more_of_held_out_pictures_than_their_pixels() -> None:
    found = judge_tower.judge(TOWER, num_train=300, num_test=150)
    floors = {"colour": 0.9, "what": 0.85, "place": 0.85, "background": 0.9, "number": 0.8}
    for name, floor in floors.items():
        assert found[name] > max(floor, found[f"{name}, of raw pixels"]), name


def test_the_language_model_knows_the_texts_but_no_picture() -> None:
    found = judge_language_model.judge(LANGUAGE_MODEL, num_texts=150)
    assert found["perplexity, all"] < 2.5 < 20 < found["perplexity, by word counts alone"]
    assert found["right answers, told"] > 0.6
    assert found["right answers, told"] > found["right answers, not told"] + 0.2


def test_the_tokenizer_writes_the_templates_words_shortly_and_every_text_whole() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    prompt = f"{BUNNY_SYSTEM} USER: What colour is the star? ASSISTANT:"
    assert len(tokenizer(prompt).input_ids) <= 12
    for text in (prompt, "zebra ÿ 円が三個 → ☕ \t\n [0.25, 1.00]", "  two  spaces "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("a<|endoftext|>").input_ids[-1] == tokenizer.eos_token_id


def test_answers_of_patches_are_those_of_the_thing_that_covers_them() -> None:
    thing = Thing("square", "red", "medium", "top left", x=0.25, y=0.25, radius=0.25, angle=0.0)
    found = answers_of(_scene(thing, width=64, height=64), pad=False).reshape(8, 8, -1)
    shown = np.array([[ASKED["what"][what] for what in row] for row in found[:, :, 0]])
    expected = np.full((8, 8), "nothing", dtype=object)
    expected[:4, :4] = "square"  # its sides are at 0.9 of the radius: 1.6 to 30.4 pixels
    assert (shown == expected).all()
    names = list(ASKED)
    assert {ASKED["colour"][one] for one in found[:4, :4, 1].ravel()} == {"red"}
    assert (found[:, :, names.index("number of square")] == 1).all()
    assert all((found[:, :, names.index(f"number of {s}")] == 0).all() for s in SHAPES[:1])


def test_a_padded_pictures_things_lie_where_the_padding_leaves_them() -> None:
    thing = Thing("square", "red", "small", "left", x=0.0, y=0.5, radius=0.2, angle=0.0)
    found = answers_of(_scene(thing, width=64, height=128), pad=True).reshape(8, 8, -1)
    columns = np.flatnonzero(found[:, :, 0].any(axis=0)).tolist()
    assert columns == [2]  # the picture fills the columns 2 to 5


def test_pictures_are_a_function_of_their_numbers() -> None:
    whole, part = make_pictures(5, range(4), num_captions=1), make_pictures(5, range(2, 4))
    assert (whole.pixels[2:] == part.pixels).all() and (whole.answers[2:] == part.answers).all()


def test_held_out_questions_are_the_same_every_time_and_of_every_kind() -> None:
    asked = held_out(3)
    assert asked == held_out(3) != held_out(3, seed=1)
    assert [one.kind for one in asked] == [kind for kind in ASKED_KINDS for _ in range(3)]
    assert grey(asked[0]).question == asked[0].question
    assert len({grey(one).image for one in asked}) < len({one.image for one in asked})


def test_accuracy_counts_answers_that_are_right_to_the_letter() -> None:
    asked = held_out(2)
    said = [one.answer for one in asked]
    said[0], said[1] = f" {said[0]} ", f"{said[1]}s"
    found = accuracy_by_kind(said, asked)
    assert found["colour"] == 0.5 and found["shape"] == 1.0
    assert found["all"] == 1 - 1 / len(asked)


def _scene(thing: Thing, **size: int) -> Scene:
    rest: dict[str, Any] = {"digit": None, "digit_colour": None, "digit_row": None}
    return Scene(
        "single", (thing,), None, **rest, background="grey", texture="flat", texture_seed=0, **size
    )
