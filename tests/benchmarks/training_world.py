"""A LLaVA of random weights and shards of instruction rows, for training benchmarks.

Rows are like Bunny-695K's: nine of ten with an image; short answers (VQA), several rounds, or one
long answer; text-only rows are long. Words are made up, and a BPE tokenizer is trained on them.
Nothing is imported that a machine with only torch, transformers, peft and pyarrow would lack.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import report  # noqa: F401 - puts the repository on the path
from PIL import Image

from manifests import store
from manifests.schemas import TRAIN_INDEX, conform
from train.models.processor_files import ImageShape, write_processor

END = "<|endoftext|>"
IMAGE = "<image>"
NUM_WORDS, NUM_PICTURES = 3000, 200


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of a tower and a language model: layers, width, width within, heads."""

    side: int
    patch: int
    tower: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    vocabulary: int
    family: str = "qwen2"

    @property
    def tokens_per_image(self) -> int:
        """Patches of an image."""
        return (self.side // self.patch) ** 2


SIZES = {
    "quick": Size(32, 8, (2, 32, 64, 2), (2, 48, 96, 2), 2048),
    "tiny": Size(96, 8, (4, 192, 768, 3), (4, 256, 1024, 4), 32_000),
    "100M": Size(224, 16, (12, 384, 1536, 6), (12, 768, 2048, 12), 32_000),
    # SigLIP-SO400M at 384 pixels, and Phi-2's shape (its own class, 51,200 rows)
    "3B": Size(384, 14, (27, 1152, 4304, 16), (32, 2560, 10_240, 32), 51_200, "phi"),
}


def write_model(folder: Path, size: Size, *, dtype: str = "float32", device: str = "cpu") -> str:
    """Write a LLaVA directory of random weights and return it."""
    import torch
    from transformers import LlavaForConditionalGeneration

    if (folder / "config.json").exists():
        return str(folder)
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(getattr(torch, dtype))
        model = LlavaForConditionalGeneration(_config(size))
        torch.set_default_dtype(torch.float32)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    shape = ImageShape(size.side, size.patch, has_class_token=False)
    image = type("Image", (), {"text": IMAGE, "id": size.vocabulary - 1})()
    write_processor(folder, folder, shape, image)
    model.save_pretrained(folder)
    return str(folder)


def _config(size: Size) -> Any:
    from transformers import AutoConfig, LlavaConfig

    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    tower = dict(zip(names, size.tower, strict=True))
    tower |= {"image_size": size.side, "patch_size": size.patch, "vision_use_head": False}
    text = dict(zip(names, size.text, strict=True)) | {"vocab_size": size.vocabulary}
    text |= {"num_key_value_heads": size.text[3], "max_position_embeddings": 4096}
    text |= {"pad_token_id": None, "tie_word_embeddings": False}
    if size.family == "phi":
        text |= {"partial_rotary_factor": 0.4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return LlavaConfig(
        vision_config=AutoConfig.for_model("siglip_vision_model", **tower),
        text_config=AutoConfig.for_model(size.family, **text),
        image_token_index=size.vocabulary - 1,
        image_seq_length=size.tokens_per_image,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
    )


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1900, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    words = _words()
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(words, 40)) for _ in range(500)]
    bpe.train_from_iterator(
        [*texts, *(["USER: ASSISTANT: answers questions user's"] * 50)], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def _words() -> list[str]:
    rng = np.random.default_rng(0)
    parts = [a + b for a in "bdfghklmnprstvz" for b in "aeiou"]
    return ["".join(rng.choice(parts, rng.integers(1, 4))) for _ in range(NUM_WORDS)]


def write_shards(folder: Path, num_rows: int, *, side: int, captions: bool = False) -> str:
    """Write one shard and its index, as the mix stage does, and return the directory.

    captions: rows of one caption of about 20 words each, all with an image, as in stage 1.
    """
    if (folder / "part-00000.parquet").exists():
        return str(folder)
    (folder / "shards").mkdir(parents=True)
    rng, words = np.random.default_rng(2), _words()
    pictures = [_picture(rng, side) for _ in range(NUM_PICTURES)]
    entries = []
    with tarfile.open(folder / "shards" / "00000.tar", "w") as tar:
        for at in range(num_rows):
            has_image = captions or at % 10 != 9
            turns = _turns(rng, words, has_image=has_image, caption=captions)
            images = [_add(tar, f"{at:09}.jpg", pictures[at % NUM_PICTURES])] if has_image else []
            row = {"id": str(at), "conversations": turns}
            text = json.dumps(row | ({"image": "a.jpg"} if has_image else {})).encode()
            entries.append(_entry(at, images, _add(tar, f"{at:09}.json", text), turns))
    table = conform(pa.Table.from_pylist(entries), TRAIN_INDEX)
    store.write(str(folder), "part-00000.parquet", table)
    store.write_json(str(folder), "record.json", {"fingerprint": f"{num_rows}-{side}-{captions}"})
    return str(folder)


def _entry(at: int, images: list[Any], text: Any, turns: list[dict[str, str]]) -> dict[str, Any]:
    offset, size = text
    return {
        "uid": at,
        "key": f"{at:09}",
        "shard": "shards/00000.tar",
        "images": [{"suffix": "jpg", "offset": one[0], "size": one[1]} for one in images],
        "json_offset": offset,
        "json_size": size,
        "source": "image" if images else "text",
        "has_image": bool(images),
        "turns": len(turns),
        "token_estimate": sum(len(one["value"]) for one in turns) // 4,
    }


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - (-(-len(data) // 512) * 512), len(data)


def _picture(rng: np.random.Generator, side: int) -> bytes:
    rough = rng.integers(0, 255, (8, 11, 3), np.uint8)
    image = Image.fromarray(rough).resize((side + side // 3, side), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90)
    return sink.getvalue()


def _turns(
    rng: np.random.Generator, words: list[str], *, has_image: bool, caption: bool
) -> list[dict[str, str]]:
    """Return turns; the numbers of words are drawn, a third each of three kinds of rows."""
    kind = 3 if not has_image else 4 if caption else int(rng.integers(0, 3))
    rounds = {0: rng.integers(1, 8), 1: rng.integers(2, 5), 2: 1, 3: 1, 4: 1}[kind]
    typical = {0: 2, 1: 30, 2: 90, 3: 180, 4: 20}[kind]
    turns = []
    for at in range(int(rounds)):
        answer = max(int(rng.lognormal(np.log(typical), 0.5)), 1)
        question = " ".join(rng.choice(words, int(rng.integers(6, 20))))
        before = "<image>\n" if has_image and at == 0 else ""
        turns.append({"from": "human", "value": before + question})
        turns.append({"from": "gpt", "value": " ".join(rng.choice(words, answer))})
    return turns
