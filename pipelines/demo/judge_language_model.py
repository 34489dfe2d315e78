"""How well the demo's language model knows the world's texts: figures on held-out ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.demo.language import Text, make_text
from pipelines.demo.train_language_model import encode, mean_loss

HELD_OUT_SEED = 9_003
NUM_HELD_OUT = 400
_ROWS_AT_ONCE = 32
Figures = dict[str, float]
Rows = list[tuple[np.ndarray, np.ndarray]]


def judge(model_dir: Path, *, num_texts: int = NUM_HELD_OUT) -> Figures:
    """Return perplexities of a learned token, and shares of right answers, on held-out texts."""
    from curate.media.torchvision_ops import ensure_torchvision_importable

    ensure_torchvision_importable()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = [make_text(HELD_OUT_SEED, index) for index in range(num_texts)]
    rows = [encode(tokenizer, one) for one in texts]
    of = {
        name: [row for row, one in zip(rows, texts, strict=True) if is_of(one)]
        for name, is_of in _SORTS
    }
    figures = {f"perplexity, {name}": perplexity(model, some) for name, some in of.items()}
    figures["perplexity, by word counts alone"] = unigram_perplexity(rows, model.config.vocab_size)
    for name in ("told", "not told"):
        figures[f"right answers, {name}"] = share_right(model, tokenizer, of[name])
    return figures


_SORTS: tuple[tuple[str, Callable[[Text], bool]], ...] = (
    ("all", lambda _one: True),
    ("told", lambda one: one.told > 0 and one.kind != "caption"),
    ("not told", lambda one: one.told == 0 and one.kind in ("talk", "row")),
    ("captions", lambda one: one.kind == "caption"),
)


def perplexity(model: Any, rows: Rows) -> float:
    """Return the model's perplexity over all labels of the rows."""
    import torch

    total, number = 0.0, 0
    with torch.inference_mode():
        for block in _blocks(rows):
            labels = sum(int((row[1][1:] >= 0).sum()) for row in block)
            total += float(mean_loss(model, block)) * labels
            number += labels
    return math.exp(total / number)


def unigram_perplexity(rows: Rows, num_tokens: int) -> float:
    """Return the perplexity of the best guess that knows only how often each token occurs here."""
    labels = np.concatenate([row[1][1:] for row in rows])
    counts = np.bincount(labels[labels >= 0], minlength=num_tokens)
    shares = counts[counts > 0] / counts.sum()
    return math.exp(-float((shares * np.log(shares)).sum()))


def share_right(model: Any, tokenizer: Any, rows: Rows) -> float:
    """Return the share of answers whose every token is the likeliest after what stands before."""
    import torch

    colon, speaker = (tokenizer.convert_tokens_to_ids(one) for one in (":", "ĠASSISTANT"))
    right: list[bool] = []
    with torch.inference_mode():
        for ids, _ in rows:
            likeliest = model(torch.from_numpy(ids)[None]).logits[0].argmax(-1).numpy()
            right += _answers_right(ids, likeliest, (speaker, colon), tokenizer.eos_token_id)
    return sum(right) / len(right)


def _answers_right(
    ids: np.ndarray, likeliest: np.ndarray, prompt: tuple[int, int], end: int
) -> list[bool]:
    right = []
    for start in np.flatnonzero((ids[:-1] == prompt[0]) & (ids[1:] == prompt[1])).tolist():
        ends = np.flatnonzero(ids[start:] == end)
        if len(ends):
            stop = start + int(ends[0])
            right.append(bool((likeliest[start + 1 : stop] == ids[start + 2 : stop + 1]).all()))
    return right


def _blocks(rows: Rows) -> list[Rows]:
    ordered = sorted(rows, key=lambda row: len(row[0]))
    return [ordered[at : at + _ROWS_AT_ONCE] for at in range(0, len(ordered), _ROWS_AT_ONCE)]


def write_card(model_dir: Path, figures: Figures) -> None:
    """Write MODEL_CARD.md: what the model is, how it was trained, what it reached."""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items())
    text = _CARD.format(seed=HELD_OUT_SEED, rows=rows)
    (model_dir / "MODEL_CARD.md").write_text(text, encoding="utf-8")


_CARD = """# The demo's language model

A `PhiForCausalLM` that knows the texts of the demo world and nothing else: 4 layers x 128, a
word for a token and bytes for all other words; plain `transformers` loads it. Some sentences that
many rows hold, such as Bunny's system sentence, are one token each.

Trained in two phases, by

    python -m pipelines.demo.train_language_model --out pipelines/demo/language_model

on captions, exercises, and talk about scenes that are told in words or not at all (other seeds than
the demo's). It never saw a picture. The head's bias is zero: LLaVA's head has none.

On held-out texts of the world with seed {seed}; where no scene is told, answers are guesses:

| figure | value |
|---|---|
{rows}
"""
