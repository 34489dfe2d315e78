"""Train the demo's small Phi on texts of the demo world (other seeds than the demo's own).

    python -m pipelines.demo.train_language_model --out pipelines/demo/language_model

writes a `PhiForCausalLM` directory (config, float16 weights, tokenizer) and its MODEL_CARD.md, in
forty minutes on a CPU core that other work shares; the same seed, thread count and versions of
libraries give the same weights. Computed in bfloat16, kept in float32.

The head's bias stays zero: LLaVA's head has none (Bunny's class declares none either).
"""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.demo.fitting import Options, fit, read_options
from pipelines.demo.language import END, LEARNED_ALONE, LOOKED_UP, MIXED, Text, make_text
from pipelines.demo.mix_questions import LETTER, SHORT
from pipelines.demo.seeds import rng_for
from train.text.template import BUNNY_SYSTEM

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TRAIN_SEED = 7_003
NUM_TEXTS = 30_000
"""Of a phase."""
TOKENS_PER_STEP = 4_096
MAX_LENGTH = 512
FREE_ROWS = 8
"""Fewest rows of the vocabulary that no text uses; compose takes one for images."""
FEWEST = 6
"""A word that fewer texts hold is written in bytes."""
PHRASES = (
    BUNNY_SYSTEM,
    SHORT,
    LETTER,
    "Please provide the bounding box coordinate of the region this sentence describes:",
    "Please provide a short description for this region:",
)
"""Sentences that many rows hold, one token each: time is short on a CPU."""
_ANSWER = re.compile(rf" ASSISTANT:(.*?{re.escape(END)})", re.DOTALL)
_PIECES = (
    *(f" ?{re.escape(phrase)}" for phrase in PHRASES),
    r" ?(?:0\.\d\d|1\.00)",  # edges of boxes
    r" ?\d",
    r" ?[A-Za-zÀ-ÿœ]+",
    r" ?[^\sA-Za-zÀ-ÿœ\d]",
    r"\s",
)


@dataclass(frozen=True, slots=True)
class Phase:
    """How a part of the training goes. shares: of the kinds of texts."""

    num_steps: int
    peak_lr: float
    shares: Mapping[str, float]


PHASES = (Phase(1_000, 3e-3, MIXED), Phase(450, 3e-3, LOOKED_UP))


def main(arguments: list[str]) -> None:
    """Train, save and judge a language model as the command line says."""
    train(read_options(__doc__, arguments, num_phases=len(PHASES)))


def train(options: Options) -> None:
    """Train the chosen phases and write the model, its tokenizer and its card."""
    from curate.media.torchvision_ops import ensure_torchvision_importable

    ensure_torchvision_importable()
    import torch

    torch.set_num_threads(options.num_threads)
    started, begun = time.monotonic(), options.begun
    options.out.mkdir(parents=True, exist_ok=True)
    for number in options.phases:
        phase = PHASES[number]
        phase = replace(phase, num_steps=options.num_steps(phase.num_steps))
        torch.manual_seed(TRAIN_SEED + number)
        model, tokenizer, texts = _begin(begun, _make_all(number, options.num_threads))
        tokenizer.save_pretrained(options.out)
        model = _fit(model, [encode(tokenizer, one) for one in texts], phase, number)
        model.half().save_pretrained(options.out)
        begun = options.out
        log.info("phase %d ended after %.0f s", number + 1, time.monotonic() - started)
    from pipelines.demo.judge_language_model import judge, write_card

    write_card(options.out, judge(options.out))


def _make_all(number: int, num_workers: int) -> list[Text]:
    """Return the texts of a phase, its own."""
    first = number * NUM_TEXTS
    with ProcessPoolExecutor(num_workers) as pool:
        make = partial(make_text, TRAIN_SEED, shares=PHASES[number].shares)
        return list(pool.map(make, range(first, first + NUM_TEXTS), chunksize=500))


def _begin(begun: Path | None, texts: list[Text]) -> tuple[Any, Any, list[Text]]:
    """Return the model to train, its tokenizer, and the texts."""
    import torch
    from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

    if begun is not None:
        model = PhiForCausalLM.from_pretrained(begun, dtype=torch.float32)
        return model.train(), AutoTokenizer.from_pretrained(begun), texts
    tokenizer = make_tokenizer([one.text for one in texts])
    model = PhiForCausalLM(PhiConfig(**model_config(len(tokenizer))))
    torch.nn.init.zeros_(model.lm_head.bias)
    return model, tokenizer, texts


