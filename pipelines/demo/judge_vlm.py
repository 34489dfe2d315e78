"""Answers of a LLaVA model to held-out questions, beside those of the same model that sees grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.demo.vlm_questions import HeldOut, accuracy_by_kind, grey
from train.data.images import ImageRules, decode
from train.text.template import BUNNY_SYSTEM

_ROWS_AT_ONCE = 64
_MOST_NEW_TOKENS = 8
Figures = dict[str, float]


def seen_and_blind(llava: Any, tokenizer: Any, asked: Sequence[HeldOut]) -> dict[str, Figures]:
    """Return accuracies by kind of the model ("seen") and of it with grey pictures ("blind")."""
    blank = [grey(one) for one in asked]
    return {
        name: accuracy_by_kind(answers(llava, tokenizer, some), some)
        for name, some in (("seen", asked), ("blind", blank))
    }


def answers(llava: Any, tokenizer: Any, asked: Sequence[HeldOut]) -> list[str]:
    """Return the model's likeliest answers to questions about pictures, in Bunny's template.

    llava: a LlavaForConditionalGeneration in float32, with adapters or without.
    """
    prompts = [_prompt_ids(llava, tokenizer, one.question) for one in asked]
    order = np.argsort([len(one) for one in prompts], kind="stable").tolist()
    found = [""] * len(asked)
    was_training = llava.training
    llava.eval()
    for start in range(0, len(order), _ROWS_AT_ONCE):
        chosen = order[start : start + _ROWS_AT_ONCE]
        said = _answer(llava, tokenizer, [prompts[i] for i in chosen], [asked[i] for i in chosen])
        for at, text in zip(chosen, said, strict=True):
            found[at] = text
    llava.train(was_training)
    return found


def _prompt_ids(llava: Any, tokenizer: Any, question: str) -> list[int]:
    vision = llava.config.vision_config
    image = [llava.config.image_token_id] * (vision.image_size // vision.patch_size) ** 2
    before, after = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (f"{BUNNY_SYSTEM} USER: ", f"\n{question} ASSISTANT:")
    )
    return [*before, *image, *after]


def _answer(
    llava: Any, tokenizer: Any, prompts: list[list[int]], asked: list[HeldOut]
) -> list[str]:
    """Return answers to prompts that are padded on the left to one length."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for at, one in enumerate(prompts):
        ids[at, longest - len(one) :] = torch.tensor(one)
        mask[at, longest - len(one) :] = 1
    rules = ImageRules("pad", llava.config.vision_config.image_size, (0.5,) * 3, (0.5,) * 3)
    pixels = torch.from_numpy(np.stack([rules(decode(one.image)) for one in asked]))
    with torch.inference_mode():
        made = llava.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels,
            do_sample=False,
            max_new_tokens=_MOST_NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    texts: list[str] = tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
    return texts
