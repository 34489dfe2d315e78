"""How well the demo model sees: figures on held-out pairs, and the model card made from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.demo import junk
from pipelines.demo.practice import make_practice, to_model_input, to_pixels
from pipelines.demo.seeds import rng_for

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

HELD_OUT_SEED = 9_001
NUM_HELD_OUT = 1_000
DEDUP_CUT = 0.86
Figures = dict[str, float]


def load_model(
    model_dir: Path,
) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[list[str]], np.ndarray]]:
    """Return the two towers of an open_clip local-dir checkpoint as functions: `see` and `read`.

    `see` takes pixels, `read` takes captions, both return embeddings. Pixels are uint8
    [n, 64, 64, 3]; embeddings are float32 [n, d] of unit norm.
    """
    model = open_model(model_dir)
    import open_clip
    import torch

    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_dir}")

    def see(pixels: np.ndarray) -> np.ndarray:
        return in_blocks(lambda block: model.encode_image(block, normalize=True), pixels)

    def read(captions: list[str]) -> np.ndarray:
        with torch.inference_mode():
            embeddings: np.ndarray = model.encode_text(tokenizer(captions), normalize=True).numpy()
        return embeddings

    return see, read


def open_model(model_dir: Path) -> Any:
    """Return the open_clip model of a local-dir checkpoint, in float32, ready to look."""
    from curate.media.torchvision_ops import ensure_torchvision_importable

    ensure_torchvision_importable()
    import open_clip

    return open_clip.create_model(f"local-dir:{model_dir}").eval()


def in_blocks(tower: Callable[[torch.Tensor], torch.Tensor], pixels: np.ndarray) -> np.ndarray:
    """Return the rows that `tower` makes of uint8 [n, 64, 64, 3] pixels, 256 pictures at a time."""
    import torch

    starts = range(0, len(pixels), 256)
    with torch.inference_mode():
        parts = [tower(to_model_input(pixels[start : start + 256])) for start in starts]
    return torch.cat(parts).numpy()


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Return the chance that a positive exceeds a negative, ties counted half (Mann-Whitney)."""
    negatives = np.sort(negatives)
    below = np.searchsorted(negatives, positives, side="left")
    not_above = np.searchsorted(negatives, positives, side="right")
    return float((below + not_above).mean() / (2 * len(negatives)))


def judge(model_dir: Path) -> Figures:
    """Return the model's figures on `NUM_HELD_OUT` scenes that nothing else uses."""
    see, read = load_model(model_dir)
    scenes = make_practice(HELD_OUT_SEED, range(NUM_HELD_OUT), text_share=0.0)
    written = make_practice(HELD_OUT_SEED + 1, range(NUM_HELD_OUT), text_share=1.0)
    views, texts = see(scenes.views), read([captions[0] for captions in scenes.captions])
    figures = _text_figures(views, texts)
    cheating = (see(written.views) * read([c[0] for c in written.captions])).sum(axis=1)
    matched = (views * texts).sum(axis=1)
    figures["mean score, caption written out"] = float(cheating.mean())
    figures["a written-out caption scores above a true pair"] = auc(cheating, matched)
    figures |= _image_figures(views, see(scenes.twins))
    return figures | _placeholder_figures(see)


def _text_figures(views: np.ndarray, texts: np.ndarray) -> Figures:
    scores = views @ texts.T
    matched, swapped = scores.diagonal(), np.roll(scores, 1, axis=1).diagonal()
    ranks = (scores > matched[:, None]).sum(axis=1)
    return {
        "AUC matched against swapped": auc(matched, swapped),
        "retrieval@1": float((ranks < 1).mean()),
        "retrieval@10": float((ranks < 10).mean()),
        "mean score, matched": float(matched.mean()),
        "mean score, swapped": float(swapped.mean()),
    }


def _image_figures(views: np.ndarray, twins: np.ndarray) -> Figures:
    between = views @ views.T - 2 * np.eye(len(views))
    pairs = between[np.triu_indices(len(views), 1)]
    twin = (views * twins).sum(axis=1)
    nearest = between.max(axis=1)
    return {
        "near-duplicates above 0.86": float((twin > DEDUP_CUT).mean()),
        "near-duplicates, median cosine": float(np.median(twin)),
        "near-duplicates, 5th percentile": float(np.quantile(twin, 0.05)),
        "distinct scenes, median cosine": float(np.median(pairs)),
        "distinct scenes, 99.9th percentile": float(np.quantile(pairs, 0.999)),
        "distinct scenes above 0.86": float((pairs > DEDUP_CUT).mean()),
        "scenes whose nearest of 999 others is above 0.86": float((nearest > DEDUP_CUT).mean()),
        "nearest other scene, median cosine": float(np.median(nearest)),
    }


def _placeholder_figures(see: Callable[[np.ndarray], np.ndarray]) -> Figures:
    pixels = [_placeholder_pixels(index) for index in range(100)]
    placeholders = see(np.stack(pixels))
    between = (placeholders @ placeholders.T)[np.triu_indices(len(placeholders), 1)]
    return {
        "placeholders above 0.86": float((between > DEDUP_CUT).mean()),
        "placeholders, least cosine": float(between.min()),
    }


def _placeholder_pixels(index: int) -> np.ndarray:
    rng = rng_for(HELD_OUT_SEED, "placeholder", index)
    return to_pixels(junk.encode_jpeg(junk.draw_placeholder(rng), int(rng.integers(60, 95))))


def write_card(model_dir: Path, figures: Figures, *, num_steps: int, seconds: float) -> None:
    """Write MODEL_CARD.md: what the model is, how it was trained, what it reached."""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items())
    text = _CARD.format(
        num_steps=num_steps, seconds=seconds, held_out=NUM_HELD_OUT, seed=HELD_OUT_SEED, rows=rows
    )
    (model_dir / "MODEL_CARD.md").write_text(text, encoding="utf-8")


_CARD = """# The demo model

A CLIP of about one million weights that sees the demo world and knows nothing else: ViT of 4 layers
x 128, 8-pixel patches of 64-pixel pictures; text of 2 layers x 128, 32 words of a word-level
vocabulary; 128-dimensional embeddings. It loads offline, by
`open_clip.create_model_and_transforms("local-dir:pipelines/demo/model")`.

Trained on pairs made for it (other seeds than the demo's) in {seconds:.0f} seconds, the making of
the pictures included, on 2 CPU cores that other work shared (a step took 0.8 seconds alone), by

    python -m pipelines.demo.train_model --out pipelines/demo/model --steps {num_steps}

Held out: {held_out} scenes of the world with seed {seed}. Captions say little, so many fit
several pictures: retrieval is low by nature.

| figure | value |
|---|---|
{rows}
"""