def make_tokenizer(texts: Sequence[str]) -> Any:
    """Return a PreTrainedTokenizerFast of the texts' words, and of bytes for all else."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex("|".join(_PIECES)), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre = pre_tokenizers.Sequence([split, to_bytes])
    held = Counter(word for text in texts for word in _words(pre, text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    common = {word for word, number in held.items() if number >= FEWEST}
    ids = {word: n for n, word in enumerate([*alphabet, *sorted(common - set(alphabet))])}
    words = Tokenizer(models.BPE(ids, [], ignore_merges=True))
    words.pre_tokenizer = pre
    words.decoder = decoders.ByteLevel()
    with warnings.catch_warnings():
        return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=words, bos_token=END, eos_token=END, model_max_length=MAX_LENGTH
        )


def _words(pre: Any, text: str) -> set[str]:
    return {word for piece in text.split(END) for word, _ in pre.pre_tokenize_str(piece)}


def encode(tokenizer: Any, text: Text) -> tuple[np.ndarray, np.ndarray]:
    """Return a text's ids and labels, int64 [n] both; what is not learned has the label -100."""
    found = tokenizer.backend_tokenizer.encode(text.text, add_special_tokens=False)
    ids = np.array(found.ids[:MAX_LENGTH], dtype=np.int64)
    starts = np.array([start for start, _ in found.offsets[:MAX_LENGTH]])
    learned = starts >= text.told
    if text.kind in LEARNED_ALONE:
        edges = np.array([one.span(1) for one in _ANSWER.finditer(text.text)]).ravel()
        learned = np.searchsorted(edges, starts, side="right") % 2 == 1
    return ids, np.where(learned, ids, -100)


def model_config(num_tokens: int) -> dict[str, Any]:
    """Return PhiConfig's fields for a tokenizer of `num_tokens` tokens."""
    return {
        "vocab_size": -(-(num_tokens + FREE_ROWS) // 16) * 16,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "tie_word_embeddings": True,
        "bos_token_id": num_tokens - 1,
        "eos_token_id": num_tokens - 1,
        "pad_token_id": num_tokens - 1,
    }


def _fit(model: Any, rows: list[tuple[np.ndarray, np.ndarray]], phase: Phase, number: int) -> Any:
    """Return the trained model; its head's bias stays as it is."""
    import torch

    model.lm_head.bias.requires_grad_(False)
    trained = [one for one in model.parameters() if one.requires_grad]

    def losses_of(_step: int, chosen: list[int]) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return {"loss": mean_loss(model, [rows[at] for at in chosen])}

    batches = _batches(rows, phase.num_steps, number)
    steps = {"num_steps": phase.num_steps, "peak_lr": phase.peak_lr, "warmup_share": 0.1}
    fit(trained, batches, losses_of, **steps)  # type: ignore[arg-type]
    return model.eval()


def mean_loss(model: Any, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    """Return the mean loss of a label, in float32; rows are padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, labels = (
        pad_sequence([torch.from_numpy(row[part]) for row in rows], True, fill)
        for part, fill in ((0, 0), (1, -100))
    )
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    logits = model.lm_head(hidden[wanted != -100]).float()
    return torch.nn.functional.cross_entropy(logits, wanted[wanted != -100])


def _batches(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], num_steps: int, number: int
) -> Iterator[list[int]]:
    """Yield each step's rows, of about one length; all are read before any is read again."""
    lengths = np.array([len(ids) for ids, _ in rows])
    waiting: list[list[int]] = []
    for step in range(num_steps):
        if not waiting:
            waiting = _dealt(lengths, rng_for(TRAIN_SEED + number, "text order", step))
        yield waiting.pop()


def _dealt(lengths: np.ndarray, rng: np.random.Generator) -> list[list[int]]:
    """Return all rows in batches of at most TOKENS_PER_STEP tokens with padding, shuffled."""
    order = np.argsort(lengths + rng.random(len(lengths)), kind="stable").tolist()
    batches: list[list[int]] = [[]]
    for at in order:
        if (len(batches[-1]) + 1) * lengths[at] > TOKENS_PER_STEP:
            batches.append([])
        batches[-1].append(at)
    return [batches[i] for i in rng.permutation(len(batches)).tolist()]


if __name__ == "__main__":
    main(sys.argv[1:])
