"""Train the demo's CLIP model on clean pairs of the demo world (other seeds than the demo's own).

    python -m pipelines.demo.train_model --out pipelines/demo/model

writes an open_clip `local-dir:` checkpoint (config, fp16 weights, tokenizer) and its MODEL_CARD.md.
About half an hour on 2 CPU cores; the same seed, thread count and library versions give the same
weights.

Four losses:
- contrastive, pictures against captions (Radford et al. 2021, arXiv:2103.00020), half of the
  batches from one background and layout, where pictures are hardest to tell apart;
- instance: a disturbed twin must find its picture (Chen et al. 2020, arXiv:2002.05709), which keeps
  near-duplicates together and all else apart, as large models do and tiny ones do not;
- facts: what the picture shows must be readable off its embedding (a linear head, thrown away);
- margin: twins above 0.95, distinct pictures below 0.65, since dedup cuts at 0.86.
calibrate.py then fits the image tower's last layer once more.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.demo.practice import (
    FACTS,
    IMAGE_SIDE,
    Practice,
    join_practice,
    make_practice,
    to_model_input,
)
from pipelines.demo.seeds import rng_for

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TRAIN_SEED = 7_001
NUM_PICTURES = 80_000
NUM_CAPTIONS = 4
"""Captions made per picture; every step draws one."""
BATCH = 256
NUM_TWINS = 64
"""Pictures of a batch that are shown a second time, disturbed."""
PEAK_LR = 1.5e-3
EMBED_DIM = 128
CONTEXT_LENGTH = 32
PAD, UNK, BOS, EOS = "[PAD]", "[UNK]", "[BOS]", "[EOS]"
LOG_EVERY_STEPS = 25


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows: pictures, the first `NUM_TWINS` of them again as twins, tokens and facts."""

    views: torch.Tensor
    twins: torch.Tensor
    tokens: torch.Tensor
    facts: torch.Tensor


def main(arguments: list[str]) -> None:
    """Train, save and judge a model as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=1700, help="optimizer steps of 256 pairs")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, part of the result")
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parsed.out, num_steps=parsed.steps, num_threads=parsed.threads)


def train(out_dir: Path, *, num_steps: int, num_threads: int) -> None:
    """Train for `num_steps` steps and write the checkpoint and its card to `out_dir`."""
    from curate.media.torchvision_ops import ensure_torchvision_importable

    ensure_torchvision_importable()
    import torch

    from pipelines.demo.calibrate import calibrate
    from pipelines.demo.judge import judge, write_card

    torch.set_num_threads(num_threads)
    torch.manual_seed(TRAIN_SEED)
    started = time.monotonic()
    practice = _make_all_practice(NUM_PICTURES, num_threads)
    log.info("made %d pictures in %.0f s", NUM_PICTURES, time.monotonic() - started)
    save_tokenizer(out_dir, practice.captions)
    vocab_size = save_config(out_dir)
    model = _fit(practice, _tokens(out_dir, practice), vocab_size, num_steps)
    save_weights(out_dir, model)
    save_weights(out_dir, calibrate(out_dir))
    seconds = time.monotonic() - started
    write_card(out_dir, judge(out_dir), num_steps=num_steps, seconds=seconds)


def _make_all_practice(num_pictures: int, num_workers: int) -> Practice:
    chunks = [range(start, start + 1000) for start in range(0, num_pictures, 1000)]
    with ProcessPoolExecutor(num_workers) as pool:
        return join_practice(list(pool.map(_make_chunk, chunks)))


def _make_chunk(indices: range) -> Practice:
    return make_practice(TRAIN_SEED, indices, num_captions=NUM_CAPTIONS)


def save_tokenizer(out_dir: Path, captions: list[list[str]]) -> None:
    """Write a lower-casing word-level tokenizer of the captions' words; [EOS] has the largest id.

    open_clip pools the text at the largest id of each row. Numbers are read digit by digit and
    every kanji is a word, so that no stock number and no new compound is unknown.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({UNK: 0}, unk_token=UNK))
    words.normalizer = normalizers.BertNormalizer(strip_accents=False, lowercase=True)
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(r"\d"), "isolated")]
    )
    vocabulary = [PAD, UNK, BOS, *_known_words(words, captions), EOS]
    ids = {word: token_id for token_id, word in enumerate(vocabulary)}
    words.model = models.WordLevel(ids, unk_token=UNK)
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, ids[BOS]), (EOS, ids[EOS])]
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    words.save(str(out_dir / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        **{"pad_token": PAD, "unk_token": UNK, "bos_token": BOS, "eos_token": EOS},
    }
    _write_json(out_dir / "tokenizer_config.json", settings)


def _known_words(splitter: Any, captions: list[list[str]]) -> list[str]:
    """Return the words of all captions, sorted."""
    words: set[str] = set()
    for caption in {caption for alternatives in captions for caption in alternatives}:
        normal = splitter.normalizer.normalize_str(caption)
        words.update(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normal))
    return sorted(words)


def save_config(out_dir: Path) -> int:
    """Write open_clip_config.json for the tokenizer in `out_dir`; return the vocabulary's size."""
    tokenizer = json.loads((out_dir / "tokenizer.json").read_text(encoding="utf-8"))
    vocab_size = len(tokenizer["model"]["vocab"])
    half = [0.5, 0.5, 0.5]
    preprocess = {"mean": half, "std": half, "interpolation": "bilinear", "resize_mode": "squash"}
    config = {"model_cfg": _model_config(vocab_size), "preprocess_cfg": preprocess}
    _write_json(out_dir / "open_clip_config.json", config)
    return vocab_size


