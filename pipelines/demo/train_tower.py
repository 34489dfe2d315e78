"""Train the demo's SigLIP vision tower on the demo world (other seeds than the demo's own).

    python -m pipelines.demo.train_tower --out pipelines/demo/tower

writes a `SiglipVisionModel` directory (config, float16 weights, preprocessor) and a card, in three
quarters of an hour on a CPU core that other work shares; the same seed, thread count and versions
of libraries give the same weights.

Two losses:
- sigmoid, each picture against each caption of the batch (Zhai et al. 2023, arXiv:2303.15343); the
  text half is thrown away;
- patches: a linear head, thrown away, must tell from each patch's features what patches.ASKED
  asks. Read are the features that LLaVA takes, those before the last layer. A large tower learns
  such from millions of captions; this one sees too few.

In two phases: the second has smaller batches and looks above all for shapes and digits, which are
learned last. It begins with the first one's float16 weights, so it can be run alone (--begun).
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.demo.fitting import Options, fit, read_options
from pipelines.demo.patches import PATCH, Pictures, join_pictures, make_pictures
from pipelines.demo.practice import IMAGE_SIDE, to_model_input
from pipelines.demo.seeds import rng_for

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TRAIN_SEED = 7_002
NUM_PICTURES = 40_000
"""Of a phase."""
NUM_CAPTIONS = 2
MAX_WORDS = 32
_WORDS = Path(__file__).parent / "model" / "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Phase:
    """How a part of the training goes.

    sigmoid_every: steps from one with the sigmoid loss to the next; the others are of patches.
    what: weight of what a patch shows among the questions of patches.
    """

    num_steps: int
    batch: int
    peak_lr: float
    sigmoid_every: int
    what: float


PHASES = (Phase(1200, 64, 2e-3, 1, 1.0), Phase(2400, 32, 1.2e-3, 4, 5.0))


def main(arguments: list[str]) -> None:
    """Train, save and judge a tower as the command line says."""
    train(read_options(__doc__, arguments, num_phases=len(PHASES)))


def train(options: Options) -> None:
    """Train the chosen phases and write the model and its card."""
    from curate.media.torchvision_ops import ensure_torchvision_importable

    ensure_torchvision_importable()
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.set_num_threads(options.num_threads)
    started, begun = time.monotonic(), options.begun
    for number in options.phases:
        phase = PHASES[number]
        phase = replace(phase, num_steps=options.num_steps(phase.num_steps))
        torch.manual_seed(TRAIN_SEED + number)
        if begun is None:
            tower = SiglipVisionModel(SiglipVisionConfig(**tower_config()))
        else:
            tower = SiglipVisionModel.from_pretrained(begun, dtype=torch.float32)
        tower = _fit(tower, _make_all(number, phase, options.num_threads), phase, number)
        save(options.out, tower)
        begun = options.out
        log.info("phase %d ended after %.0f s", number + 1, time.monotonic() - started)
    from pipelines.demo.judge_tower import judge, write_card

    write_card(options.out, judge(options.out))


def _make_all(number: int, phase: Phase, num_workers: int) -> Pictures:
    """Return the pictures of a phase, its own."""
    first = number * NUM_PICTURES
    needed = min(NUM_PICTURES, phase.num_steps * phase.batch)
    chunks = [range(start, start + 500) for start in range(first, first + needed, 500)]
    with ProcessPoolExecutor(num_workers) as pool:
        return join_pictures(list(pool.map(_make_chunk, chunks)))


def _make_chunk(indices: range) -> Pictures:
    return make_pictures(TRAIN_SEED, indices, num_captions=NUM_CAPTIONS)


def tower_config() -> dict[str, Any]:
    """Return SiglipVisionConfig's fields; the last layer serves the pooled embedding alone."""
    return {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIDE,
        "patch_size": PATCH,
    }


def _fit(tower: Any, pictures: Pictures, phase: Phase, number: int) -> Any:
    """Return the tower, trained."""
    import torch

    from pipelines.demo.tower_losses import TowerInTraining

    model = TowerInTraining(tower, _num_words(), phase.what)
    tokens = _tokens(pictures.captions)

    def losses_of(step: int, chosen: np.ndarray) -> dict[str, torch.Tensor]:
        pixels = to_model_input(pictures.pixels[chosen])
        answers = torch.from_numpy(pictures.answers[chosen]).long()
        read = tokens[chosen, step % NUM_CAPTIONS] if step % phase.sigmoid_every == 0 else None
        return model.losses(pixels, read, answers)

    batches = _batches(len(pictures.pixels), phase, number)
    steps = {"num_steps": phase.num_steps, "peak_lr": phase.peak_lr, "warmup_share": 0.08}
    fit(list(model.parameters()), batches, losses_of, **steps)  # type: ignore[arg-type]
    return model.tower.eval()


def _batches(num_pictures: int, phase: Phase, number: int) -> Iterator[np.ndarray]:
    """Yield each step's pictures; all are seen before any is seen again."""
    order = np.empty(0, dtype=np.int64)
    for step in range(phase.num_steps):
        if len(order) < phase.batch:
            order = rng_for(TRAIN_SEED + number, "tower order", step).permutation(num_pictures)
        chosen, order = order[: phase.batch], order[phase.batch :]
        yield chosen


def _tokens(captions: list[list[str]]) -> torch.Tensor:
    """Return the words of every caption: int64 [pictures, captions each, MAX_WORDS]."""
    import torch
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(_WORDS))
    words.enable_truncation(MAX_WORDS)
    words.enable_padding(length=MAX_WORDS, pad_id=0)
    flat = words.encode_batch([one for each in captions for one in each])
    ids = torch.tensor([one.ids for one in flat], dtype=torch.int64)
    return ids.reshape(len(captions), -1, MAX_WORDS)


def _num_words() -> int:
    return len(json.loads(_WORDS.read_text(encoding="utf-8"))["model"]["vocab"])


def save(out_dir: Path, tower: Any) -> None:
    """Write the tower in float16, and how pictures become its pixel values."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tower.half().save_pretrained(out_dir)
    square = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    half = [0.5, 0.5, 0.5]
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": square,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
    }
    text = json.dumps(processor, indent=2) + "\n"
    (out_dir / "preprocessor_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
