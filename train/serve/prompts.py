"""A question about pictures as a model's input: what training has before an answer.

The text is rendered, tokenized and expanded by the code of `train.text`, and pictures become pixel
values by that of `train.data.images`: a served prompt is, bit by bit, the start of a training row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from manifests import paths, store
from manifests.errors import UserError
from train.data.images import ImageDamaged, ImageRules, Mode, decode
from train.text.marks import IMAGE_ID, IMAGE_MARK, has_mark, marked_tokenizer
from train.text.rounds import SampleRefused, Turn
from train.text.template import PlainTemplate, Template, template_named

ImageMode = Mode | Literal["processor"]


class Round(NamedTuple):
    """A question and the answer it got."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked now, about which RGB pictures, after which rounds.

    The pictures stand in the conversation's first question, as in LLaVA's rows.
    """

    text: str
    images: Sequence[Image.Image] = ()
    history: Sequence[Round] = field(default_factory=tuple)


def read_image(path: str) -> Image.Image:
    """Return a file's picture, RGB and upright. Raises: UserError."""
    try:
        return decode(store.read_bytes(path))
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.", fix="Give the path of a picture.") from error
    except (ImageDamaged, OSError) as error:
        raise UserError(
            f"{path} is no picture that can be read.",
            str(error),
            "Give a whole JPEG, PNG, WebP, GIF or BMP file.",
        ) from error


@dataclass(frozen=True)
class Prompts:
    """Makes model inputs of questions.

    image_mode: pad or square as in training, or "processor": the directory's own image processor.
    """

    tokenizer: Any
    template: Template
    image_token_id: int
    tokens_per_image: int
    pixels: Any
    """RGB picture -> float32 [3, side, side]."""

    @classmethod
    def load(cls, model_dir: str, config: Any, *, template: str, image_mode: ImageMode) -> Prompts:
        """Return what makes inputs for a LLaVA directory.

        config: its LlavaConfig. template: a name that train.text.template knows; "chat" is the
        directory's own. Raises: UserError.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        vision = config.vision_config
        return cls(
            tokenizer,
            template_named(template, tokenizer),
            config.image_token_id,
            (vision.image_size // vision.patch_size) ** 2,
            _pixels_of(model_dir, image_mode),
        )

    @property
    def is_plain(self) -> bool:
        """Whether the model only writes captions, as after stage 1: no question is read."""
        return isinstance(self.template, PlainTemplate)

    def ids(self, question: Question) -> NDArray[np.int64]:
        """Return the tokens up to the answer's first: int64 [n]; images at their full length.

        Raises: UserError for a question that the template cannot write.
        """
        try:
            text, spans = self.template.render(self._turns(question))
        except SampleRefused as refused:
            raise UserError("The template refused the conversation.", refused.detail) from refused
        prompt = text[: spans[-1].start]
        _check_is_whole(prompt, question, self.is_plain)
        encoded = marked_tokenizer(self.tokenizer).encode(
            prompt, with_prefix=self.template.with_prefix
        )
        is_image = encoded.ids == IMAGE_ID
        ids = np.where(is_image, self.image_token_id, encoded.ids)
        return np.repeat(ids, np.where(is_image, self.tokens_per_image, 1))

    def _turns(self, question: Question) -> list[Turn]:
        """Return the rounds as training has them; the last answer is empty."""
        rounds = [*([] if self.is_plain else question.history), Round(question.text, "")]
        texts = [text.strip() for one in rounds for text in one]
        if any(map(has_mark, texts)):
            raise UserError(
                "A text holds one of the characters U+FDD0 to U+FDD3.",
                "They stand for pictures and special tokens here, and for nothing anywhere else.",
                "Take them out.",
            )
        texts[0] = (f"{IMAGE_MARK}\n" * len(question.images) + texts[0]).strip()
        return [Turn(("human", "gpt")[at % 2], text) for at, text in enumerate(texts)]


def _check_is_whole(prompt: str, question: Question, is_plain: bool) -> None:
    if is_plain and not question.images:
        raise UserError(
            "There is no picture.",
            "Template plain is a picture and its caption.",
            "Give one, or choose the template that the model was tuned with.",
        )
    if prompt.count(IMAGE_MARK) != len(question.images) or not prompt:
        raise UserError(
            "The model's chat template left out what was asked.",
            "It must write a message's content where that is a text.",
            "Choose another template, such as bunny.",
        )


def _pixels_of(model_dir: str, image_mode: ImageMode) -> Any:
    if image_mode == "processor":
        return _Processor.load(model_dir)
    for name in ("processor_config.json", "preprocessor_config.json"):
        config = store.read_json(paths.join(model_dir, name))
        if config is not None:
            break
    else:
        raise UserError(
            f"{model_dir} has no processor_config.json.",
            "It says how pictures become pixel values.",
            "Give a directory that compose, import-bunny or export wrote.",
        )
    try:
        return ImageRules.from_processor(config.get("image_processor", config), mode=image_mode)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{model_dir} makes pixels otherwise than the rule {image_mode}.",
            f"{type(error).__name__}: {error}",
            'Choose image_mode="processor", which is its own rule.',
        ) from error


@dataclass(frozen=True)
class _Processor:
    """The directory's own image processor, as transformers loads it."""

    processor: Any

    @classmethod
    def load(cls, model_dir: str) -> _Processor:
        from transformers import AutoImageProcessor

        loader: Any = AutoImageProcessor
        return cls(loader.from_pretrained(model_dir, backend="pil"))

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        found = self.processor(image, return_tensors="np")["pixel_values"][0]
        return np.asarray(found, np.float32)
