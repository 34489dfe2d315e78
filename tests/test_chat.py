"""Prompts are the start of training rows, and answers are those of transformers' own generate."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file
from small_chats import save_pictures, save_talkative_llava
from small_llava import EOS

from manifests.errors import UserError
from pipelines.cli import main
from train.config import LoraConfig
from train.data.images import ImageRules, decode
from train.learn.model import adapter_config
from train.serve.chat import Conversation, chat
from train.serve.generate import Chatter, Decoding, load_model
from train.serve.prompts import Question, Round, read_image
from train.text.template import IGNORED, template_named, tokenize

SHORT = Decoding(max_new_tokens=24)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_talkative_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chatter(model_dir: str) -> Chatter:
    return load_model(model_dir, decoding=SHORT)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def questions(pictures: list[str]) -> list[Question]:
    first, second, third = map(read_image, pictures)
    return [
        Question("Why?", [first]),
        Question("What is on the table, and who put it there?", [second]),
        Question("A text alone: is it longer than the others are, or not?"),
        Question("And now?", [third], [Round("What?", "A bird."), Round("Where?", "There.")]),
        Question("Hm", [first]),
    ]


def by_transformers(model_dir: str, question: Question) -> str:
    """The same by nothing of ours: LlavaProcessor, its chat template, generate."""
    stock: Any = transformers
    model = stock.LlavaForConditionalGeneration.from_pretrained(model_dir).eval()
    processor = stock.AutoProcessor.from_pretrained(model_dir, backend="pil")
    messages: list[dict[str, Any]] = []
    for asked, answer in [*question.history, (question.text, None)]:
        messages.append({"role": "user", "content": [{"type": "text", "text": asked}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"] = [{"type": "image"} for _ in question.images] + messages[0]["content"]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(
        text=text,
        images=list(question.images) or None,
        return_tensors="pt",
        add_special_tokens=False,
    )
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    made = ids[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(made, skip_special_tokens=True)).strip()


def test_answers_are_those_of_the_stock_processor_and_model(
    model_dir: str, chatter: Chatter, questions: list[Question]
) -> None:
    answers = [chatter.answer(one) for one in questions]
    assert answers == [by_transformers(model_dir, one) for one in questions]
    assert len(set(answers)) == len(answers)


def test_batched_answers_are_the_single_ones(chatter: Chatter, questions: list[Question]) -> None:
    single = [chatter.answer(one) for one in questions]
    for batch_size in (2, 3, 8):
        assert chatter.generate_batch(questions, batch_size=batch_size) == single
    assert chatter.generate_batch([]) == []


def test_streamed_pieces_join_to_the_answer(chatter: Chatter, questions: list[Question]) -> None:
    for one in questions:
        assert "".join(chatter.stream(one)) == chatter.answer(one)


def test_a_prompt_is_the_start_of_the_training_row(chatter: Chatter, pictures: list[str]) -> None:
    turns = [("human", "<image>\nWhat? <|endoftext|>"), ("gpt", "A b."), ("human", "Why?")]
    said = [*turns, ("gpt", "So.")]
    row = {"image": "x", "conversations": [{"from": who, "value": text} for who, text in said]}
    tokenizer = chatter.prompts.tokenizer
    for name in ("bunny", "chat"):
        whole = tokenize(
            row,
            template_named(name, tokenizer),
            tokenizer,
            image_token_id=chatter.prompts.image_token_id,
            num_image_tokens=chatter.prompts.tokens_per_image,
            max_length=1000,
        )
        start = np.flatnonzero((whole.labels[1:] != IGNORED) & (whole.labels[:-1] == IGNORED))[-1]
        asked = Question("Why?", [read_image(pictures[0])], [Round("What? <|endoftext|>", "A b.")])
        np.testing.assert_array_equal(chatter.prompts.ids(asked), whole.ids[: start + 1])


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_pixels_are_those_of_training(model_dir: str, pictures: list[str], mode: Any) -> None:
    config = json.loads((Path(model_dir) / "processor_config.json").read_text())["image_processor"]
    expected = ImageRules.from_processor(config, mode=mode)
    served = load_model(model_dir, image_mode=mode).prompts
    for path in pictures:
        pixels = served.pixels(read_image(path))
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(pixels, expected(decode(Path(path).read_bytes())))


def test_the_directory_s_own_processor_can_make_the_pixels(
    model_dir: str, chatter: Chatter, pictures: list[str]
) -> None:
    own = load_model(model_dir, image_mode="processor").prompts  # composed ones pad
    image = read_image(pictures[1])
    np.testing.assert_array_equal(own.pixels(image), chatter.prompts.pixels(image))


def test_history_changes_the_answer_and_a_question_alone_does_not_know_it(
    chatter: Chatter, questions: list[Question]
) -> None:
    told = questions[3]
    alone = Question(told.text, told.images)
    assert chatter.answer(told) != chatter.answer(alone)


def test_generation_stops_at_every_stop_token(chatter: Chatter, questions: list[Question]) -> None:
    inputs = chatter._inputs([chatter.prompts.ids(questions[0])], questions[:1], None)
    made = chatter.model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
    config = chatter.model.generation_config
    before, stop = config.eos_token_id, made[3]
    config.eos_token_id = [*before, stop]
    try:
        shorter = chatter.answer(questions[0])
    finally:
        config.eos_token_id = before
    cut = made[: made.index(stop) + 1]
    assert len(cut) < len(made)
    assert shorter == chatter._texts(torch.tensor([cut]))[0]
    assert chatter.prompts.tokenizer.convert_tokens_to_ids(EOS) in before


def test_a_temperature_draws_and_a_tiny_top_p_is_greedy(
    chatter: Chatter, questions: list[Question]
) -> None:
    torch.manual_seed(0)
    warm = Decoding(max_new_tokens=24, temperature=1.5)
    assert chatter.answer(questions[0], warm) != chatter.answer(questions[0])
    narrow = Decoding(max_new_tokens=24, temperature=1.5, top_p=1e-6)
    assert chatter.answer(questions[0], narrow) == chatter.answer(questions[0])


def test_a_base_model_s_sampling_settings_do_not_count(
    model_dir: str, chatter: Chatter, questions: list[Question], tmp_path: Path
) -> None:
    for path in Path(model_dir).iterdir():
        (tmp_path / path.name).symlink_to(path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    settings |= {"do_sample": True, "temperature": 5.0, "top_k": 7, "top_p": 0.5, "max_length": 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert load_model(str(tmp_path), decoding=SHORT).answer(questions[0]) == chatter.answer(
        questions[0]
    )


def test_a_plain_model_writes_one_line_about_a_picture(
    model_dir: str, chatter: Chatter, questions: list[Question]
) -> None:
    plain = load_model(model_dir, template="plain", decoding=Decoding(max_new_tokens=120))
    ids = plain.prompts.ids(questions[3])
    assert ids.tolist() == [chatter.prompts.image_token_id] * plain.prompts.tokens_per_image
    asked = [one for one in questions if one.images]
    captions = plain.generate_batch(asked)
    assert captions == [plain.answer(one) for one in asked]
    assert not any("\n" in one for one in captions)
    with pytest.raises(UserError, match="no picture"):
        plain.answer(questions[2])


def with_adapter(model: Any) -> Any:
    import peft  # after small_llava has made torchvision importable

    with warnings.catch_warnings():  # peft asks by a name that transformers is about to drop
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return peft.get_peft_model(model, adapter_config(model, LoraConfig(rank=2, alpha=4)))


def test_an_adapter_and_its_projector_change_the_answer_as_set_by_hand(
    model_dir: str, chatter: Chatter, questions: list[Question], tmp_path: Path
) -> None:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(model_dir)
    shapes = model.model.multi_modal_projector.state_dict()
    adapted = with_adapter(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, one in adapted.named_parameters():
            if "lora_B" in name:
                one.copy_(torch.randn(one.shape, generator=generator) * 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    adapter_only = load_model(model_dir, adapter=str(tmp_path / "adapter"), decoding=SHORT)
    projector = {
        f"model.multi_modal_projector.{name}": torch.randn(one.shape, generator=generator)
        for name, one in shapes.items()
    }
    save_file(projector, tmp_path / "adapter" / "projector.safetensors")
    both = load_model(model_dir, adapter=str(tmp_path), decoding=SHORT)

    answers = [one.answer(questions[0]) for one in (chatter, adapter_only, both)]
    assert len(set(answers)) == 3
    adapted.eval()
    assert answers[1] == Chatter(adapted, chatter.prompts, SHORT).answer(questions[0])
    adapted.get_base_model().load_state_dict(projector, strict=False)
    assert answers[2] == Chatter(adapted, chatter.prompts, SHORT).answer(questions[0])
    with pytest.raises(UserError, match="holds no adapter"):
        load_model(model_dir, adapter=model_dir)


def test_an_answer_ends_where_the_models_positions_do_in_a_batch_as_alone(
    chatter: Chatter, questions: list[Question]
) -> None:
    long = Question("Is this long? " * 60)
    room = 1024 - len(chatter.prompts.ids(long))
    assert 0 < room < SHORT.max_new_tokens
    asked = [questions[0], long, questions[1]]
    assert chatter.generate_batch(asked) == [chatter.answer(one) for one in asked]
    capped = chatter.answer(long, Decoding(max_new_tokens=room))
    assert chatter.answer(long, Decoding(max_new_tokens=1000)) == capped


def test_a_question_that_does_not_fit_and_other_mistakes_are_told(
    chatter: Chatter, questions: list[Question], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="reads 1024"):
        chatter.answer(Question("How long? " * 300))
    with pytest.raises(UserError, match="U\\+FDD0"):
        chatter.answer(Question("\ufdd2"))
    with pytest.raises(UserError, match="holds no LLaVA model"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="no file"):
        read_image(str(tmp_path / "none.jpg"))


def test_what_fails_in_the_thread_is_raised_where_the_pieces_are_read(
    chatter: Chatter, questions: list[Question]
) -> None:
    broken = Chatter(chatter.model, chatter.prompts, SHORT)
    handle = chatter.model.lm_head.register_forward_hook(_raise)
    try:
        with pytest.raises(ArithmeticError, match="of the head"):
            list(broken.stream(questions[0]))
    finally:
        handle.remove()
    assert "".join(broken.stream(questions[0])) == chatter.answer(questions[0])


def _raise(*_: Any) -> None:
    raise ArithmeticError("of the head")


def test_closing_the_stream_stops_generation(chatter: Chatter, questions: list[Question]) -> None:
    steps: list[int] = []
    handle = chatter.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    try:
        pieces = chatter.stream(questions[0], Decoding(max_new_tokens=600))
        whole = next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        at_close = len(steps)
        assert list(pieces) == []
    finally:
        handle.remove()
    assert whole
    assert len(steps) == at_close < 600


def lines_of(text: str) -> Iterator[str]:
    return iter(text.splitlines())


def talk(chatter: Chatter, image: str | None, lines: str) -> tuple[str, list[str]]:
    said, complaints = io.StringIO(), list[str]()
    left = lines_of(lines)
    chat(chatter, image, said.write, lambda: next(left, None), complaints.append)
    return said.getvalue(), complaints


def test_a_chat_keeps_its_history_until_it_is_reset(chatter: Chatter, pictures: list[str]) -> None:
    image = read_image(pictures[0])
    first = chatter.answer(Question("What?", [image]))
    second = chatter.answer(Question("Why?", [image], [Round("What?", first)]))
    alone = chatter.answer(Question("Why?", [image]))
    assert second != alone
    said, notices = talk(chatter, pictures[0], "What?\nWhy?\n\n/reset\nWhy?\n/quit\nWhat?")
    assert said == f"{first}\n{second}\n{alone}\n"
    assert notices == ["a new conversation"]


def test_a_chat_goes_on_after_mistakes(
    chatter: Chatter, pictures: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pictures[0]).read_bytes()[:100])
    lines = f"/image {broken}\n/image\n/help\nWhy?\n/image {pictures[1]}\nWhy?"
    said, complaints = talk(chatter, pictures[0], lines)
    answers = [chatter.answer(Question("Why?", [read_image(one)])) for one in pictures[:2]]
    assert said == "".join(f"{one}\n" for one in answers)
    assert "is no picture that can be read" in complaints[0]
    assert all("The commands are /image PATH" in one for one in complaints[1:3])
    assert len(complaints) == 4
    with pytest.raises(UserError, match="no picture that can be read"):
        talk(chatter, str(broken), "Why?")


def test_a_stopped_answer_leaves_no_trace(chatter: Chatter, pictures: list[str]) -> None:
    conversation = Conversation(chatter, read_image(pictures[0]))
    pieces = conversation.ask("What?")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.rounds == []


def test_the_command_answers_piped_questions(
    model_dir: str, chatter: Chatter, pictures: list[str]
) -> None:
    words = ["chat", model_dir, "--image", pictures[0], "--max-tokens", "24"]
    found = CliRunner().invoke(main, words, input="What?\n/reset\nWhy?\n")
    assert found.exit_code == 0, found.output
    image = read_image(pictures[0])
    assert (
        found.stdout.splitlines()
        == "\n".join(
            chatter.answer(Question(one, [image])) for one in ("What?", "Why?")
        ).splitlines()
    )


def test_the_command_refuses_a_broken_first_picture(model_dir: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    found = CliRunner().invoke(main, ["chat", model_dir, "--image", str(tmp_path / "a.jpg")])
    assert found.exit_code == 2
    assert "no picture that can be read" in found.output