def _model_config(vocab_size: int) -> dict[str, Any]:
    vision = {"image_size": IMAGE_SIDE, "patch_size": 8, "width": 128, "layers": 4}
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": vocab_size, "width": 128, "layers": 2}
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {**vision, "head_width": 32, "mlp_ratio": 2.0},
        "text_cfg": {**text, "heads": 4, "hf_tokenizer_name": "."},
    }


def _tokens(out_dir: Path, practice: Practice) -> torch.Tensor:
    """Return the token ids of every caption, int64 [pictures, NUM_CAPTIONS, CONTEXT_LENGTH]."""
    import open_clip

    tokenizer = open_clip.get_tokenizer(f"local-dir:{out_dir}")
    flat = [caption for captions in practice.captions for caption in captions]
    shape = (len(practice.captions), NUM_CAPTIONS, CONTEXT_LENGTH)
    tokens: torch.Tensor = tokenizer(flat).reshape(shape)
    return tokens


def _fit(practice: Practice, tokens: torch.Tensor, vocab_size: int, num_steps: int) -> Any:
    """Return the trained open_clip model."""
    import torch
    from open_clip.model import CLIP

    model = CLIP(**_model_config(vocab_size))
    facts_head = torch.nn.Linear(EMBED_DIM, len(FACTS))
    parameters = [*model.parameters(), *facts_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=num_steps, pct_start=0.08
    )
    model.train()
    started = time.monotonic()
    for step, batch in enumerate(_batches(practice, tokens, num_steps), start=1):
        losses = _losses(model, facts_head, batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(60.0))
        if step % LOG_EVERY_STEPS == 0:
            _log_step(step, num_steps, losses, started)
    return model.eval()


def _batches(practice: Practice, tokens: torch.Tensor, num_steps: int) -> Iterator[Batch]:
    """Yield the batches: even steps from anywhere, odd steps from one group of look-alikes."""
    members = [np.flatnonzero(practice.groups == group) for group in np.unique(practice.groups)]
    everything = np.arange(len(practice.groups))
    for step in range(num_steps):
        rng = rng_for(TRAIN_SEED, "batch", step)
        pool = members[int(rng.integers(len(members)))] if step % 2 else everything
        chosen = rng.choice(pool, size=BATCH, replace=len(pool) < BATCH)
        yield _batch(practice, tokens, chosen, rng.integers(NUM_CAPTIONS, size=BATCH))


def _batch(
    practice: Practice, tokens: torch.Tensor, chosen: np.ndarray, which_caption: np.ndarray
) -> Batch:
    import torch

    return Batch(
        views=to_model_input(practice.views[chosen]),
        twins=to_model_input(practice.twins[chosen[:NUM_TWINS]]),
        tokens=tokens[torch.from_numpy(chosen), torch.from_numpy(which_caption)],
        facts=torch.from_numpy(practice.facts[chosen]).float(),
    )


def _losses(model: Any, facts_head: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the weighted losses of one batch by name."""
    import torch
    from torch.nn import functional

    images = model.encode_image(torch.cat([batch.views, batch.twins]), normalize=True)
    texts = model.encode_text(batch.tokens, normalize=True)
    views, twins = images[:BATCH], images[BATCH:]
    target = torch.arange(BATCH)
    logits = model.logit_scale.exp() * images @ texts.T
    to_text = functional.cross_entropy(logits, torch.cat([target, target[:NUM_TWINS]]))
    to_image = functional.cross_entropy(logits[:BATCH].T, target)
    twin_similarity = twins @ views.T
    instance = functional.cross_entropy(10.0 * twin_similarity, target[:NUM_TWINS])
    facts = functional.binary_cross_entropy_with_logits(
        facts_head(10.0 * views), batch.facts, reduction="mean"
    )
    return {
        "contrastive": (to_text + to_image) / 2,
        "instance": 0.5 * instance,
        "facts": 5.0 * facts,
        "margin": 2.0 * _margin_loss(views, twin_similarity),
    }


def _margin_loss(views: torch.Tensor, twin_similarity: torch.Tensor) -> torch.Tensor:
    """Return how far twins fall below 0.95 and each picture's nearest others rise above 0.65."""
    import torch

    pulled = (0.95 - twin_similarity.diagonal()).clamp(min=0).mean()
    others = views @ views.T - 2 * torch.eye(len(views))
    pushed = (others.topk(4, dim=1).values - 0.65).clamp(min=0).mean()
    return 2 * pulled + pushed


def _log_step(step: int, num_steps: int, losses: dict[str, torch.Tensor], started: float) -> None:
    rate = step * BATCH / (time.monotonic() - started)
    parts = "  ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
    left = (num_steps - step) * BATCH / rate
    log.info("step %d/%d  %s  %.0f pairs/s  %.0f s left", step, num_steps, parts, rate, left)


def save_weights(out_dir: Path, model: Any) -> None:
    """Write the weights as float16 safetensors, the name open_clip looks for."""
    from safetensors.torch import save

    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    (out_dir / "open_clip_model.safetensors").write_bytes(save(weights))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
