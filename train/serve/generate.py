"""A LLaVA directory, with or without an adapter, that answers questions about pictures.

Tokens are chosen by transformers' own `generate`; prompts and pixels are training's. Greedy answers
are the same one by one, streamed and in batches.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from manifests import paths, store
from manifests.errors import UserError
from manifests.strict import Strict
from train.models.towers import register_tower
from train.serve.prompts import ImageMode, Prompts, Question

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
ADAPTER_CONFIG = "adapter_config.json"
_WHOLE_TENSORS = ("projector.safetensors", "whole.safetensors")  # as export names them
# What a base model's generation_config.json may say about sampling, which Decoding says here.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


class Decoding(Strict):
    """How answers are drawn; greedy unless there is a temperature."""

    max_new_tokens: int = Field(default=512, ge=1)
    """Fewer where the model's positions end."""
    temperature: float = Field(default=0.0, ge=0)
    """0: always the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Tokens are drawn from the likeliest ones that together have this probability."""


@dataclass(frozen=True, eq=False)
class Chatter:
    """Answers questions. model: a LlavaForConditionalGeneration, perhaps in peft's wrapping."""

    model: Any
    prompts: Prompts
    decoding: Decoding

    def answer(self, question: Question, decoding: Decoding | None = None) -> str:
        """Return the answer, without white space around it. Raises: UserError."""
        return self.generate_batch([question], decoding=decoding)[0]

    def stream(self, question: Question, decoding: Decoding | None = None) -> Iterator[str]:
        """Yield the pieces of the answer as they are made; joined, they are what `answer` returns.

        Tokens are made in a thread, which stops when the iterator is closed; what fails in it is
        raised here. Raises: UserError, before the first piece.
        """
        from transformers import TextIteratorStreamer

        inputs = self._inputs([self.prompts.ids(question)], [question], decoding)
        return _stripped(
            _streamed(
                TextIteratorStreamer(
                    self.prompts.tokenizer,
                    skip_prompt=True,
                    skip_special_tokens=True,
                    clean_up_tokenization_spaces=False,
                ),
                lambda **more: self.model.generate(**inputs, **more),
            )
        )

    def generate_batch(
        self,
        questions: Iterable[Question],
        *,
        batch_size: int = 8,
        decoding: Decoding | None = None,
    ) -> list[str]:
        """Return the answers in order; `batch_size` questions of similar length at a time.

        Raises: UserError.
        """
        asked = list(questions)
        ids = [self.prompts.ids(one) for one in asked]
        answers = [""] * len(asked)
        for rows in self._batches(ids, batch_size, decoding or self.decoding):
            inputs = self._inputs([ids[at] for at in rows], [asked[at] for at in rows], decoding)
            made = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            for at, text in zip(rows, self._texts(made), strict=True):
                answers[at] = text
        return answers

    def check(self, question: Question) -> None:
        """Raises: UserError for a question that the model cannot answer: too long, or of a text
        that no prompt may hold."""
        self._room(len(self.prompts.ids(question)))

    def _batches(
        self, ids: Sequence[Any], batch_size: int, decoding: Decoding
    ) -> Iterator[list[int]]:
        """Yield questions of similar length; alone, one whose answer the model's positions may cut,
        as the others' would be cut with it."""
        order = sorted(range(len(ids)), key=lambda at: -len(ids[at]))
        alone = [at for at in order if self._room(len(ids[at])) < decoding.max_new_tokens]
        yield from ([at] for at in alone)
        for start in range(len(alone), len(order), batch_size):
            yield order[start : start + batch_size]

    def _texts(self, made: Tensor) -> list[str]:
        tokenizer = self.prompts.tokenizer
        found = tokenizer.batch_decode(
            made, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [text.strip() for text in found]

    def _inputs(
        self, ids: Sequence[Any], questions: Sequence[Question], decoding: Decoding | None
    ) -> dict[str, Any]:
        """Return what `generate` takes, on the model's device: rows padded on the left."""
        chosen = decoding or self.decoding
        length = max(map(len, ids))
        most = min(chosen.max_new_tokens, self._room(length))
        inputs: dict[str, Any] = _padded_left(ids, length, self._padding_id())
        pictures = [image for one in questions for image in one.images]
        if pictures:
            pixels = torch.from_numpy(np.stack([self.prompts.pixels(one) for one in pictures]))
            inputs["pixel_values"] = pixels.to(self.model.dtype)
        inputs = {name: one.to(self.model.device) for name, one in inputs.items()}
        inputs["generation_config"] = self._generation_config(chosen, most)
        if self.prompts.is_plain:
            inputs["tokenizer"] = self.prompts.tokenizer
        return inputs

    def _padding_id(self) -> int:
        found = self.prompts.tokenizer.pad_token_id
        return int(0 if found is None else found)  # masked: any token will do

    def _generation_config(self, decoding: Decoding, most: int) -> Any:
        """Return the model's own, stop tokens and all, with sampling as `decoding` has it.

        most: tokens of an answer.
        """
        config = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens = most
        config.pad_token_id = self._padding_id()
        config.do_sample = decoding.temperature > 0
        if config.do_sample:  # without top_k=0, transformers would draw from the likeliest 50
            config.temperature, config.top_p = decoding.temperature, decoding.top_p
            config.top_k = 0
        if self.prompts.is_plain:
            config.stop_strings = ["\n"]  # how a caption ends in training
        return config

    def _room(self, num_tokens: int) -> int:
        """Return how many tokens an answer to so many may have. Raises: UserError for none."""
        limit = int(self.model.config.get_text_config().max_position_embeddings)
        if num_tokens >= limit:
            raise UserError(
                f"The conversation has {num_tokens} tokens.",
                f"The language model reads {limit}, its answer included.",
                "Start a new conversation, or ask something shorter.",
            )
        return limit - num_tokens


def load_model(
    model_dir: str,
    *,
    adapter: str | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    template: str = "chat",
    image_mode: ImageMode = "pad",
    decoding: Decoding | None = None,
) -> Chatter:
    """Return a model that answers.

    Args:
        model_dir: a LLaVA directory that compose, import-bunny or export wrote.
        adapter: a peft directory, or the exported directory that holds it as `adapter`; the
            projector beside it is used too.
        device: auto is CUDA where there is a device, else the CPU.
        dtype: of the weights; auto keeps the directory's.
        template: a name that train.text.template knows; chat is the directory's own, plain writes
            captions after stage 1.
        image_mode: how pictures become squares, as in training; Bunny's models learn on padded
            ones last. "processor" is the directory's own image processor.

    Raises: UserError for a directory of something else.
    """
    from transformers import LlavaForConditionalGeneration

    register_tower(_config_of(model_dir))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = "auto" if dtype == "auto" else getattr(torch, dtype)
    model: Any = LlavaForConditionalGeneration.from_pretrained(model_dir, dtype=chosen)
    prompts = Prompts.load(model_dir, model.config, template=template, image_mode=image_mode)
    _leave_sampling_to_us(model.generation_config)
    if adapter is not None:
        model = _adapted(model, adapter)
    return Chatter(model.eval().to(device), prompts, decoding or Decoding())


def _config_of(model_dir: str) -> dict[str, Any]:
    found: dict[str, Any] | None = store.read_json(paths.join(model_dir, "config.json"))
    if found is None or found.get("model_type") != "llava":
        raise UserError(
            f"{model_dir} holds no LLaVA model.",
            "Its config.json is missing or of another model_type.",
            "Give a directory that compose, import-bunny or export wrote.",
        )
    return found


def _leave_sampling_to_us(config: Any) -> None:
    config.do_sample, config.num_beams, config.max_length = False, 1, None
    for name in _SAMPLING:
        setattr(config, name, None)


def _adapted(model: Any, adapter: str) -> Any:
    """Return the model in an adapter's wrapping; first what was trained whole, as names change."""
    from peft import PeftModel
    from safetensors.torch import load

    inner = paths.join(adapter, "adapter")
    folder = inner if paths.exists(paths.join(inner, ADAPTER_CONFIG)) else adapter
    if not paths.exists(paths.join(folder, ADAPTER_CONFIG)):
        raise UserError(
            f"{adapter} holds no adapter.",
            f"There is no {ADAPTER_CONFIG} in it, nor in its folder `adapter`.",
            "Give what export wrote, or leave the adapter out.",
        )
    for name in _WHOLE_TENSORS:
        if paths.exists(paths.join(folder, name)):
            found = load(store.read_bytes(paths.join(folder, name)))
            unknown = model.load_state_dict(found, strict=False).unexpected_keys
            if unknown:
                raise UserError(
                    f"{name} of {folder} holds {unknown[0]}, which the model has not.",
                    "It was trained on another model.",
                    "Give the model that base.json names.",
                )
    with warnings.catch_warnings():
        # peft asks by a name that transformers is about to drop
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(model, folder)


def _padded_left(ids: Sequence[Any], length: int, padding_id: int) -> dict[str, Tensor]:
    """Return input_ids and attention_mask: int64 [rows, length]."""
    rows = torch.full((len(ids), length), padding_id)
    mask = torch.zeros_like(rows)
    for at, one in enumerate(ids):
        rows[at, length - len(one) :] = torch.from_numpy(one)
        mask[at, length - len(one) :] = 1
    return {"input_ids": rows, "attention_mask": mask}


def _streamed(streamer: Any, generate: Any) -> Iterator[str]:
    """Yield what a thread's `generate` puts into the streamer, then raise what it raised."""
    cancelled, failed = Event(), list[BaseException]()

    def stop(ids: Tensor, _scores: Any, **_more: Any) -> Tensor:
        return torch.full((len(ids),), cancelled.is_set(), device=ids.device)

    def work() -> None:
        try:
            generate(streamer=streamer, stopping_criteria=[stop])
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            failed.append(error)
            streamer.on_finalized_text("", stream_end=True)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        cancelled.set()
        thread.join()
    if failed:
        raise failed[0]


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """Yield the pieces of the stripped text: white space waits for what follows it."""
    begun, waiting = False, ""
    try:
        for piece in pieces:
            text = waiting + piece
            text = text if begun else text.lstrip()
            shown = text.rstrip()
            waiting = text[len(shown) :]
            begun = begun or bool(shown)
            if shown:
                yield shown
    finally:
        pieces.close()  # type: ignore[attr-defined]  # a generator, which stops its thread
